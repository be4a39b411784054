"""`placement: split` on the recommended chain: the policy from an SFT adapter, reward and critic from a reward run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config import PipelineConfig, PPOConfig, RewardConfig, SFTConfig
from rlhf_ray.stages.start import pipeline, ppo, reward, sft
from rlhf_ray.storage.run_folder import sha256_file
from tests.encoders import KINDS
from tests.runs import equal, lasting_rows, weights

pytestmark = pytest.mark.integration


@pytest.mark.long
def test_it_gives_the_adapter_of_colocate(
    two_gpus: Any, split_job: Callable[..., PPOConfig], tmp_path: Path, console: Any
) -> None:
    """Bit for bit; the scorer's reward head and reference are those of the runs named, whichever process holds them."""
    job = split_job("x")
    shared = {
        "model_name_or_path": job.model_name_or_path,
        "template": "none",
        "learner": {"num_workers": 0, "num_threads": 1},
        "report_to": [],
        "train_batch_size": 8,
        "per_device_train_batch_size": 8,
        "max_steps": 2,
        "max_length": 96,
        "learning_rate": 1e-2,
    }
    asked = [f"Say something about number {i}." for i in range(40)]
    rows = tmp_path / "sft.jsonl"
    rows.write_text("".join(json.dumps({"instruction": a, "input": "", "output": "yes"}) + "\n" for a in asked))
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        "".join(json.dumps({"user_input": a, "completion_a": "yes", "completion_b": "no"}) + "\n" for a in asked)
    )
    lora = {"r": 4, "lora_alpha": 8}
    first = sft(SFTConfig(output_dir=str(tmp_path / "sft"), data={"train": str(rows)}, lora=lora, **shared), console)
    second = reward(
        RewardConfig(output_dir=str(tmp_path / "reward"), data={"train": str(pairs)}, sft=first.run_dir, **shared),
        console,
    )
    other = {"sft": first.run_dir, "seed": 1, **shared}
    third = reward(RewardConfig(output_dir=str(tmp_path / "other"), data={"train": str(pairs)}, **other), console)
    fields = split_job("x").model_dump(exclude_unset=True)
    del fields["lora"]
    many = {"name": "many", "ensemble": [third.run_dir, second.run_dir], "weight": 0.5}
    fields |= {"sft": first.run_dir, "rewards": [{"name": "helpful", "run": second.run_dir}, many]}
    fields |= {"value": {"init_from": "reward:many/1"}, "allow_chance_rewards": True}
    beside = {"placement": "colocate", "learner": {"num_workers": 0, "num_threads": 1}}
    here = ppo(PPOConfig(**{**fields, **beside, "output_dir": str(tmp_path / "colocate")}), console)
    apart = ppo(PPOConfig(**{**fields, "output_dir": str(tmp_path / "split")}), console)
    for name in ("adapter", "value"):
        file = f"{name}/adapter_model.safetensors"
        assert sha256_file(Path(apart.run_dir) / file) == sha256_file(Path(here.run_dir) / file)
    for name in ("helpful", "many", "many/1", "many/2", "many/std"):
        assert apart.metrics[f"reward/{name}"] == here.metrics[f"reward/{name}"]


def test_encoders_of_their_own_base(
    two_gpus: Any, split_job: Callable[..., PPOConfig], encoder: Callable[..., Path], console: Any
) -> None:
    """Alone in the scorer's process, by replies as text: policy, critic and every reward bit for bit those of one process."""
    rewards = [{"name": kind, "model": str(encoder(kind))} for kind in KINDS]
    common: dict[str, Any] = {"rewards": rewards, "max_steps": 1, "response_length": 12, "learning_rate": 1e-2}
    beside = {"placement": "colocate", "learner": {"num_workers": 0, "num_threads": 1}}
    here, apart = ppo(split_job("here", **common, **beside), console), ppo(split_job("apart", **common), console)
    for name in ("adapter", "value"):
        assert equal(weights(apart, name), weights(here, name))
    assert any(bool(t.any()) for name, t in weights(apart).items() if "lora_B" in name), "it learned"
    found = [row for row in lasting_rows(apart) if "reward/bert" in row]
    assert found == [row for row in lasting_rows(here) if "reward/bert" in row]
    assert len({found[0][f"reward/{kind}"] for kind in KINDS}) == len(KINDS)


@pytest.mark.long
def test_in_a_pipeline(two_gpus: Any, split_job: Callable[..., PPOConfig], tmp_path: Path, console: Any) -> None:
    """The actors are placed before SFT and reward model, which they load, exist; the chain ends where one process ends."""
    asked = [f"Say something about number {i}." for i in range(40)]
    rows, pairs = tmp_path / "sft.jsonl", tmp_path / "pairs.jsonl"
    rows.write_text("".join(json.dumps({"instruction": a, "input": "", "output": "yes"}) + "\n" for a in asked))
    pairs.write_text(
        "".join(json.dumps({"user_input": a, "completion_a": "yes", "completion_b": "no"}) + "\n" for a in asked)
    )
    fields = split_job("x").model_dump(exclude_unset=True)
    shared = ("model_name_or_path", "template", "report_to", "learner")
    ppo_fields = {k: v for k, v in fields.items() if k not in (*shared, "output_dir", "rewards", "lora")}
    ppo_fields["allow_chance_rewards"] = True
    small = {"train_batch_size": 8, "per_device_train_batch_size": 8, "max_steps": 2, "max_length": 96}
    lora = {"lora": {"r": 4, "lora_alpha": 8}}

    def chain(name: str, **changes: Any) -> Path:
        job = {
            "output_dir": str(tmp_path / name),
            "stages": ["sft", "reward", "ppo"],
            **{k: fields[k] for k in shared},
            "sft": {"data": {"train": str(rows)}, "learning_rate": 1e-2, **lora, **small},
            "reward": {"data": {"train": str(pairs)}, "learning_rate": 1e-2, **small},
            "ppo": ppo_fields,
        }
        return Path(pipeline(PipelineConfig(**{**job, **changes}), console).run_dir)

    alone = {"num_workers": 0, "num_threads": 1}
    here = chain("here", learner=alone, ppo={**ppo_fields, "placement": "colocate"})
    apart = chain("apart")
    for file in ("ppo/adapter/adapter_model.safetensors", "ppo/value/adapter_model.safetensors"):
        assert sha256_file(apart / file) == sha256_file(here / file)
    assert "generator 1: 3 chunks" in (apart / "ppo" / "roles.log").read_text()
