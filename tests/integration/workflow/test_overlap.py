"""What a PPO job says of the prompts it shares with its reward models' training pairs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from rlhf_ray.config import DataConfig
from rlhf_ray.data.load import load_rows
from rlhf_ray.training.ancestry import check_ancestors

pytestmark = pytest.mark.integration


def test_shared_prompts_are_counted_and_leaks_are_warned_about(
    jobs: dict[str, str], run_command: Callable[..., None], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """F29: prompts held out by PPO, on which a reward model was trained because it held out nothing, are told."""
    fields = yaml.safe_load(Path(jobs["ppo"]).read_text())
    fields.pop("sft")
    Path(jobs["ppo"]).write_text(yaml.safe_dump(fields))
    run_command("reward", jobs["reward"], "sft=null", "lora.r=4")
    run_command("ppo", jobs["ppo"], "max_steps=1", "lora.r=4", "output_dir=runs/clean")
    said = capfd.readouterr().err
    assert "45 of 45 training prompts and 0 of 5 held-out prompts are training rows of reward:helpful" in said
    assert "will look too good" not in said

    run_command("reward", jobs["reward"], "sft=null", "lora.r=4", "data.held_out_fraction=0", "output_dir=runs/all")
    shutil.rmtree("runs/reward")
    Path("runs/all").rename("runs/reward")
    run_command("ppo", jobs["ppo"], "max_steps=1", "lora.r=4", "output_dir=runs/leaky", code=2)
    said = capfd.readouterr().err
    assert "held out by data.held_out_fraction 0, this stage by data.held_out_fraction 0.1: 5 of 5 held-out" in said
    assert not Path("runs/leaky").exists()
    rows = load_rows(
        DataConfig(train=(yaml.safe_load(Path(jobs["ppo"]).read_text())["data"]["train"],)), "prompt", "ppo"
    )
    _, warnings = check_ancestors(rows, [("reward:helpful", "runs/reward")], refuse=False)
    assert "were trained on by reward:helpful" in warnings[0], "a run that was begun before the rule can be finished"

    prompts = yaml.safe_load(Path(jobs["ppo"]).read_text())["data"]["train"]
    run_command("ppo", jobs["ppo"], "max_steps=1", "lora.r=4", "output_dir=runs/told", f"data.eval={prompts}")
    assert "were trained on by reward:helpful" in capfd.readouterr().err, (
        "files of one's own are evaluated all the same"
    )

    (tmp_path / "pairs.jsonl").unlink()
    run_command("ppo", jobs["ppo"], "max_steps=1", "lora.r=4", "output_dir=runs/gone")
    assert "reward:helpful: its training rows can no longer be read: overlap unknown" in capfd.readouterr().err


def test_what_an_ancestors_ancestor_trained_on_is_found(
    jobs: dict[str, str], run_command: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    """The reward model is clean; the SFT run that its adapter started from, and an evaluation through a checkpoint, are not."""
    run_command("sft", jobs["sft"], "data.held_out_fraction=0", "max_steps=1")
    capfd.readouterr()
    run_command("reward", jobs["reward"], code=2)
    assert "sft (" in (said := capfd.readouterr().err) and "data.held_out_fraction 0, this stage by" in said
    fields = {
        k: v for k, v in yaml.safe_load(Path(jobs["ppo"]).read_text()).items() if k in ("data", "learner", "report_to")
    }
    fields |= {"model_name_or_path": yaml.safe_load(Path(jobs["sft"]).read_text())["model_name_or_path"]}
    fields |= {"output_dir": "runs/evaluate", "policies": [{"name": "tuned", "policy": "runs/sft@1"}]}
    Path("evaluate.yaml").write_text(yaml.safe_dump({**fields, "template": "alpaca_short"}))
    run_command("evaluate", "evaluate.yaml", code=2)
    assert "policy:tuned (" in capfd.readouterr().err
