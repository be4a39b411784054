"""A small PPO job on a tiny random model, and what rewards it: shared by tests of the loop, of split jobs and of vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

REWARD = '''
"""A reward with TRL's signature: the share of ASCII characters. FAIL_AT_CALL: it raises from that call on. File `victim`: a process
id, and a signal (SIGKILL), which is sent in the rollout of step 1."""
import os
import signal
from pathlib import Path

CALLS = 0
VICTIM = Path(__file__).with_name("victim")


def score(prompts, completions, **columns):
    global CALLS
    CALLS += 1
    if CALLS >= int(os.environ.get("FAIL_AT_CALL", 10**9)):
        raise RuntimeError("the reward service is gone")
    if CALLS >= 8 and VICTIM.is_file():
        pid, *how = map(int, VICTIM.read_text().split())
        VICTIM.unlink()
        os.kill(pid, how[0] if how else signal.SIGKILL)
    return [sum(c.isascii() for c in text) / max(len(text), 1) for text in completions]
'''


def write_reward(folder: Path) -> str:
    """`rewards[].function` of a job."""
    path = folder / "ascii_reward.py"
    path.write_text(REWARD)
    return f"{path}:score"


def write_prompts(folder: Path) -> Path:
    path = folder / "prompts.jsonl"
    rows = [{"instruction": f"Say something about number {i}.", "input": ""} for i in range(80)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def small_ppo(folder: Path, name: str, base: Path, prompts: Path, reward: str) -> dict[str, Any]:
    """Fields of a job of 3 steps of 16 replies of up to 8 tokens, in this process. Its run is `folder/name`."""
    return {
        "output_dir": str(folder / name),
        "model_name_or_path": str(base),
        "template": "none",
        "data": {"train": str(prompts), "eval_max_rows": 4},
        "rewards": [{"name": "ascii", "function": reward}],
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
