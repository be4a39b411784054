"""How long a user waits: from the command to the first PPO step in metrics.jsonl, and to the end of a run of one step.

    python benchmarks/start_time.py --output

The job of submit_overhead.py (stories260K, a length reward, 32 replies a step), cut to one step: on a Ray that it starts itself,
and without Ray (learner.num_workers 0). Interleaved. Nearly all of it is starting processes and importing torch and transformers.
The baseline is `import torch, transformers, peft, deepspeed`, which whoever trains a LoRA needs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _common import data_folder, emit, parser, report, spread
from submit_overhead import measure, write_job

BASELINE = "import torch, transformers, peft, deepspeed"


def baseline(environment: dict[str, str]) -> float:
    started = time.perf_counter()
    code = f"{BASELINE}; transformers.AutoModelForCausalLM, transformers.AutoTokenizer, peft.PeftModel"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    arguments = parser(__doc__, repeats=3, threads=1).parse_args()
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"OMP_NUM_THREADS": "1"}
    runs: dict[str, list[dict[str, float]]] = {"with Ray": [], "without Ray": []}
    imports: list[float] = []
    with tempfile.TemporaryDirectory(prefix="st", dir="/tmp") as scratch:
        folder = Path(scratch)
        write_job(folder, data_folder())
        (folder / "ray").mkdir()
        environment = kept | {"RAY_TMPDIR": str(folder / "ray")}
        baseline(environment)  # byte code and the file cache
        for repeat in range(arguments.repeats):
            imports.append(baseline(environment))
            for name, found in runs.items():
                words = ["ppo", "job.yaml", "max_steps=1", f"learner.num_workers={int(name == 'with Ray')}"]
                found.append(measure(folder, f"{name.split()[0]}-{repeat}", words, environment))
                print(f"{name}: {found[-1]}", file=sys.stderr, flush=True)
    measured = {
        f"{name}/{what}_seconds": spread([run[what] for run in found])
        for name, found in runs.items()
        for what in ("first_step", "whole")
    }
    settings = {"model": "stories260K, 260,032 parameters, float32, CPU", "steps": 1, "baseline": BASELINE}
    measured["baseline_seconds"] = spread(imports)
    emit(report("start_time", settings, measured, arguments.repeats, 1), arguments.output)


if __name__ == "__main__":
    main()
