"""One PPO job under each placement: colocate, split, and split with max_staleness 1.

    python benchmarks/placements.py --output

On CPUs a role's own GPU is a thread of its own: colocate computes on two threads; under split a generator, a scorer and a learner
have one thread each, on the same two cores. For stories260K and for a random Llama of 6 M parameters: seconds per step, idle share
per role, bytes handed over, and the peak memory of each process. Runs are interleaved; the first step of each does not count.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from _common import data_folder, emit, parser, report, spread
from stories_sentiment import job
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rlhf_ray.config import PPOConfig
from rlhf_ray.console import LocalConsole
from rlhf_ray.metrics import read_metrics
from rlhf_ray.stages.start import ppo

ROLE = {"num_actors": 1, "num_threads": 1, "num_cpus": 0.5}
PLACEMENTS: dict[str, dict[str, Any]] = {
    "colocate": {"placement": "colocate", "learner": {"num_workers": 1, "num_threads": 2}},
    "split": {
        "placement": "split",
        "learner": {"num_workers": 1, "num_threads": 1},
        "generator": ROLE,
        "scorer": ROLE,
    },
}
PLACEMENTS["split, max_staleness 1"] = {**PLACEMENTS["split"], "max_staleness": 1}
SKIPPED = 1
ROWS = {"stories260K": 128, "random 6M": 64}
"""Replies a step."""
NAMES = (
    "time/step",
    "time/generate",
    "time/update",
    "time/idle_generator",
    "time/idle_scorer",
    "time/idle_learner",
    "time/publish",
    "sync/bytes",
    "memory/process_peak",
    "memory/generator_process_peak",
    "memory/scorer_process_peak",
)


def larger_model(data: Path, folder: Path) -> Path:
    """A random Llama of about 6 M parameters with the tokenizer of stories260K."""
    source = data / "models" / "stories260K"
    config = AutoConfig.from_pretrained(source)
    config.update(
        {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8, "num_attention_heads": 8, "head_dim": 32}
    )
    config.num_key_value_heads = 4
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def measure(data: Path, model: Path, placement: str, steps: int, replies: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as scratch:
        fields = job(Path(scratch) / "run", data, 0, steps + SKIPPED, 1).model_dump()
        own = {"model_name_or_path": str(model), "eval_on_start": False, "eval_steps": steps + SKIPPED}
        own |= {"rollout_batch_size": replies, "num_mini_batches": replies // 32}
        run = ppo(PPOConfig(**{**fields, **own, **PLACEMENTS[placement]}), LocalConsole(quiet=True))
        rows = [row for row in read_metrics(Path(run.run_dir) / "metrics.jsonl") if row["step"] > SKIPPED]
    found = {name: statistics.median(row[name] for row in rows) for name in NAMES if name in rows[0]}
    found = {name: max(row[name] for row in rows) if name.startswith("memory/") else v for name, v in found.items()}
    print(f"{model.name}, {placement}: {found['time/step']:.2f} s per step", file=sys.stderr, flush=True)
    return found


def main() -> None:
    options = parser(__doc__, repeats=3, threads=2)
    options.add_argument("--steps", type=int, default=5, help="steps that count (default 5)")
    arguments = options.parse_args()
    data = data_folder()
    with tempfile.TemporaryDirectory() as scratch:
        models = {
            "stories260K": data / "models" / "stories260K",
            "random 6M": larger_model(data, Path(scratch) / "random-6M"),
        }
        sizes = {
            name: sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(path).parameters())
            for name, path in models.items()
        }
        runs: dict[str, dict[str, list[dict[str, float]]]] = {m: {p: [] for p in PLACEMENTS} for m in models}
        for _ in range(arguments.repeats):
            for model, path in models.items():
                for placement in PLACEMENTS:
                    runs[model][placement].append(measure(data, path, placement, arguments.steps, ROWS[model]))
    measured = {
        model: {
            placement: {name: spread([run[name] for run in found]) for name in found[0]}
            for placement, found in placements.items()
        }
        for model, placements in runs.items()
    }
    settings = {
        "parameters": sizes,
        "dtype": "float32, CPU",
        "threads": "colocate 2; split 1 each for learner, generator and scorer, on 2 cores",
        "replies per step": ROWS,
        "response_length": 48,
        "steps": arguments.steps,
        "reward": "VADER (a Python function)",
    }
    emit(report("placements", settings, measured, arguments.repeats, arguments.threads), arguments.output)


if __name__ == "__main__":
    main()
