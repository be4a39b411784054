"""What a sweep costs, and what sharing a process gains: four trials as a sweep against the same four jobs as single commands.

    python benchmarks/sweep_overhead.py --output

The sweep runs its trials one after the other in one process (max_concurrent_trials 1); the baseline is four `rlhf-ray ppo`
commands in a row, without Ray. Then the sweep with as many trials at once as fit. On stories260K with the VADER reward; two steps
each, so that what is not training shows.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _common import data_folder, emit, parser, report, spread
from stories_sentiment import job

from rlhf_ray.config import SweepConfig
from rlhf_ray.config.resolved import dump_yaml

COEFFICIENTS = (0.01, 0.02, 0.04, 0.08)


def values(data: Path, folder: Path) -> dict[str, Any]:
    fields = job(folder, data, 0, 2, 1).model_dump(mode="json", exclude_unset=True)
    return {**fields, "rollout_batch_size": 64, "num_mini_batches": 2, "data": {**fields["data"], "eval_max_rows": 64}}


def command(stage: str, job_file: Path) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "rlhf_ray.cli", stage, str(job_file)], check=True, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def as_sweep(data: Path, scratch: Path, at_once: int | None) -> float:
    fields = values(data, scratch)
    for name in ("output_dir", "seed", "learner", "kl_coef"):
        del fields[name]
    shared = {name: fields.pop(name) for name in ("model_name_or_path", "template", "report_to")}
    whole = {**shared, "ppo": fields, "space": {"kl_coef": list(COEFFICIENTS)}, "max_concurrent_trials": at_once}
    config = SweepConfig(output_dir=str(scratch / "sweep"), **{k: v for k, v in whole.items() if v is not None})
    path = scratch / "sweep.yaml"
    path.write_text(dump_yaml(config.model_dump(mode="json", exclude_unset=True)))
    return command("sweep", path)


def as_commands(data: Path, scratch: Path) -> float:
    seconds = 0.0
    for coefficient in COEFFICIENTS:
        path = scratch / f"{coefficient}.yaml"
        path.write_text(dump_yaml({**values(data, scratch / str(coefficient)), "kl_coef": coefficient}))
        seconds += command("ppo", path)
    return seconds


def main() -> None:
    arguments = parser(__doc__, repeats=3, threads=1).parse_args()
    data = data_folder()
    cases = {
        "single commands": as_commands,
        "sweep, one at a time": lambda d, s: as_sweep(d, s, 1),
        "sweep": lambda d, s: as_sweep(d, s, None),
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(arguments.repeats):
        for name, case in cases.items():
            with tempfile.TemporaryDirectory() as scratch:
                seconds[name].append(case(data, Path(scratch)))
            print(f"{name}: {seconds[name][-1]:.1f} s", file=sys.stderr, flush=True)
    measured = {name: spread(found) for name, found in seconds.items()}
    settings = {"model": "stories260K, 260,032 parameters, float32, CPU", "trials": len(COEFFICIENTS), "steps": 2}
    emit(report("sweep_overhead", settings, measured, arguments.repeats, arguments.threads), arguments.output)


if __name__ == "__main__":
    main()
