"""Job files and data of a small chain, as a person writes them, and the console script to run them with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_ray.cli import main

ANIMALS = ("wren", "toad", "carp", "moth", "crab", "lark", "newt", "hare", "mole", "swan")
SMALL = {
    "train_batch_size": 8,
    "per_device_train_batch_size": 8,
    "max_steps": 3,
    "max_length": 96,
    "learning_rate": 1e-2,
}
LORA = {"r": 4, "lora_alpha": 16}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def run_command() -> Callable[..., None]:
    """run_command("sft", "job.yaml", ..., code=0): the console script, which must exit with this code."""

    def run(*words: str, code: int = 0) -> None:
        found = main([str(word) for word in words])
        assert found == code, f"rlhf-ray {' '.join(map(str, words))} exited {found}"

    return run


@pytest.fixture
def jobs(tmp_path: Path, tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Stage -> job file: the chain without merging, in the current folder, with runs under runs/."""
    monkeypatch.chdir(tmp_path)
    asked = [f"{verb} the {animal}." for animal in ANIMALS for verb in ("Name", "Draw", "Feed", "Find", "Greet")]
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"instruction": text, "input": ""} for text in asked])
    answers = write_rows(tmp_path / "sft.jsonl", [{"instruction": t, "input": "", "output": "yes"} for t in asked])
    pairs = write_rows(
        tmp_path / "pairs.jsonl",
        [{"user_input": t, "completion_a": "yes" * (1 + i % 3), "completion_b": "no"} for i, t in enumerate(asked)],
    )
    shared = {
        "model_name_or_path": str(tiny_llama(context=128)),
        "template": "alpaca_short",
        "learner": {"num_workers": 0, "num_threads": 1},
        "report_to": [],
    }
    stages: dict[str, dict[str, Any]] = {
        "sft": {"data": {"train": answers}, "lora": LORA, **SMALL},
        "reward": {"data": {"train": pairs}, "sft": "runs/sft", **SMALL},
        "ppo": {
            "data": {"train": prompts},
            "sft": "runs/sft",
            "rewards": [{"name": "helpful", "run": "runs/reward"}],
            "allow_chance_rewards": True,
            "rollout_batch_size": 16,
            "rollout_chunk_size": 8,
            "num_mini_batches": 2,
            "num_ppo_epochs": 1,
            "per_device_train_batch_size": 8,
            "response_length": 8,
            "max_steps": 2,
            "learning_rate": 1e-2,
        },
    }
    files = {}
    for stage, fields in stages.items():
        path = tmp_path / f"{stage}.yaml"
        path.write_text(yaml.safe_dump({**shared, "output_dir": f"runs/{stage}", **fields}))
        files[stage] = str(path)
    return files
