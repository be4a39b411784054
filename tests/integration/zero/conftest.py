"""PPO jobs for ranks of a gloo group: unequal prompts, replies that end at different steps, chunks that do not divide evenly; and a
supervised loss, whose backward passes reach the policy alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config import PPOConfig

sys.path.insert(
    0, str(Path(__file__).parent)
)  # the ranks are processes of their own, and import zero_ranks by its name

REWARD = '''
"""The share of ASCII characters; every reply that was scored is written down, and from some call on all can fail."""
import json
import os

CALLS = 0


def score(prompts, completions, completion_ids, **columns):
    global CALLS
    CALLS += 1
    if CALLS >= int(os.environ.get("FAIL_AT_CALL", 10**9)):  # one failure would be tried again
        raise RuntimeError("the reward service is gone")
    if "REPLIES" in os.environ:
        with open(os.environ["REPLIES"], "a") as file:
            file.writelines(json.dumps([p, list(i)]) + "\\n" for p, i in zip(prompts, completion_ids))
    return [sum(c.isascii() for c in text) / max(len(text), 1) for text in completions]
'''


@pytest.fixture
def zero_job(tmp_path: Path, tiny_llama: Callable[..., Path]) -> Callable[..., PPOConfig]:
    """zero_job("name", stage, field=value, ...) -> a job of 2 steps of 20 replies, in chunks of 8, 8 and 4.

    Under two ranks the third chunk, and each evaluation, leave one rank without work. At stage 3 nothing stays gathered."""
    prompts, reward, settings = tmp_path / "prompts.jsonl", tmp_path / "reward.py", tmp_path / "zero3.json"
    answers = tmp_path / "answers.jsonl"
    rows = [{"instruction": f"Say {'so ' * (i % 9)}{i}."} for i in range(80)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers.write_text("".join(json.dumps({**row, "output": "so " * (i % 5 + 1)}) + "\n" for i, row in enumerate(rows)))
    reward.write_text(REWARD)
    settings.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))

    def make(name: str, stage: int, **changes: Any) -> PPOConfig:
        fields: dict[str, Any] = {
            "output_dir": str(tmp_path / name),
            "model_name_or_path": str(tiny_llama()),
            "template": "none",
            "data": {"train": str(prompts), "eval_max_rows": 3},
            "rewards": [{"name": "ascii", "function": f"{reward}:score"}],
            "learner": {
                "num_workers": 2,
                "num_threads": 1,
                "zero_stage": stage,
                "deepspeed": str(settings) if stage == 3 else None,
            },
            "lora": {"r": 4, "lora_alpha": 8},
            "rollout_batch_size": 20,
            "rollout_chunk_size": 8,
            "num_mini_batches": 2,
            "num_ppo_epochs": 2,
            "per_device_train_batch_size": 3,
            "response_length": 8,
            "stop_token_ids": list(range(2, 60)),
            "max_steps": 2,
            "ptx_coef": 0.3,
            "ptx_data": {"train": str(answers)},
            "learning_rate": 1e-3,
            "report_to": [],
        }
        return PPOConfig(**{**fields, **changes})

    return make
