"""The date that a run's chat template says: pinned when the run starts, the same for every process, and for what is made from it.

A template that asks for the date (strftime_now, as Llama 3.1's) would else write other prompts after midnight than before, in a
later stage than in the one that it stands on, and in the service than in training, all under one template hash.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from rlhf_ray.config import DPOConfig, EvaluateConfig, JobFields, PipelineConfig, PPOConfig, RewardConfig, SFTConfig
from rlhf_ray.errors import RlhfRayError
from rlhf_ray.launch.begun import begun
from rlhf_ray.models.lineage import recorded_date
from rlhf_ray.models.specs import policy_source, split_step

C = TypeVar("C", bound=JobFields)


def with_template_date(config: C) -> C:
    """`config` with a `template_date`, if its template is the tokenizer's own: that of the run in its folder, or of its copy; else
    that of what it starts from; else now."""
    if config.template_date is not None or not _is_chat(config):
        return config
    before = begun(config)
    if before is not None and "template_date" not in before:  # of an older version, which asks the clock
        return config
    kept = None if before is None else before["template_date"]
    date = kept or next(_of_parents(config), None) or datetime.now().isoformat(timespec="seconds")
    return config.model_copy(update={"template_date": date})


def _is_chat(config: JobFields) -> bool:
    stages = [getattr(config, stage) for stage in config.stages] if isinstance(config, PipelineConfig) else []
    return config.template == "chat" or any(own.get("template") == "chat" for own in stages)


def _of_parents(config: JobFields) -> Iterator[str]:
    """Recorded dates of what the job names, the policy's start first. What cannot be read is told by the stage itself."""
    named = [config.sft] if isinstance(config, (SFTConfig, DPOConfig, RewardConfig, PPOConfig)) else []
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
