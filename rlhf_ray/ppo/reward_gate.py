"""Is a reward model worth maximising? Asked before the first step: PPO on one that does not tell better from worse chases noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_ray.config import PPOConfig
from rlhf_ray.errors import ConfigError, Problem, RlhfRayError
from rlhf_ray.models.lineage import recorded_reward
from rlhf_ray.models.specs import ModelSpec, reward_source
from rlhf_ray.storage.run import load_run

CHANCE = 0.5


def check_reward_models(config: PPOConfig) -> list[str]:
    """Warnings about reward runs, and merged ones, whose held-out accuracy is not known, or not shown to be above chance.

    Raises ConfigError naming all of the latter that are maximised, unless allow_chance_rewards. A checkpoint that was made
    elsewhere records nothing, and is not asked."""
    warnings: list[str] = []
    refused: list[Problem] = []
    for reward in config.rewards:
        for role, path in reward.models(reward.name).items():
            source = reward_source(path)
            if source.run is None and not recorded_reward(source):
                continue
            found = held_out_accuracy(source)
            if found is None:
                warnings.append(f"{role}: {path} held out no pairs: whether it is better than chance is not known")
            elif not found["low"] > CHANCE:
                what = f"{path} is not shown to be better than chance on held-out pairs"
                got = (
                    f"accuracy {found['accuracy']:.1%} of {found['pairs']:.0f} pairs, 95% interval {found['low']:.1%} to"
                    f" {found['high']:.1%}"
                )
                if reward.weight and not config.allow_chance_rewards:
                    fix = "train it on more pairs, for longer, or with more of them held out; or set allow_chance_rewards: true"
                    refused.append(Problem(f"rewards.{role}", what, "an interval above 50%", got, fix))
                else:
                    warnings.append(f"{role}: {what}: {got}")
    ConfigError.raise_all(refused)
    return warnings


def held_out_accuracy(source: ModelSpec) -> Mapping[str, float] | None:
    """{accuracy, low, high, pairs} of a reward run or its merged checkpoint; None where nothing was held out or is told."""
    recorded: dict[str, Any] = recorded_reward(source).get("held_out") or {}
    if recorded or source.run is None:
        return recorded or None
    try:
        metrics = load_run(source.run.path).metrics  # of an older version, which kept it nowhere else
    except RlhfRayError:
        return None
    names = {"accuracy": "accuracy", "low": "accuracy_low", "high": "accuracy_high", "pairs": "rows"}
    found = {ours: metrics[f"eval/{name}"] for ours, name in names.items() if f"eval/{name}" in metrics}
    return found if len(found) == len(names) else None
