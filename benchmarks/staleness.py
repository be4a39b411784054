"""What a rollout that is one update old costs in learning: max_staleness 0 against 1 on real input, the same seeds for both.

    python benchmarks/staleness.py --output

The job of stories_sentiment.py under placement split: a pretrained 260 k-parameter Llama learns to end stories happily (VADER).
For each seed: held-out mean compound of both, and their difference; then the mean difference and its standard error over seeds.
Seconds are not compared here: see placements.py.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from _common import data_folder, emit, parser, report, spread
from stories_sentiment import job

from rlhf_ray.config import PPOConfig
from rlhf_ray.console import LocalConsole
from rlhf_ray.maths.standard_errors import error_of_difference, error_of_mean, standard_error
from rlhf_ray.metrics import read_metrics
from rlhf_ray.stages.start import ppo

ROLE = {"num_actors": 1, "num_threads": 1, "num_cpus": 0.5}


def measure(data: Path, seed: int, steps: int, max_staleness: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as scratch:
        changes = {"placement": "split", "max_staleness": max_staleness, "generator": ROLE, "scorer": ROLE}
        learner = {"num_workers": 1, "num_threads": 1}
        fields = {**job(Path(scratch) / "run", data, seed, steps, 1).model_dump(), **changes, "learner": learner}
        run = ppo(PPOConfig(**fields), LocalConsole(quiet=True))
        rows = [row for row in read_metrics(Path(run.run_dir) / "metrics.jsonl") if row["step"] > 1]
    found = {name: run.metrics[name] for name in ("eval/reward", "eval/reward_se", "eval/kl_k1_per_response")}
    for name in ("sampler/staleness", "sampler/importance_weight", "sampler/importance_clipped"):
        if name in rows[0]:
            found[name] = statistics.fmean(row[name] for row in rows)
    print(f"seed {seed}, max_staleness {max_staleness}: {found}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    options = parser(__doc__, repeats=3, threads=1)
    options.add_argument("--steps", type=int, default=24, help="PPO steps of 128 replies (default 24)")
    arguments = options.parse_args()
    data = data_folder()
    runs: dict[int, list[dict[str, float]]] = {0: [], 1: []}
    for seed in range(arguments.repeats):
        for max_staleness, found in runs.items():
            found.append(measure(data, seed, arguments.steps, max_staleness))
    measured: dict[str, Any] = {
        f"max_staleness_{age}": {name: spread([run[name] for run in found]) for name in found[0]}
        for age, found in runs.items()
    }
    gaps = [late["eval/reward"] - fresh["eval/reward"] for fresh, late in zip(runs[0], runs[1])]
    name = "eval/reward_se"
    errors = [error_of_difference(late[name], fresh[name]) for fresh, late in zip(runs[0], runs[1])]
    measured["difference"] = spread(gaps)
    measured["mean_difference"] = statistics.fmean(gaps)
    measured["standard_error_over_seeds"] = standard_error(gaps)
    measured["standard_error_over_prompts"] = error_of_mean(errors)
    settings = {
        "model": "stories260K, 260,032 parameters, float32, CPU",
        "placement": "split: 1 learner, 1 generator, 1 scorer, 1 thread each",
        "steps": arguments.steps,
        "replies": 128,
        "seeds": arguments.repeats,
    }
    emit(report("staleness", settings, measured, arguments.repeats, arguments.threads), arguments.output)


if __name__ == "__main__":
    main()
