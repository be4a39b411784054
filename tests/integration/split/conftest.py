"""Split jobs on a tiny random model, on one Ray with two declared GPUs for all tests."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config import PPOConfig

REWARD = '''
"""The share of ASCII characters. File `victim`: a process id, and a signal (SIGKILL), which is sent in the rollout of step 1."""
import os
import signal
from pathlib import Path

CALLS = 0
VICTIM = Path(__file__).with_name("victim")


def score(prompts, completions, **columns):
    global CALLS
    CALLS += 1
    if CALLS >= 8 and VICTIM.is_file():
        pid, *how = map(int, VICTIM.read_text().split())
        VICTIM.unlink()
        os.kill(pid, how[0] if how else signal.SIGKILL)
    return [sum(c.isascii() for c in text) / max(len(text), 1) for text in completions]
'''


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
    path = tmp_path / "ascii_reward.py"
    path.write_text(REWARD)
    return f"{path}:score"


@pytest.fixture
def split_job(tmp_path: Path, tiny_llama: Callable[..., Path], reward_file: str) -> Callable[..., PPOConfig]:
    """split_job("name", field=value, ...) -> 2 steps of 24 replies in chunks of 4; two generators and a scorer on GPU fractions."""
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"instruction": f"Say something about number {i}.", "input": ""} for i in range(80)]
    prompts.write_text("".join(json.dumps(r) + "\n" for r in rows))

    def make(name: str, **changes: Any) -> PPOConfig:
        fields: dict[str, Any] = {
            "output_dir": str(tmp_path / name),
            "model_name_or_path": str(tiny_llama()),
            "template": "none",
            "data": {"train": str(prompts), "eval_max_rows": 4},
            "rewards": [{"name": "ascii", "function": reward_file}],
            "placement": "split",
            "learner": {"num_workers": 1, "num_threads": 1, "num_gpus": 1.0},
            "generator": {"num_actors": 2, "num_gpus": 0.25, "num_cpus": 0.25, "num_threads": 1},
            "scorer": {"num_actors": 1, "num_gpus": 0.5, "num_cpus": 0.25, "num_threads": 1},
            "lora": {"r": 4, "lora_alpha": 8},
            "rollout_batch_size": 24,
            "rollout_chunk_size": 4,
            "num_mini_batches": 2,
            "num_ppo_epochs": 1,
            "per_device_train_batch_size": 4,
            "response_length": 24,
            "max_steps": 2,
            "learning_rate": 1e-3,
            "report_to": [],
        }
        return PPOConfig(**{**fields, **changes})

    return make
