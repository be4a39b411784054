"""What a run says of the resets of its reference before it starts."""

from __future__ import annotations

from rlhf_ray.config import PPOConfig
from rlhf_ray.ppo.setup import reference_resets


def said(total: int, **changes: object) -> tuple[list[str], list[str]]:
    job = {"output_dir": "x", "model_name_or_path": "x", "data": {"train": "x"}, "rewards": [{"function": "x:y"}]}
    return reference_resets(PPOConfig.model_validate({**job, **changes}), total)


def test_a_reset_that_would_come_after_the_last_step_is_told() -> None:
    """Only the run knows how many steps it has."""
    assert said(10) == ([], [])
    assert said(10, ref_model_sync_steps=9) == (["the reference is reset to the policy after every 9 steps"], [])
    lines, warnings = said(10, ref_model_sync_steps=10)
    assert not lines and "is not below the run's 10 steps: the reference is never reset" in warnings[0]
    both = said(10, ref_model_sync_steps=5, ref_model_sync_resets_optimizer=True)
    assert both[0][0].endswith("after every 5 steps, the policy's optimizer with it")
