"""Small PPO jobs on a tiny random model, in this process unless a test says otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config import PPOConfig

REWARD = '''
"""A reward with TRL's signature: the share of ASCII characters."""
import os

CALLS = 0


def score(prompts, completions, **columns):
    global CALLS
    CALLS += 1
    if CALLS >= int(os.environ.get("FAIL_AT_CALL", 10**9)):
        raise RuntimeError("the reward service is gone")
    return [sum(c.isascii() for c in text) / max(len(text), 1) for text in completions]
'''


@pytest.fixture(autouse=True)
def _asked_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a reward that raises: pauses of 2.5 s in all."""
    monkeypatch.setattr("rlhf_ray.rewards.sources.PAUSES_S", (0.0, 0.0))


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"instruction": f"Say something about number {i}.", "input": ""} for i in range(80)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture
def reward_file(tmp_path: Path) -> str:
    path = tmp_path / "ascii_reward.py"
    path.write_text(REWARD)
    return f"{path}:score"


@pytest.fixture
def ppo_job(
    tmp_path: Path, tiny_llama: Callable[..., Path], prompts_file: Path, reward_file: str
) -> Callable[..., PPOConfig]:
    """ppo_job("name", field=value, ...) -> a job of 3 steps of 16 replies of up to 8 tokens."""

    def make(name: str, **changes: Any) -> PPOConfig:
        fields: dict[str, Any] = {
            "output_dir": str(tmp_path / name),
            "model_name_or_path": str(tiny_llama()),
            "template": "none",
            "data": {"train": str(prompts_file), "eval_max_rows": 4},
            "rewards": [{"name": "ascii", "function": reward_file}],
            "learner": {"num_workers": 0, "num_threads": 1},
            "lora": {"r": 4, "lora_alpha": 8},
            "rollout_batch_size": 16,
            "rollout_chunk_size": 8,
            "num_mini_batches": 2,
            "num_ppo_epochs": 2,
            "per_device_train_batch_size": 4,
            "response_length": 8,
            "max_steps": 3,
            "learning_rate": 1e-3,
            "report_to": [],
        }
        if "sft" in changes:  # the policy takes its shape from the SFT adapter
            del fields["lora"]
        return PPOConfig(**{**fields, **changes})

    return make
