"""Split jobs on a tiny random model, on one Ray with two declared GPUs for all tests."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config import PPOConfig
from tests.small_ppo import small_ppo, write_prompts, write_reward


@pytest.fixture
def two_gpus(ray_of: Callable[..., Any]) -> Iterator[Any]:
    """A Ray of 3 CPUs and 2 declared GPUs. Afterwards everything must have been given back."""
    os.environ.setdefault("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", "300")
    ray = ray_of(num_cpus=3, num_gpus=2)
    yield ray
    deadline = time.monotonic() + 20
    while (free := _free(ray)) != (3.0, 2.0) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert free == (3.0, 2.0), "something is still reserved"


def _free(ray: Any) -> tuple[float, float]:
    found = ray.available_resources()
    return found.get("CPU", 0.0), found.get("GPU", 0.0)


@pytest.fixture
def reward_file(tmp_path: Path) -> str:
    return write_reward(tmp_path)


@pytest.fixture
def split_job(tmp_path: Path, tiny_llama: Callable[..., Path], reward_file: str) -> Callable[..., PPOConfig]:
    """split_job("name", field=value, ...) -> 2 steps of 24 replies in chunks of 4; two generators and a scorer on GPU fractions."""
    prompts = write_prompts(tmp_path)

    def make(name: str, **changes: Any) -> PPOConfig:
        fields: dict[str, Any] = {
            **small_ppo(tmp_path, name, tiny_llama(), prompts, reward_file),
            "placement": "split",
            "learner": {"num_workers": 1, "num_threads": 1, "num_gpus": 1.0},
            "generator": {"num_actors": 2, "num_gpus": 0.25, "num_cpus": 0.25, "num_threads": 1},
            "scorer": {"num_actors": 1, "num_gpus": 0.5, "num_cpus": 0.25, "num_threads": 1},
            "rollout_batch_size": 24,
            "rollout_chunk_size": 4,
            "num_ppo_epochs": 1,
            "response_length": 24,
            "max_steps": 2,
        }
        return PPOConfig(**{**fields, **changes})

    return make
