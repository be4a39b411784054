"""What a PPO job says of the prompts it shares with its reward models' training pairs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

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
    assert "45 of 45 training prompts are also in the training pairs of helpful" in said
    assert "will look too good" not in said

    run_command("reward", jobs["reward"], "sft=null", "lora.r=4", "data.held_out_fraction=0", "output_dir=runs/all")
    shutil.rmtree("runs/reward")
    Path("runs/all").rename("runs/reward")
    run_command("ppo", jobs["ppo"], "max_steps=1", "lora.r=4", "output_dir=runs/leaky")
    said = capfd.readouterr().err
    assert (
        "warning: 5 of 5 held-out prompts are in the training pairs of helpful: eval/reward will look too good" in said
    )

    (tmp_path / "pairs.jsonl").unlink()
    run_command("ppo", jobs["ppo"], "max_steps=1", "lora.r=4", "output_dir=runs/gone")
    assert "helpful: its training pairs can no longer be read: overlap unknown" in capfd.readouterr().err
