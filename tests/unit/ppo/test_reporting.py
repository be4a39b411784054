"""What a PPO run warns of by the figures of its steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_ray.config import PPOConfig
from rlhf_ray.ppo.reporting import StepReport


def warned(reward_std: float, finished: float, steps: int = 9, **fields: Any) -> list[str]:
    found: list[str] = []
    config = PPOConfig(
        output_dir="r",
        model_name_or_path="m",
        data={"train": "p"},  # type: ignore[arg-type]
        rewards=[{"function": "a.py:f"}],  # type: ignore[arg-type]
        response_length=64,
        **fields,
    )
    session: Any = SimpleNamespace(is_main=True, console=SimpleNamespace(warn=found.append))
    nothing: Any = None
    report = StepReport(config, session, nothing, nothing)
    for step in range(1, steps + 1):
        report.warn_if_ending_is_learnt(reward_std, finished, step)
    return found


def test_a_penalty_that_outweighs_the_reward_is_told_once() -> None:
    """As on SmolLM2: rewards of spread 0.56, a third of the replies cut off, penalty 1. Its variance is 0.65 x 0.35 = 0.2275, of
    0.2275 + 0.3136: 42 %."""
    (said,) = warned(0.56, 0.65)
    assert said.startswith(
        "35% of the replies of 5 steps up to 5 did not end within response_length 64: missing_eos_penalty 1 is 42%"
    )
    assert said.endswith("raise response_length, or lower missing_eos_penalty")


@pytest.mark.parametrize(
    ("reward_std", "finished", "fields"),
    [
        (0.56, 0.95, {}),
        (0.0, 0.0, {}),
        (0.0, 1.0, {}),
        (2.0, 0.65, {}),
        (0.56, 0.65, {"missing_eos_penalty": 0.3}),
        (0.56, 0.65, {"missing_eos_penalty": None}),
        (0.56, 0.65, {"steps": 4}),
        (0.56, 0.65, {"bootstrap_truncated": True}),
        (0.56, 0.65, {"min_response_length": 8}),
    ],
)
def test_where_the_reward_decides_nothing_is_said(reward_std: float, finished: float, fields: dict[str, Any]) -> None:
    assert warned(reward_std, finished, **fields) == []
