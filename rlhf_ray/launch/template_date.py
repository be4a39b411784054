"""The date that a run's chat template says: pinned when the run starts, the same for every process, and for what is made from it.

A template that asks for the date (strftime_now, as Llama 3.1's) would else write other prompts after midnight than before, in a
later stage than in the one that it stands on, and in the service than in training, all under one template hash.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from rlhf_ray.config import EvaluateConfig, JobFields, PipelineConfig, PPOConfig, RewardConfig, SFTConfig
from rlhf_ray.config.sections import under
from rlhf_ray.errors import RlhfRayError
from rlhf_ray.models.lineage import recorded_date
from rlhf_ray.models.specs import policy_source, split_step
from rlhf_ray.storage.object_store import copied_config
from rlhf_ray.storage.run_folder import is_run, open_run

C = TypeVar("C", bound=JobFields)


def with_template_date(config: C) -> C:
    """`config` with a `template_date`, if its template is the tokenizer's own: that of the run in its folder, or of its copy; else
    that of what it starts from; else now."""
    if config.template_date is not None or not _is_chat(config):
        return config
    begun = _begun(config)
    if begun is not None and "template_date" not in begun:  # of an older version, which asks the clock
        return config
    kept = None if begun is None else begun["template_date"]
    date = kept or next(_of_parents(config), None) or datetime.now().isoformat(timespec="seconds")
    return config.model_copy(update={"template_date": date})


def _is_chat(config: JobFields) -> bool:
    stages = [getattr(config, stage) for stage in config.stages] if isinstance(config, PipelineConfig) else []
    return config.template == "chat" or any(own.get("template") == "chat" for own in stages)


def _begun(config: JobFields) -> dict[str, Any] | None:
    """The configuration of the run that goes on, or of a stage in it; None for a new one."""
    places = [(config.output_dir, config.copy_to)]
    if isinstance(config, PipelineConfig):
        copies = [None if config.copy_to is None else under(config.copy_to, stage) for stage in config.stages]
        places += [(f"{config.output_dir}/{stage}", uri) for stage, uri in zip(config.stages, copies)]
    for folder, uri in places:
        if is_run(folder):
            return open_run(folder, verify=False).config()
        if config.resume == "auto" and uri is not None and (copied := copied_config(uri)) is not None:
            return copied
    return None


def _of_parents(config: JobFields) -> Iterator[str]:
    """Recorded dates of what the job names, the policy's start first. What cannot be read is told by the stage itself."""
    named = [config.sft] if isinstance(config, (SFTConfig, RewardConfig, PPOConfig)) else []
    if isinstance(config, EvaluateConfig):
        named += [policy.policy for policy in config.policies]
    if isinstance(config, (PPOConfig, EvaluateConfig)):
        named += [reward.run or reward.model for reward in config.rewards]
    for name in (*named, config.model_name_or_path):
        try:
            if name is not None and Path(split_step(name)[0]).is_dir() and (date := recorded_date(policy_source(name))):
                yield date
        except RlhfRayError:
            continue
