"""The header of an SFT, DPO or reward run, printed before its first step: what will happen, and what looks wrong with it."""

from __future__ import annotations

from rlhf_ray.config import DPOConfig
from rlhf_ray.console import counted
from rlhf_ray.data.encode import end_of_turn
from rlhf_ray.data.templates import Template
from rlhf_ray.maths.schedules import peak_multiplier, resolve_warmup
from rlhf_ray.supervised.task import Job, SupervisedConfig
from rlhf_ray.training.environment import not_exact
from rlhf_ray.training.header import config_line

FEW_STEPS = 10
FULL_TUNING_RATE = 1e-5
"""Learning rates up to here belong to full fine-tuning; LoRA wants about ten times as much."""
FULL_DPO_RATE = 1e-6
"""The same of DPO, whose rates are lower (TRL's default)."""


def header_lines(job: Job, template: Template) -> list[str]:
    config, session, backbone, steps = job.config, job.session, job.task.model.backbone, job.steps
    per_device, world, rows = config.per_device_train_batch_size, session.world_size, len(job.examples.train)
    parameters = list(job.task.model.parameters())
    trainable, total = (
        sum(p.numel() for p in part) for part in ([p for p in parameters if p.requires_grad], parameters)
    )
    warmup, end = resolve_warmup(config.warmup_steps, steps), end_of_turn(backbone.tokenizer, template)
    ends = repr(backbone.tokenizer.convert_ids_to_tokens(end)) if end is not None and config.add_eos_token else "none"
    return [
        *job.task.lineage,
        *(f"data       {line}" for line in job.examples.lines),
        f"trainable  {trainable:,} of {total:,} parameters ({trainable / total:.2%})",
        f"batch      {config.train_batch_size} rows a step = {per_device} per device x "
        f"{config.train_batch_size // (per_device * world)} accumulated x {counted(world, 'worker')}",
        f"steps      {steps:,} ({steps / -(-rows // config.train_batch_size):.3g} epochs of {rows:,} rows), "
        f"{config.lr_scheduler_type}, {warmup} of them warm-up",
        f"peak lr    {peak_rate(config, steps):.3g} ({config.optim})",
        f"device     {session.device}, {counted(session.num_threads, 'thread')}, {backbone.identity.precision}, "
        f"{backbone.attn_implementation}",
        *([f"           not bit-exact: {why}"] if (why := not_exact(session.device)) else []),
        f"tokens     pad {backbone.pad.token!r} ({backbone.pad.why}); replies end in {ends}",
        config_line(config),
    ]


def warnings_about(config: SupervisedConfig, steps: int) -> list[str]:
    """Settings that run and yet learn little (F28)."""
    found = []
    if steps < FEW_STEPS:
        found.append(
            f"only {counted(steps, 'optimizer step')}: expect little; lower train_batch_size, or raise num_train_epochs"
        )
    peak = peak_rate(config, steps)
    if peak < 0.99 * config.learning_rate:
        found.append(
            f"the learning rate peaks at {peak:.3g}, not at {config.learning_rate:.3g}: warm-up takes "
            f"{resolve_warmup(config.warmup_steps, steps)} steps and the run has {steps}; give warmup_steps as a share"
        )
    if config.learning_rate <= (FULL_DPO_RATE if isinstance(config, DPOConfig) else FULL_TUNING_RATE):
        found.append(
            f"learning_rate {config.learning_rate:.3g} is usual for full fine-tuning; LoRA wants about 10 times as much"
        )
    return found


def peak_rate(config: SupervisedConfig, steps: int) -> float:
    warmup = resolve_warmup(config.warmup_steps, steps)
    return config.learning_rate * peak_multiplier(config.lr_scheduler_type, steps, warmup, config.min_lr_ratio)
