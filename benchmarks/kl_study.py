"""The study of KL penalties: five penalties and none, two or three coefficients each, three seeds, compared at equal measured KL.

    python benchmarks/kl_study.py --demo runs/demo --output        (the bundled task, on the SFT and reward runs of a finished demo)
    python benchmarks/kl_study.py --output                         (stories260K, rewarded by VADER)

What is maximised is the held-out reward: of the bundled task its own rule, which PPO does not see. For each setting: mean and
spread over seeds of score, KL (k1, k3), length. Then, for each penalty, the score at a common KL, from its settings by
interpolation, since coefficients of different penalties do not mean the same.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from _common import data_folder, emit, parser, report
from stories_sentiment import job

from rlhf_ray.config import SweepConfig
from rlhf_ray.config.load import load
from rlhf_ray.console import LocalConsole
from rlhf_ray.sweep.sweep import sweep

COEFFICIENTS = {
    "tiny": {
        "kl": [0.05, 0.15, 0.5],
        "clamped_kl": [0.05, 0.15, 0.5],
        "bregman": [0.1, 0.7, 4.0],
        "jensen_shannon": [0.5, 2.0, 6.0],
        "squared_error": [0.1, 0.4, 1.5],
        "none": [0.0],
    },
    "stories": {
        "kl": [0.04, 0.2],
        "clamped_kl": [0.04, 0.2],
        "bregman": [0.1, 0.6],
        "jensen_shannon": [0.3, 1.5],
        "squared_error": [0.08, 0.4],
        "none": [0.0],
    },
}
STORIES = {"rollout_batch_size": 64, "num_mini_batches": 2, "max_steps": 16, "eval_steps": 8, "learning_rate": 2e-3}


def tiny(demo: Path, folder: Path) -> dict[str, Any]:
    """The demo's own sweep, with this study's coefficients."""
    config = load(SweepConfig, demo / "jobs" / "sweep.yaml")
    return {**config.model_dump(mode="json", exclude_unset=True), "output_dir": str(folder)}


def stories(data: Path, folder: Path) -> dict[str, Any]:
    """The job of stories_sentiment.py, shorter."""
    fields = job(folder, data, 0, 1, 1).model_dump(mode="json", exclude_unset=True)
    for name in ("output_dir", "seed", "learner", "kl_coef"):
        del fields[name]
    shared = {name: fields.pop(name) for name in ("model_name_or_path", "template", "report_to")}
    return {"output_dir": str(folder), **shared, "ppo": {**fields, **STORIES}}


def at_common_kl(settings: list[dict[str, Any]], level: float) -> float | None:
    """Score at KL `level`, between the two settings of a penalty whose mean KL lies below and above; None if none do."""
    points = sorted((s["kl_k1"], s["score"]) for s in settings)
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= level <= x1 and x1 > x0:
            return y0 + (y1 - y0) * (level - x0) / (x1 - x0)
    return None


def main() -> None:
    options = parser(__doc__, repeats=3, threads=1)
    options.add_argument("--demo", help="folder of a finished demo; without it the study is on stories260K")
    options.add_argument("--folder", help="keep the sweep here (it can be gone on with); default: a scratch folder")
    arguments = options.parse_args()
    which = "tiny" if arguments.demo else "stories"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(arguments.folder or scratch) / f"kl_study_{which}"
        values = tiny(Path(arguments.demo), folder) if arguments.demo else stories(data_folder(), folder)
        cases = {"given": "kl_penalty", "cases": COEFFICIENTS[which]}
        space = {"kl_penalty": list(COEFFICIENTS[which]), "kl_coef": cases}
        values |= {"seeds": list(range(arguments.repeats)), "space": space, "resume": "auto", "kl_cap": None}
        started = time.perf_counter()
        sweep(SweepConfig(**values), LocalConsole(file=sys.stderr))
        seconds = time.perf_counter() - started
        record = json.loads((folder / "sweep.json").read_text())
    settings = [{k: v for k, v in s.items() if k != "setting"} for s in record["settings"]]
    reached = [s["kl_k1"] for s in settings]
    level = round(sorted(reached)[len(reached) // 2], 1)
    common = {
        penalty: at_common_kl([s for s in settings if s["kl_penalty"] == penalty], level)
        for penalty in COEFFICIENTS[which]
        if penalty != "none"
    }
    measured = {
        "settings": settings,
        "choice": record["choice"],
        "common_kl": level,
        "score_at_common_kl": common,
        "seconds": round(seconds, 1),
    }
    told = {
        "model": "bundled Llama, 0.66 M parameters" if arguments.demo else "stories260K, 260,032 parameters",
        "metric": record["metric"],
        "dtype": "float32, CPU",
        "trials": len(record["trials"]),
        "steps": 12 if arguments.demo else STORIES["max_steps"],
        "replies": 64,
    }
    emit(report(f"kl_study_{which}", told, measured, arguments.repeats, arguments.threads), arguments.output)


if __name__ == "__main__":
    main()
