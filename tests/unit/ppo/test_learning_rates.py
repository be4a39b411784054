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
    value = {"warmup_steps": 3}  # its rate is five times the policy's, by default
    assert [rates(13, step, value=value)["policy"] for step in (1, 2, 3)] == [0.0, 0.0, 0.0]
    for step in range(1, 11):
        assert rates(13, step + 3, value=value)["policy"] == rates(10, step)["policy"]
        assert rates(13, step, value=value)["value"] == pytest.approx(5 * rates(13, step)["policy"])
    assert rates(13, 4, value=value)["policy"] == pytest.approx(1 / 3)


def test_without_a_value_model_nothing_waits() -> None:
    made = {"advantage_estimator": "rloo", "num_generations": 2, "value": {"warmup_steps": 3}}
    assert rates(10, 1, **made) == {"policy": pytest.approx(1 / 3)}


def test_the_value_model_warms_up_for_a_twentieth_of_the_steps_rounded_down() -> None:
    """None in a run of fewer than 20, by default; a number from 1 on is steps. It was 0."""
    waits = {
        total: sum(rates(total, step)["policy"] == 0 for step in range(1, total + 1)) for total in (1, 19, 20, 39, 100)
    }
    assert waits == {1: 0, 19: 0, 20: 1, 39: 1, 100: 5}
    assert [rates(40, step, value={"warmup_steps": 0.5})["policy"] > 0 for step in (20, 21)] == [False, True]
    assert [rates(40, step, value={"warmup_steps": 1})["policy"] > 0 for step in (1, 2)] == [False, True]
