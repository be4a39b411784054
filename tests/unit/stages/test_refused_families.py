"""A model of a family that would be sampled or scored wrong is refused by every command, in one line, before anything is loaded:
the folder has no weights, so what is loaded would say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_ray.cli.app import main

BASE: dict[str, Any] = {"model_name_or_path": "base", "template": "none", "learner": {"num_workers": 1, "num_gpus": 0}}
ROWS = {"data": {"train": "rows.jsonl"}}
REWARDS = {"rewards": [{"function": "rewards.py:score"}]}
JOBS: dict[str, dict[str, Any]] = {
    "sft": ROWS,
    "reward": ROWS,
    "ppo": {**ROWS, **REWARDS},
    "evaluate": {**ROWS, **REWARDS, "policies": [{"name": "base", "policy": "base"}]},
    "pipeline": {"sft": ROWS, "reward": ROWS, "ppo": {**ROWS, **REWARDS}},
}
COMMANDS = {
    **{stage: [stage, "job.yaml"] for stage in JOBS},
    "plan": ["plan", "job.yaml"],
    "doctor": ["doctor", "--model", "base"],
    "serve": ["serve", "job.yaml"],
    "generate": ["generate", "--policy", "base", "--model", "base", "--instruction", "Name a bird."],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_loads_it(command, tmp_path: Path, monkeypatch, capsys):
    from transformers import AutoConfig

    monkeypatch.chdir(tmp_path)
    AutoConfig.for_model("rwkv", vocab_size=260, hidden_size=64, attention_hidden_size=64).save_pretrained("base")
    Path("rows.jsonl").write_text('{"instruction": "Name a bird.", "output": "Robin"}\n' * 4)
    Path("rewards.py").write_text("def score(completions, **kwargs):\n    return [0.0] * len(completions)\n")
    job = (
        {k: v for k, v in BASE.items() if k != "learner"}
        if command == "serve"
        else {**BASE, **JOBS.get(command, JOBS["ppo"])}
    )
    Path("job.yaml").write_text(yaml.safe_dump({"output_dir": "runs/out", **job}))
    assert main(COMMANDS[command]) == (3 if command == "doctor" else 2)
    told = capsys.readouterr()
    lines = [line for line in (told.out + told.err).splitlines() if "models of type rwkv cannot be used here" in line]
    assert len(lines) == 1, told
    assert "model_name_or_path" in lines[0] and "inside its own modules" in " ".join((told.out + told.err).split())
    assert not Path("runs/out").exists() or not list(Path("runs/out").rglob("*.safetensors"))
