"""Small PPO jobs on a tiny random model, in this process unless a test says otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config import PPOConfig
from tests.small_ppo import small_ppo, write_prompts, write_reward


@pytest.fixture(autouse=True)
def _asked_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a reward that raises: pauses of 2.5 s in all."""
    monkeypatch.setattr("rlhf_ray.rewards.sources.PAUSES_S", (0.0, 0.0))


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    return write_prompts(tmp_path)


@pytest.fixture
def reward_file(tmp_path: Path) -> str:
    return write_reward(tmp_path)


@pytest.fixture
def ppo_job(
    tmp_path: Path, tiny_llama: Callable[..., Path], prompts_file: Path, reward_file: str
) -> Callable[..., PPOConfig]:
    """ppo_job("name", field=value, ...) -> a job of 3 steps of 16 replies of up to 8 tokens."""

    def make(name: str, **changes: Any) -> PPOConfig:
        fields = small_ppo(tmp_path, name, tiny_llama(), prompts_file, reward_file)
        if "sft" in changes:  # the policy takes its shape from the SFT adapter
            del fields["lora"]
        return PPOConfig(**{**fields, **changes})

    return make
