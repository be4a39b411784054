"""Small sweeps on a tiny random model, on one Ray of two CPUs for all tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config import SweepConfig

REWARD = '''
"""The share of ASCII characters; fails, or ends its process, where a file beside it says so."""
import os
import signal
from pathlib import Path

HERE = Path(__file__).parent


def score(prompts, completions, **columns):
    if (HERE / "fail").is_file():
        raise RuntimeError("the reward service is gone")
    if (HERE / "die").is_file():
        (HERE / "die").unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return [sum(c.isascii() for c in text) / max(len(text), 1) for text in completions]
'''


@pytest.fixture
def two_cpus(ray_of: Callable[..., Any]) -> Any:
    return ray_of(num_cpus=2)


@pytest.fixture
def sweep_job(tmp_path: Path, tiny_llama: Callable[..., Path]) -> Callable[..., SweepConfig]:
    """sweep_job("name", field=value, ...) -> two penalties at two coefficients, 3 steps of 8 short replies each; of four held-out
    prompts some choose and some confirm."""
    prompts, reward = tmp_path / "prompts.jsonl", tmp_path / "ascii_reward.py"
    rows = [{"instruction": f"Say something about number {i}.", "input": ""} for i in range(40)]
    prompts.write_text("".join(json.dumps(r) + "\n" for r in rows))
    reward.write_text(REWARD)

    def make(name: str, **changes: Any) -> SweepConfig:
        ppo: dict[str, Any] = {
            "data": {"train": str(prompts), "eval_max_rows": 4},
            "rewards": [{"name": "ascii", "function": f"{reward}:score"}],
            "lora": {"r": 4, "lora_alpha": 8},
            "rollout_batch_size": 8,
            "rollout_chunk_size": 8,
            "num_mini_batches": 1,
            "num_ppo_epochs": 1,
            "per_device_train_batch_size": 8,
            "response_length": 8,
            "max_steps": 3,
            "eval_steps": 1,
            "learning_rate": 1e-3,
        }
        fields: dict[str, Any] = {
            "output_dir": str(tmp_path / name),
            "model_name_or_path": str(tiny_llama()),
            "template": "none",
            "report_to": [],
            "learner": {"num_threads": 1},
            "ppo": {**ppo, **changes.pop("ppo", {})},
            "space": {"kl_penalty": ["kl", "jensen_shannon"], "kl_coef": [0.01, 0.1]},
        }
        return SweepConfig(**{**fields, **changes})

    return make
