"""Five hundred steps: nothing grows."""

from __future__ import annotations

import contextlib
import os
import statistics
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.metrics import read_metrics

from .processes import SPLIT, family, steps

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


def memory(pid: int) -> dict[str, float]:
    """MB of a process: its own, and what it has touched of memory that is shared, as the object store's is."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {name: int(lines[f"Rss{name}"].split()[0]) / 1024 for name in ("Anon", "Shmem")}


OURS = ("driver", "ray::RayTrainWorker", "ray::RoleActor", "ray::TrainController")


def test_memory_of_all_processes_stays_flat_under_split(world: Any, note: Any, until: Any) -> None:
    """Fault 30 for driver, controller, learner, generator, scorer, and Ray's own processes: slopes over steps 100 to 500 of their
    own memory and of the object store's pages, open files."""
    small = {"max_steps": STEPS, "eval_steps": 100, "save_steps": 10, "rollout_batch_size": 8, "learning_rate": 1e-5}
    split = {**SPLIT, "generator": {"num_actors": 1, "num_gpus": 0.0, "num_threads": 1}}
    child = world.start("ppo", world.job("soak-split", **small, **split, response_length=4), MALLOC_ARENA_MAX="2")
    run = world.run("soak-split")
    seen: dict[str, dict[int, tuple[float, float, int]]] = {}
    last = -1

    def look() -> bool:
        nonlocal last
        if (step := steps(run)) == last or step < 0:
            return child.process.exitcode is not None
        last = step
        for pid, command in family(child.pid).items():
            name = "driver" if pid == child.pid else Path(command.split(" ")[0]).name
            with contextlib.suppress(OSError, KeyError, ValueError):
                found, files = memory(pid), len(os.listdir(f"/proc/{pid}/fd"))
                seen.setdefault(f"{name} {pid}", {})[step] = (found["Anon"], found["Shmem"], files)
        return child.process.exitcode is not None

    until(look, 3000, child.text)
    assert child.wait() == 0, child.text
    worst = 0.0
    for name, by_step in seen.items():
        later = {step: found for step, found in by_step.items() if step >= FROM}
        if len(later) < 50:
            continue
        slopes = [statistics.linear_regression(list(later), [f[i] for f in later.values()]).slope for i in (0, 1)]
        opened = [found[2] for found in later.values()]
        files = [statistics.median(part) for part in (opened[:50], opened[-50:])]
        print(f"{name:40} own {slopes[0]:+.4f}, shared {slopes[1]:+.4f} MB a step, open files {files}")
        worst = max(worst, *(abs(slope) for slope in slopes))
        assert abs(files[1] - files[0]) <= 1 or not name.startswith(OURS), name
    note(
        30,
        worst < SLOPE_MB,
        f"split: at most {worst:.4f} MB a step in any process, Ray's own included; object store and files flat",
    )
