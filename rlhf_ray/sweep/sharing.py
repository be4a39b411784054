"""Which sweeps can share a base (`share_base`), and how many processes they take."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_ray.config import JobFields, PPOConfig
from rlhf_ray.config.sweep import SweepConfig
from rlhf_ray.errors import ConfigError, Problem
from rlhf_ray.sweep.capacity import Capacity

OF_THE_BASE = (
    *("model_name_or_path", "revision", "dtype", "load_in_8bit", "load_in_4bit", "cpu_offload"),
    *("attn_implementation", "lora_compute_dtype", "stop_token_ids"),
)
"""Fields that decide which base is loaded, and how: trials that differ in one have no base in common."""
MOST_ZERO_STAGE = 2
"""Stage 3 cuts up the base itself, and each of its engines would cut it anew."""


def check_sharing(config: SweepConfig, jobs: Sequence[JobFields]) -> None:
    """ConfigError, one line a reason, for trials that cannot share a base.   jobs: of all kinds of trials."""
    if not config.share_base:
        return
    problems = [
        Problem(
            f"space.{name}",
            "decides which base is loaded, which all trials of share_base have in common",
            "one value, under ppo or at the top",
            fix="take it out of space, or set share_base: false",
        )
        for name in config.space
        if name.split(".")[0] in OF_THE_BASE
    ]
    drop = "change it, or set share_base: false"
    for job in jobs:
        learner = job.learner
        if not isinstance(job, PPOConfig):
            problems.append(Problem("share_base", "trials of DPO sample nothing together", "trials of PPO", fix=drop))
            continue
        if job.placement != "colocate":
            problems.append(
                Problem("share_base", "trials have actors of their own", "placement: colocate", job.placement, drop)
            )
        if (engine := job.rollout.engine) != "builtin":
            what, expected = "trials sample with another engine", "rollout.engine: builtin"
            problems.append(Problem("share_base", what, expected, engine, drop))
        if learner.num_workers > 1:
            got = str(learner.num_workers)
            problems.append(Problem("share_base", "trials have several workers", "learner.num_workers: 1", got, drop))
        if learner.zero_stage > MOST_ZERO_STAGE:
            got = str(learner.zero_stage)
            problems.append(
                Problem("share_base", "ZeRO 3 cuts up the base", "learner.zero_stage: 0, 1 or 2", got, drop)
            )
    ConfigError.raise_all(dict.fromkeys(problems))


def processes(config: SweepConfig, fits: Capacity, trials: int) -> tuple[int, int]:
    """(processes with a base each, trials at once over all of them).

    trials: that are to be run.  fits: how many trials could have a base each."""
    wanted = max(min(trials, config.max_concurrent_trials or trials), 1)
    count = min(fits.at_once, -(-wanted // config.trials_per_base))
    return count, min(wanted, count * config.trials_per_base)


def described(config: SweepConfig, fits: Capacity, trials: int) -> str:
    """How many trials run at once, and where."""
    each = ", ".join(f"{amount:g} {kind}" for kind, amount in fits.each.items())
    if config.share_base:
        count, at_once = processes(config, fits, trials)
        where = "one base" if count == 1 else f"{count} bases"
        if fits.is_here:
            return f"{at_once} at once on {where}, in this process, without Ray"
        return f"{at_once} at once on {where}, in a process of {each} each"
    at_once = min(fits.at_once, config.max_concurrent_trials or fits.at_once)
    where = f"each in a process of {each}" if fits.in_process else f"each with workers of its own: {each}"
    return f"{at_once} at once, {where}"
