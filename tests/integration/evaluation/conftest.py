"""One tiny chain, made by the real stages once per session: base, SFT run, reward run, PPO run, and the rows they learnt from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config import EvaluateConfig
from rlhf_ray.console import NullConsole

NOUNS = ("oak", "pine", "wren", "carp", "moth", "fern", "crab", "toad")
VERBS = ("Name", "Draw", "Praise", "Describe", "Find")


@dataclass(frozen=True)
class Chain:
    """Folders of base and runs, data files, and `job`: fields that every job here shares."""

    root: Path
    base: str
    sft: str
    reward: str
    ppo: str
    prompts: str
    pairs: str
    job: dict[str, Any]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Path]) -> Chain:
    from rlhf_ray.config import PPOConfig, RewardConfig, SFTConfig
    from rlhf_ray.stages.start import ppo, reward, sft

    root, base = tmp_path_factory.mktemp("chain"), str(tiny_llama(context=128))
    asked = [(f"{verb} the {noun}.", "shortly" if i % 3 == 0 else "") for i, noun in enumerate(NOUNS) for verb in VERBS]
    rows = [{"instruction": text, "input": given} for text, given in asked]
    prompts = write_rows(root / "prompts.jsonl", rows)
    answers = write_rows(root / "sft.jsonl", [{**row, "output": "yes, " + row["instruction"][-6:]} for row in rows])
    pairs = write_rows(
        root / "pairs.jsonl", [{**row, "output_1": "aaaa", "output_2": "bb", "preference": 1} for row in rows]
    )
    job = {
        "model_name_or_path": base,
        "template": "alpaca_short",
        "report_to": (),
        "learner": {"num_workers": 0, "num_threads": 1},
    }
    small = {"train_batch_size": 8, "per_device_train_batch_size": 8, "max_steps": 3, "max_length": 120}
    lora = {"r": 4, "lora_alpha": 16}
    quiet = NullConsole()
    made = {name: str(root / name) for name in ("sft", "reward", "ppo")}
    common: dict[str, Any] = {**job, "resume": "auto"}
    sft(
        SFTConfig(
            output_dir=made["sft"],
            data={"train": answers, "held_out_fraction": 0.4},
            lora=lora,
            learning_rate=2e-2,
            **small,
            **common,
        ),
        quiet,
    )
    reward(
        RewardConfig(
            output_dir=made["reward"],
            data={"train": pairs, "held_out_fraction": 0.4},
            lora=lora,
            learning_rate=1e-2,
            **small,
            **common,
        ),
        quiet,
    )
    ppo(
        PPOConfig(
            output_dir=made["ppo"],
            data={"train": prompts, "held_out_fraction": 0.4},
            sft=made["sft"],
            rewards=[{"name": "reward", "run": made["reward"]}],
            allow_chance_rewards=True,
            rollout_batch_size=8,
            per_device_train_batch_size=8,
            num_mini_batches=1,
            num_ppo_epochs=1,
            response_length=8,
            max_steps=2,
            save_steps=1,
            eval_on_start=False,
            learning_rate=1e-2,
            **common,
        ),
        quiet,
    )
    return Chain(root, base, made["sft"], made["reward"], made["ppo"], prompts, pairs, job)


@pytest.fixture(scope="session")
def evaluation(chain: Chain) -> Callable[..., EvaluateConfig]:
    """evaluation(output_dir, **fields): SFT run against the base on 16 held-out prompts, scored by the reward run."""

    def make(output_dir: Path | str, **fields: Any) -> EvaluateConfig:
        values: dict[str, Any] = {
            **chain.job,
            "output_dir": str(output_dir),
            "data": {"train": chain.prompts, "held_out_fraction": 0.4},
            "policies": [{"name": "base", "policy": "base"}, {"name": "sft", "policy": chain.sft}],
            "rewards": [{"name": "reward", "run": chain.reward}],
            "response_length": 12,
            "rollout_chunk_size": 8,
            "per_device_eval_batch_size": 4,
        }
        return EvaluateConfig(**{**values, **fields})

    return make
