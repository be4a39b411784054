"""Ctrl-C while a Ray worker group trains."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_ray.storage.run_folder import open_run

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def test_it_ends_with_75_and_the_command_that_goes_on(jobs: dict[str, str], tmp_path: Path) -> None:
    """Ray Train's own handler would end the process with 1 and without a word."""
    words = ["sft", jobs["sft"], "learner.num_workers=1", "max_steps=100000", "save_steps=100000"]
    log = tmp_path / "said.txt"
    with open(log, "w") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "rlhf_ray.cli", *words],
            stderr=said,
            stdout=said,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        deadline = time.monotonic() + 180
        while "sft 1/100000" not in log.read_text() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        code = process.wait(timeout=120)
    text = log.read_text()
    assert code == 75, text
    assert re.search(
        r"error: runs/sft: SIGINT; step \d+ is saved; fix: rlhf-ray resume runs/sft$", text.splitlines()[-1]
    ), text
    saved, _ = open_run(tmp_path / "runs" / "sft", verify=False).newest_checkpoint()
    assert saved is not None and f"; step {saved.step} is saved; " in text.splitlines()[-1]
