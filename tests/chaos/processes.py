"""Jobs under Ray that a test kills parts of, and how it finds those parts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rlhf_ray.metrics import read_metrics

ONE: dict[str, Any] = {"learner": {"num_workers": 1, "num_threads": 1}}
SPLIT: dict[str, Any] = {
    **ONE,
    "placement": "split",
    "generator": {"num_actors": 2, "num_gpus": 0.0, "num_threads": 1, "timeout_s": 15.0},
    "scorer": {"num_gpus": 0.0, "num_threads": 1},
}
LOST = "warning: the learner group was lost; start 2, from the newest checkpoint"


def family(pid: int) -> dict[int, str]:
    """pid -> command of every living process that descends from `pid`, itself included."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            status = (entry / "stat").read_text().rpartition(")")[2].split()
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            continue
        if status[0] != "Z":
            parents[int(entry.name)], names[int(entry.name)] = int(status[1]), command
    found = {pid}
    while more := {p for p, parent in parents.items() if parent in found} - found:
        found |= more
    return {p: names[p] for p in found if p in names}


def of_ray(pid: int, word: str) -> int:
    """The process of this job's Ray whose command starts with ray::WORD."""
    (found,) = [p for p, name in family(pid).items() if name.startswith(f"ray::{word}")]
    return found


def alive(pids: set[int]) -> list[int]:
    return [p for p in pids if is_alive(p)]


def is_alive(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # gone, perhaps in this moment
        return False


def steps(run: Path) -> int:
    log = run / "metrics.jsonl"
    return max((int(r["step"]) for r in read_metrics(log)), default=-1) if log.exists() else -1


def actor(run: Path, name: str) -> int:
    """The process that roles.log tells last of an actor, as in `generator 0`."""
    return [int(pid) for pid in re.findall(rf"{name} .*?pid (\d+)", (run / "roles.log").read_text())][-1]
