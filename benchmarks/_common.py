"""What all benchmarks share: the machine, interleaved repeats, median and spread, and one JSON report.

A report reads the same whatever was measured:

    {"benchmark": ..., "machine": {...}, "versions": {...}, "commit": ..., "settings": {...}, "repeats": N, "measured": {...}}

where every measured figure is {"median", "min", "max", "values"}.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf_ray.storage.files import atomic_write_json
from rlhf_ray.storage.run_folder import git_commit, versions

RESULTS = Path(__file__).parent / "results"


def machine(threads: int) -> dict[str, Any]:
    """Processor, usable cores, threads asked for, memory in GiB, system and accelerators."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": round(os.getloadavg()[0], 2),
        "gpus": gpus,
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@dataclass(frozen=True)
class Timing:
    """One run. wall, cpu: seconds; cpu sums all threads of this process, and other processes disturb it less."""

    wall: float
    cpu: float


def interleaved(cases: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 1) -> dict[str, list[Timing]]:
    """Time the cases in turn, A B A B ..., so that whatever else the machine does meets all of them alike."""
    timings: dict[str, list[Timing]] = {name: [] for name in cases}
    for repeat in range(warmup + repeats):
        for name, case in cases.items():
            wall, cpu = time.perf_counter(), time.process_time()
            case()
            timing = Timing(time.perf_counter() - wall, time.process_time() - cpu)
            if repeat >= warmup:
                timings[name].append(timing)
            print(f"{name}: {timing.wall:.2f} s{'' if repeat >= warmup else ' (warm-up)'}", file=sys.stderr, flush=True)
    return timings


def spread(values: Sequence[float]) -> dict[str, Any]:
    """{"median", "min", "max", "values"}, to four significant digits."""

    def short(value: float) -> float:
        return float(f"{value:.4g}")

    return {
        "median": short(statistics.median(values)),
        "min": short(min(values)),
        "max": short(max(values)),
        "values": [short(v) for v in values],
    }


def report(
    benchmark: str, settings: Mapping[str, Any], measured: Mapping[str, Any], repeats: int, threads: int
) -> dict[str, Any]:
    return {
        "benchmark": benchmark,
        "machine": machine(threads),
        "versions": versions(),
        "commit": git_commit(),
        "settings": dict(settings),
        "repeats": repeats,
        "measured": dict(measured),
    }


def parser(description: str | None, repeats: int, threads: int) -> argparse.ArgumentParser:
    """Options of every benchmark. `--output` without a file name writes benchmarks/results/<benchmark>.json."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--threads", type=int, default=threads, help=f"torch threads (default {threads})")
    options.add_argument("--repeats", type=int, default=repeats, help=f"timed runs of each case (default {repeats})")
    options.add_argument("--output", nargs="?", const="", help="also write the report to this file")
    return options


def data_folder() -> Path:
    """Where the shared real models and data are. Ends the program, saying so, where they are not."""
    folder = Path(os.environ.get("RLHF_RAY_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not (folder / "models").is_dir():
        sys.exit(f"no shared data at {folder}; set RLHF_RAY_DATA")
    return folder


def emit(result: Mapping[str, Any], output: str | None) -> None:
    """Print the report on stdout and, if asked, write it."""
    print(json.dumps(result, indent=2))
    if output is not None:
        path = Path(output) if output else RESULTS / f"{result['benchmark']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(path, dict(result))
