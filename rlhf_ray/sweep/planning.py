"""`plan` of a sweep: its most demanding trial, or the process of trials that share a base, and how many run at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from rlhf_ray.config.sweep import SweepConfig
from rlhf_ray.errors import ResourceError
from rlhf_ray.launch.ray_cluster import at_hand
from rlhf_ray.plan.advice import option
from rlhf_ray.plan.job_plan import Plan, StagePlan, plan
from rlhf_ray.plan.memory import GIB, Parts
from rlhf_ray.sweep.capacity import capacity
from rlhf_ray.sweep.sharing import check_sharing, described, processes
from rlhf_ray.sweep.space import corners, read_space
from rlhf_ray.sweep.trials import MOST_TRIALS, TrialJob, check_size, job_of, planned, trial_of

_NO_MEMORY = {
    *("output_dir", "run_name", "seed", "learning_rate", "weight_decay", "warmup_steps", "min_lr_ratio", "max_steps"),
    *("kl_penalty", "kl_coef", "kl_controller", "kl_target", "kl_step_size", "kl_horizon", "target_kl", "cliprange"),
    *("cliprange_value", "vf_coef", "gamma", "lam", "whiten_rewards", "temperature", "num_ppo_epochs", "max_grad_norm"),
    *("cliprange_high", "dual_clip", "ratio_level", "loss_aggregation", "overlong_buffer", "overlong_penalty"),
    *("scale_rewards", "filter_groups", "confirm_held_out", "missing_eos_penalty", "adam_beta1", "adam_beta2"),
    *("adam_epsilon", "lr_scheduler_type", "num_train_epochs", "ref_model_sync_resets_optimizer"),
    *("beta", "label_smoothing", "rpo_alpha"),
}
"""Fields that take no memory: trials that differ in these alone are planned once."""


def plan_sweep(
    config: SweepConfig,
    device: Literal["auto", "cuda", "cpu"] = "auto",
    gpu_gib: float | None = None,
    prompt_tokens: int | None = None,
) -> Plan:
    """See `stages.plan.plan`. ConfigError for settings that make no job."""
    check_size(config)
    jobs = _jobs(config)
    check_sharing(config, jobs)
    plans = [plan(job, device, gpu_gib, prompt_tokens) for job in jobs]
    worst = max(plans, key=lambda found: max(found.needed(stage) for stage in found.stages))
    stages = [replace(stage, stage=f"a trial ({config.stage})") for stage in worst.stages]
    count = len(planned(config)) or config.num_samples * len(config.seeds)
    try:
        with at_hand() as (resources, nodes, own_ray):
            fits = capacity(jobs, resources, nodes, own_ray)
    except ResourceError as error:
        told = "; ".join(f"{p.where}: {p.what}" for p in error.problems)
        return replace(worst, stages=stages, placed=False, placement=told)
    if config.share_base:
        bases, trials = processes(config, fits, count)
        stages = [_of_a_base(stage, -(-trials // bases), jobs[0].learner.zero_stage) for stage in stages]
    return replace(worst, stages=stages, placed=True, placement=f"{count} trials, {described(config, fits, count)}")


def _of_a_base(stage: StagePlan, trials: int, zero_stage: int) -> StagePlan:
    """The plan of a trial, as that of the process in which `trials` such trials share a base: they decode together, and take turns
    for the rest."""
    own = {"adapters", "optimizer", *(("gradients",) if zero_stage else ())}  # ZeRO's buckets stay with their engine

    def of_all(phase: str, parts: Parts) -> Parts:
        many = own | ({"activations", "logits", "kv cache"} if phase == "sampling" else set())
        return {part: size * trials if part in many else size for part, size in parts.items()}

    shared = [
        replace(p, role=f"{trials} trials", phases={name: of_all(name, parts) for name, parts in p.phases.items()})
        for p in stage.processes
    ]
    whole = option("as written", "", shared)
    advice = f"{whole.fullest / GIB:.1f} GiB for {trials} trials on one base; lower trials_per_base if that is too much"
    return replace(stage, stage="trials (ppo)", processes=shared, written=whole, options=[], advice=advice)


def _jobs(config: SweepConfig) -> list[TrialJob]:
    """A job for each kind of trial that differs in what it takes."""
    trials = planned(config)
    settings = [t.settings for t in trials] or corners(read_space(config.space), MOST_TRIALS)
    jobs = [job_of(config, trial_of(config, s, config.seeds[0])) for s in settings]
    return list({job.model_dump_json(exclude=_NO_MEMORY): job for job in jobs}.values())
