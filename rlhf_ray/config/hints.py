"""What to say to a name that does not exist: the field it was meant to be, where it lives, the command that it is for."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf_ray.config.pipeline import STAGES, PipelineConfig
from rlhf_ray.config.schema import section_of
from rlhf_ray.config.sections import Section
from rlhf_ray.config.serve import ServeConfig
from rlhf_ray.config.sweep import SweepConfig

# Names of other trainers and of the systems this one replaces -> ours; the first that the job has is named.
RENAMED: dict[str, tuple[str, ...]] = {
    "adafactor": ("optim",),
    "adap_kl_ctrl": ("kl_controller",),
    "adaptive_kl": ("kl_controller",),
    "allow_cpu_offload": ("cpu_offload",),
    "base_model": ("model_name_or_path",),
    "batch_size": ("rollout_batch_size", "train_batch_size"),
    "bf16": ("dtype",),
    "clip_ratio": ("cliprange",),
    "clip_ratio_c": ("dual_clip",),
    "clip_ratio_high": ("cliprange_high",),
    "critic_learning_rate": ("value.learning_rate",),
    "critic_warmup": ("value.warmup_steps",),
    "cutoff_len": ("max_length",),
    "data_path": ("data.train",),
    "dataset_name": ("data.train",),
    "dataset_path": ("data.train",),
    "dataset_streaming": ("data.streaming",),
    "delta": ("dual_clip",),
    "dynamic_filtering": ("filter_groups",),
    "ent_coef": ("entropy_coef",),
    "entropy_coeff": ("entropy_coef",),
    "epochs": ("num_train_epochs",),
    "epsilon": ("cliprange",),
    "epsilon_high": ("cliprange_high",),
    "eval_subset": ("data.eval_max_rows",),
    "flash_attn": ("attn_implementation",),
    "fp16": ("dtype",),
    "freezing_actor_steps": ("value.warmup_steps",),
    "gae_lambda": ("lam",),
    "horizon": ("kl_horizon",),
    "importance_sampling_level": ("ratio_level",),
    "init_kl_coef": ("kl_coef",),
    "init_value_with_reward": ("value.init_from",),
    "k_beta": ("kl_step_size",),
    "kl_estimator": ("kl_penalty",),
    "kl_term_variant": ("kl_penalty",),
    "log_with": ("report_to",),
    "lora_r": ("lora.r",),
    "lora_target_modules": ("lora.target_modules",),
    "loss_agg_mode": ("loss_aggregation",),
    "loss_type": ("loss_aggregation",),
    "lr": ("learning_rate",),
    "max_new_tokens": ("response_length",),
    "max_seq_length": ("max_length",),
    "micro_batch_size": ("per_device_train_batch_size",),
    "mini_batch_size": ("num_mini_batches",),
    "model": ("model_name_or_path",),
    "model_name": ("model_name_or_path",),
    "n_samples_per_prompt": ("num_generations",),
    "noptepochs": ("num_ppo_epochs",),
    "num_epochs": ("num_train_epochs",),
    "output_max_length": ("response_length",),
    "penalty_reward_value": ("missing_eos_penalty",),
    "policy_model_name_or_path": ("model_name_or_path",),
    "ppo_epochs": ("num_ppo_epochs",),
    "pretrain_data": ("ptx_data.train",),
    "prompt_dict_path": ("template",),
    "prompt_max_len": ("max_length",),
    "prompt_template_name": ("template",),
    "query_len": ("max_length",),
    "response_len": ("response_length",),
    "resume_from_checkpoint": ("resume",),
    "ptx_loss_coef": ("ptx_coef",),
    "ref_model_mixup_alpha": ("ref_model_sync_steps",),
    "reference_reset_steps": ("ref_model_sync_steps",),
    "reward_model": ("rewards",),
    "reward_model_name": ("rewards",),
    "reward_model_name_or_path": ("rewards",),
    "reward_model_path": ("rewards",),
    "rollout_per_device_batch_size": ("per_device_train_batch_size",),
    "save_freq": ("save_steps",),
    "save_steps_extra": ("save_steps",),
    "sft_model_path": ("sft",),
    "step_batch_size": ("num_mini_batches",),
    "step_per_device_batch_size": ("per_device_train_batch_size",),
    "sync_ref_model": ("ref_model_sync_steps",),
    "target": ("kl_target",),
    "torch_dtype": ("dtype",),
    "total_epochs": ("num_train_epochs",),
    "train_subset": ("data.max_rows",),
    "use_8bit": ("load_in_8bit",),
    "val_set_size": ("data.held_out_fraction",),
    "value_clip": ("cliprange_value",),
    "vf_loss_coef": ("vf_coef",),
    "wandb_run_name": ("run_name",),
}


SERVICE = {"registry", "adapters", "replicas", "limits", "api_keys", "port"}
"""Fields that only the job of a service has."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return found[0] if found else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    near = nearest(name, known)
    return f"did you mean {near}?" if near else ""


def nearest_sibling(path: Path) -> str:
    """A hint at the most similar name in the innermost folder of `path` that exists; empty if nothing is similar."""
    missing, folder = path, path.parent
    while not os.path.isdir(folder) and folder != folder.parent:
        missing, folder = folder, folder.parent
    try:
        near = nearest(missing.name, sorted(p.name for p in folder.iterdir()))
    except OSError:
        return ""
    return f"did you mean {folder / near}?" if near else ""


def unknown_key(job: type[Section], section: type[Section], prefix: str, key: str) -> str:
    """How to mend the unknown field `key` of `section`, which stands at `prefix` (dotted, or empty) of a `job` file."""
    dotted = f"{prefix}.{key}" if prefix else key
    here = set(dotted_fields(job))
    for name in RENAMED.get(key, ()):
        if name in here:
            return f"write {name}"
    for name in sorted(here):
        if name.rsplit(".", 1)[-1] == key and "[]" not in name:
            return f"write {name}: it does not belong to {prefix or 'the top'}"
    near = nearest(key, section.model_fields)
    if near:
        return f"did you mean {near}?"
    for stage, other in STAGES.items():
        if other is not job and (key in other.model_fields or dotted in set(dotted_fields(other))):
            return f"it is a field of {stage}" + (
                f": put it under {stage}" if job is PipelineConfig else " jobs; remove it"
            )
    fields = ", ".join(section.model_fields)
    return (
        f"remove it; fields here: {fields}"
        if len(fields) < 160
        else f"remove it; `rlhf-ray {command(job)} --help` lists the fields"
    )


def command(job: type[Section]) -> str:
    """The command that takes job files of this class."""
    return next(
        (stage for stage, cls in {**STAGES, "sweep": SweepConfig, "serve": ServeConfig}.items() if cls is job),
        "pipeline",
    )


def stage_of(values: Mapping[str, Any], stem: str) -> str:
    """The command that a job file is for: by its fields, else by its file name; empty if neither decides."""
    if "space" in values and any(isinstance(values.get(stage), Mapping) for stage in ("ppo", "dpo")):
        return "sweep"
    if values.keys() & SERVICE:
        return "serve"
    if "stages" in values or any(isinstance(values.get(stage), Mapping) for stage in STAGES):
        return "pipeline"
    fitting = [stage for stage, cls in STAGES.items() if _fits(cls, values)]
    if len(fitting) == 1:
        return fitting[0]
    named = [stage for stage in (*STAGES, "pipeline", "serve") if stage in re.split(r"[^a-z]+", stem.lower())]
    return named[0] if len(named) == 1 else ""


def _fits(cls: type[Section], values: Mapping[str, Any]) -> bool:
    required = {name for name, info in cls.model_fields.items() if info.is_required()}
    return required <= values.keys() <= cls.model_fields.keys()


def job_of_another_stage(cls: type[Section], values: Mapping[str, Any]) -> tuple[str, str] | None:
    """What to say, and the fix, if the file is a clean job file of another command, and foreign to this one; else None."""
    jobs: dict[str, type[Section]] = {**STAGES, "pipeline": PipelineConfig}
    foreign = values.keys() - cls.model_fields.keys()
    if cls not in jobs.values() or not foreign:
        return None
    for stage, other in jobs.items():
        if other is not cls and _fits(other, values):
            named = ", ".join(sorted(foreign))
            return f"is a job file of {stage}, not of {command(cls)} (it has {named})", f"run `rlhf-ray {stage}` on it"
    return None


def dotted_fields(section: type[Section], prefix: str = "") -> Iterator[str]:
    """Every field name, sections opened: `lora.r`, `rewards[].run`."""
    for name, info in section.model_fields.items():
        yield prefix + name
        inner, many = section_of(info.annotation)
        if inner is not None:
            yield from dotted_fields(inner, f"{prefix}{name}{'[]' if many else ''}.")
