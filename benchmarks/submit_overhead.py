"""What submitting costs: time to the first PPO step and to the end, of one job file run here, and on a cluster of this machine.

    python benchmarks/submit_overhead.py --output

The job: PPO on stories260K with a length reward, 12 steps. Three ways, in turn: on a Ray that the job starts itself; submitted; and
submitted without asking the nodes first (--no-check). The cluster is one node that `cluster/local_nodes.sh` starts, with a token,
before the clock starts.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from _common import data_folder, emit, parser, report, spread

ROOT = Path(__file__).parents[1]
REWARD = "def score(prompts, completions, **columns):\n    return [float(len(text)) for text in completions]\n"
PORT, DASHBOARD, AGENT = "26379", "28265", "28365"
POLL_S = 0.05


def write_job(folder: Path, data: Path) -> None:
    (folder / "long.py").write_text(REWARD)
    job = {
        "output_dir": "replaced",
        "model_name_or_path": str(data / "models" / "stories260K"),
        "template": "none",
        "data": {"train": str(data / "prompts_tinystories.jsonl.gz"), "max_rows": 500},
        "rewards": [{"name": "long", "function": "long.py:score"}],
        "lora": {"r": 8, "lora_alpha": 16},
        "learner": {"num_workers": 1, "num_threads": 1},
        "report_to": [],
        "defaults_version": 1,  # as the results were measured
        **{"rollout_batch_size": 32, "num_mini_batches": 2, "per_device_train_batch_size": 16, "response_length": 32},
        **{"max_steps": 12, "eval_on_start": False},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(job))


def measure(folder: Path, name: str, words: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Seconds to the first step's metrics, and to the end of the command."""
    run = folder / name
    command = [sys.executable, "-m", "rlhf_ray.cli", *words, f"output_dir={run}"]
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    first = None
    metrics = run / "metrics.jsonl"
    while process.poll() is None:
        if first is None and metrics.is_file() and b'"step": 1,' in metrics.read_bytes():
            first = time.perf_counter() - started
        time.sleep(POLL_S)
    whole = time.perf_counter() - started
    if process.returncode or first is None:
        raise SystemExit(f"{name}: {process.stderr.read().decode()[-2000:] if process.stderr else ''}")
    return {"first_step": first, "whole": whole}


def main() -> None:
    arguments = parser(__doc__, repeats=3, threads=1).parse_args()
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment = kept | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}",
        "OMP_NUM_THREADS": "1",
    }
    runs: dict[str, list[dict[str, float]]] = {"here": [], "submitted": [], "submitted_unchecked": []}
    with tempfile.TemporaryDirectory(prefix="sub", dir="/tmp") as scratch:
        folder = Path(scratch)
        write_job(folder, data_folder())
        script = ["bash", str(ROOT / "cluster" / "local_nodes.sh")]
        nodes = environment | {
            "RLHF_RAY_CLUSTER": str(folder / "c"),
            "PORT": PORT,
            "DASHBOARD_PORT": DASHBOARD,
            "AGENT_PORT": AGENT,
        }
        nodes |= {"PYTHONPATH": str(ROOT)}
        subprocess.run([*script, "start", "1", "0"], env=nodes, check=True)
        try:
            there = environment | {"RAY_AUTH_TOKEN_PATH": str(folder / "c" / "token")}
            send = ["submit", "job.yaml", "--address", f"http://127.0.0.1:{DASHBOARD}"]
            for repeat in range(arguments.repeats):
                ways: dict[str, tuple[list[str], dict[str, str]]] = {
                    "here": (["ppo", "job.yaml"], environment | {"RAY_TMPDIR": str(folder / "own")}),
                    "submitted": (send, there),
                    "submitted_unchecked": ([*send, "--no-check"], there),
                }
                (folder / "own").mkdir(exist_ok=True)
                for name, (words, env) in ways.items():
                    runs[name].append(measure(folder, f"{name}-{repeat}", words, env))
                    print(f"{name}: {runs[name][-1]}", file=sys.stderr, flush=True)
        finally:
            subprocess.run([*script, "stop"], env=nodes, check=False)
    measured: dict[str, Any] = {
        f"{name}/{what}_seconds": spread([run[what] for run in found])
        for name, found in runs.items()
        for what in ("first_step", "whole")
    }
    settings = {"model": "stories260K, 260,032 parameters, float32, CPU", "steps": 12, "cluster": "one node, token"}
    emit(report("submit_overhead", settings, measured, arguments.repeats, 1), arguments.output)


if __name__ == "__main__":
    main()
