"""What a run was trained on beside its prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config import DataConfig, PPOConfig
from rlhf_ray.config.resolved import to_dict
from rlhf_ray.data.load import load_ptx_rows, load_rows
from rlhf_ray.data.splits import is_held_out, prompt_hash
from rlhf_ray.errors import ConfigError
from rlhf_ray.storage.run_folder import create_run
from rlhf_ray.training.ancestry import check_ancestors


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """prompts: 60.  sft: an answer to each."""
    questions = [f"What is {i}?" for i in range(60)]
    prompts = [{"instruction": q, "input": ""} for q in questions]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    answers = [{**row, "output": "A number."} for row in prompts]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    return {name: str(tmp_path / f"{name}.jsonl") for name in ("prompts", "sft")}


def test_rows_of_ptx_data_ask_nothing_that_the_run_holds_out(files: dict[str, str]) -> None:
    """Also where ptx_data has a rule of its own, which holds out less or nothing."""
    held = load_rows(DataConfig(train=(files["prompts"],), held_out_fraction=0.2), "prompt", "ppo").held_out
    every = load_rows(DataConfig(train=(files["sft"],), held_out_fraction=0.0), "sft").train
    found = load_ptx_rows(DataConfig(train=(files["sft"],), held_out_fraction=0.0), held)
    assert held and [row for row in every if not is_held_out(prompt_hash(row.key), 0.2)] == list(found.train)
    assert f"{len(held)} of them ask what data holds out, and are left out" in found.summary


def test_rows_of_ptx_data_count_as_trained_on(files: dict[str, str], tmp_path: Path) -> None:
    """A stage that holds out what its ancestor's ptx_data trained on is refused, with both rules."""

    def ancestor(name: str, **changes: Any) -> list[tuple[str, str]]:
        (tmp_path / "few.jsonl").write_text(json.dumps({"instruction": "Another?", "input": ""}) + "\n")
        fields: dict[str, Any] = {"output_dir": str(tmp_path / name), "model_name_or_path": "base"}
        fields |= {"data": {"train": str(tmp_path / "few.jsonl")}, "rewards": [{"run": "r"}]}
        config = PPOConfig(**fields, **changes)
        create_run(config.output_dir, "ppo", to_dict(config), "never").update_manifest(held_out={})
        return [("sft", config.output_dir)]

    rows = load_rows(DataConfig(train=(files["prompts"],)), "prompt", "ppo")
    ptx = {"ptx_coef": 0.1, "ptx_data": {"train": files["sft"], "held_out_fraction": 0.0}}
    with pytest.raises(
        ConfigError, match=r"held out by data.held_out_fraction 0, this stage by data.held_out_fraction 0.1"
    ):
        check_ancestors(rows, ancestor("leaky", **ptx))
    assert check_ancestors(rows, ancestor("off", **{**ptx, "ptx_coef": 0.0})) == ([], [])
    same = {**ptx, "ptx_data": {"train": files["sft"]}}
    lines, warnings = check_ancestors(rows, ancestor("clean", **same))
    assert not warnings and f"{len(rows.train)} of {len(rows.train)} training prompts" in lines[0]
