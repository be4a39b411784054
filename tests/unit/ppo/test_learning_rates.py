"""Learning rates of policy and value model, step by step."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_ray.config import PPOConfig
from rlhf_ray.ppo.setup import learning_rates

GROUPS = ("policy", "value")


def rates(total: int, step: int, **changes: Any) -> dict[str, float]:
    job = {"output_dir": "x", "model_name_or_path": "x", "data": {"train": "x"}, "rewards": [{"function": "x:y"}]}
    config = PPOConfig.model_validate({**job, "learning_rate": 1.0, "warmup_steps": 0.2, **changes})
    return learning_rates(config, GROUPS if config.advantage_estimator == "gae" else GROUPS[:1], total, step)


def test_the_policys_warm_up_and_decay_start_after_the_value_models() -> None:
    """Three steps of the value model alone, then what a run of ten steps has. They were spent: the first rate was 0.75, not 1/3."""
    value = {"warmup_steps": 3, "learning_rate": 5.0}
    assert [rates(13, step, value=value)["policy"] for step in (1, 2, 3)] == [0.0, 0.0, 0.0]
    for step in range(1, 11):
        assert rates(13, step + 3, value=value)["policy"] == rates(10, step)["policy"]
        assert rates(13, step, value=value)["value"] == pytest.approx(5 * rates(13, step)["policy"])
    assert rates(13, 4, value=value)["policy"] == pytest.approx(1 / 3)


def test_without_a_value_model_nothing_waits() -> None:
    made = {"advantage_estimator": "rloo", "num_generations": 2, "value": {"warmup_steps": 3}}
    assert rates(10, 1, **made) == {"policy": pytest.approx(1 / 3)}
