"""`plan` against a run: a random Llama of 134 million parameters takes what was said, phase by phase."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.long, pytest.mark.bitsandbytes]

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "plan_memory.py"


def test_measured_peaks_are_within_15_percent_of_the_plan() -> None:
    command = [sys.executable, str(BENCHMARK), "--repeats", "1", "--cases", "A_qv"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads(done.stdout)["measured"]
    ratios = {name: m["median"] for name, m in measured.items() if name.endswith("_planned_over_measured")}
    assert len(ratios) == 4 and all(0.85 < ratio < 1.15 for ratio in ratios.values()), ratios
