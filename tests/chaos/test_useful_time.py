"""How much of its time a run that is killed again and again spends on getting on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_ray.metrics import read_metrics

from .conftest import REWARD
from .processes import steps

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.long]
STEPS, EVERY = 30, 10
SHARE = 0.8


def command(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    """The program as a user starts it: a new interpreter that imports everything."""
    with open(folder / "said.txt", "ab") as said:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, "-m", "rlhf_ray.cli", *words], cwd=folder, stdout=said, stderr=said, env=env
        )


def test_a_kill_every_ten_steps(data_dir: Path, tmp_path: Path, note: Any, same: Any, until: Any) -> None:
    """Useful time: that of the steps which stay, over that of the run whole, from the first start of the program to its last end.

    It is killed (kill -9) a second into the step after every tenth one, and gone on with by `resume` at once; every start is whole.
    A real small model, stories260K, 128 replies a step."""
    (tmp_path / "mine.py").write_text(REWARD)
    prompts = [json.dumps({"prompt": f"Once upon a time {i}"}) for i in range(400)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(prompts) + "\n")
    fields = {
        "model_name_or_path": str(data_dir / "models" / "stories260K"),
        "template": "none",
        "data": {"train": "prompts.jsonl", "eval_max_rows": 8},
        "rewards": [{"name": "ascii", "function": "mine.py:score"}],
        "learner": {"num_workers": 0, "num_threads": 1},
        "rollout_batch_size": 128,
        "rollout_chunk_size": 64,
        "response_length": 128,
        "max_steps": STEPS,
        "save_steps": 1,
        "eval_steps": STEPS,
        "report_to": [],
    }
    took = {}
    for name, kills in (("plain", ()), ("killed", range(EVERY, STEPS, EVERY))):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**fields, "output_dir": f"runs/{name}"}))
        run, started = tmp_path / "runs" / name, time.monotonic()
        child = command(tmp_path, "ppo", f"{name}.yaml")
        for step in kills:
            until(lambda: steps(run) >= step or child.poll() is not None, 900)  # noqa: B023
            time.sleep(1.0)  # into the next one
            child.send_signal(signal.SIGKILL)
            child.wait()
            child = command(tmp_path, "resume", f"runs/{name}")
        assert child.wait(900) == 0, (tmp_path / "said.txt").read_text()
        took[name] = time.monotonic() - started
    rows = read_metrics(tmp_path / "runs" / "killed" / "metrics.jsonl")
    each = [row["time/step"] for row in rows if "time/step" in row]
    assert len(each) == STEPS
    share = sum(each) / took["killed"]
    figure = f"useful time {share:.0%} with a kill every {EVERY} steps of {sum(each) / STEPS:.1f} s"
    print(f"{figure}; the run that nobody touched took {took['plain']:.0f} s, this one {took['killed']:.0f} s")
    held = share >= SHARE and same(tmp_path / "runs" / "plain", tmp_path / "runs" / "killed")
    note(10, held, f"{figure} (stories260K, one CPU thread)")
