"""Five hundred steps: nothing grows."""

from __future__ import annotations

import os
import statistics
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.metrics import read_metrics

pytestmark = [pytest.mark.integration, pytest.mark.long]

STEPS, FROM = 500, 100
SLOPE_MB = 0.02
PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 2**20


def resident_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_MB


def test_memory_and_open_files_stay_flat(world: Any, note: Any, until: Any) -> None:
    """Fault 30. Slope of resident memory over steps 100 to 500, by least squares; open files at its ends."""
    small = {"max_steps": STEPS, "eval_steps": 100, "save_steps": 10, "rollout_batch_size": 8, "learning_rate": 1e-5}
    child = world.start("ppo", world.job("soak", **small, response_length=4), MALLOC_ARENA_MAX="2")
    log, seen = world.run("soak") / "metrics.jsonl", {}

    def look() -> bool:
        if child.process.exitcode is not None:
            return True
        try:
            step = max((int(r["step"]) for r in read_metrics(log)[-1:]), default=0) if log.exists() else 0
            if step not in seen:
                seen[step] = (resident_mb(child.pid), len(os.listdir(f"/proc/{child.pid}/fd")))
        except (OSError, ValueError, IndexError):
            pass
        return False

    until(look, 3000, child.text)
    assert child.wait() == 0, child.text
    later = {step: found for step, found in seen.items() if step >= FROM}
    slope = statistics.linear_regression(list(later), [mb for mb, _ in later.values()]).slope
    opened = [count for _, count in later.values()]
    files = [statistics.median(part) for part in (opened[:50], opened[-50:])]  # one more while a checkpoint is written
    print(f"{len(later)} looks, {slope:.4f} MB a step, {files} open files")
    note(30, abs(slope) < SLOPE_MB and files[0] == files[1], f"{slope:+.4f} MB a step, open files flat, one process")
