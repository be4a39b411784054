"""An adaptive coefficient is told apart from one that was seen to run away."""

from __future__ import annotations

import pytest

from rlhf_ray.config import PPOConfig
from rlhf_ray.ppo.setup import controller_warnings


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"kl_penalty": "bregman", "kl_controller": "adaptive"}, True),
        ({"kl_penalty": "jensen_shannon", "kl_controller": "horizon"}, True),
        ({"kl_penalty": "squared_error", "kl_controller": "adaptive"}, True),
        ({"kl_penalty": "squared_error", "kl_controller": "adaptive", "use_kl_loss": True}, False),
        ({"kl_penalty": "bregman"}, False),
        ({"kl_penalty": "clamped_kl", "kl_controller": "adaptive"}, False),
        ({"kl_controller": "adaptive"}, False),
    ],
)
def test_a_penalty_that_a_controller_did_not_hold(changes: dict[str, object], told: bool) -> None:
    job = {"output_dir": "x", "model_name_or_path": "x", "data": {"train": "x"}, "rewards": [{"function": "x:y"}]}
    found = controller_warnings(PPOConfig.model_validate({**job, **changes}))
    assert bool(found) is told
    assert not told or str(changes["kl_penalty"]) in found[0]
