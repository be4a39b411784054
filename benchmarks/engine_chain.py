"""The PPO stage of the demo with its replies by vLLM, and by the builtin engine: true reward and KL of what is learnt, by seed.

    make demo; .venv-vllm/bin/python benchmarks/engine_chain.py runs/demo --output
    .venv-vllm/bin/python benchmarks/engine_chain.py runs/demo --seeds 1 --engines vllm --train-only    # one run at a time

Both start from the demo's SFT and reward runs, and follow its job; only `rollout.engine` differs. Runs that are done are not done
again. All policies are then scored in one evaluation, by greedy replies to the demo's held-out prompts.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from _common import emit, parser, report, spread

from rlhf_ray.config import EvaluateConfig
from rlhf_ray.config.load import load_any
from rlhf_ray.metrics import read_metrics
from rlhf_ray.stages.start import evaluate, ppo
from rlhf_ray.storage.run import Run

ENGINES = ("builtin", "vllm")
CACHE_GB = 0.25


def train(demo: Path, runs: Path, engine: str, seed: int, threads: int) -> Run:
    overrides = [
        f"output_dir={runs / f'{engine}_{seed}'}",
        f"seed={seed}",
        "resume=auto",
        f"learner={{num_workers: 0, num_threads: {threads}}}",
        f"rollout.engine={engine}",
        *([f"rollout.kv_cache_gb={CACHE_GB}"] if engine == "vllm" else []),
    ]
    _, job = load_any(demo / "jobs" / "ppo.yaml", overrides, "ppo")
    return ppo(job)  # type: ignore[arg-type]


def scored(demo: Path, runs: Path, names: list[str], threads: int) -> dict[str, float]:
    policies = [{"name": name, "policy": str(runs / name)} for name in names]
    sft = load_any(demo / "jobs" / "evaluate.yaml", (), "evaluate")[1].policies[1]  # type: ignore[union-attr]
    overrides = [
        f"output_dir={runs / ('scores_' + '_'.join(names))}",
        f"learner={{num_workers: 0, num_threads: {threads}}}",
    ]
    _, job = load_any(demo / "jobs" / "evaluate.yaml", overrides, "evaluate")
    job = EvaluateConfig(**{**job.model_dump(), "policies": [sft.model_dump(), *policies]})
    return dict(evaluate(job).metrics)


def summary(engine: str, seeds: list[int], found: dict[str, float], runs: Path) -> dict[str, Any]:
    def of(metric: str) -> dict[str, Any]:
        return spread([found[f"{metric}/{engine}_{seed}"] for seed in seeds])

    steps = [read_metrics(runs / f"{engine}_{seed}" / "metrics.jsonl")[1:] for seed in seeds]
    return {
        f"true_reward/{engine}": of("true_reward"),
        f"true_reward_se/{engine}": of("true_reward_se"),
        f"kl_k1_per_response/{engine}": of("kl_k1_per_response"),
        f"length/{engine}": of("length"),
        f"largest_probe_difference/{engine}": spread(
            [max(r["sampler/probe_difference"] for r in rows) for rows in steps]
        ),
        f"ratio_deviation/{engine}": spread(
            [max(r["ratio/first_minibatch_max_deviation"] for r in rows) for rows in steps]
        ),
        f"seconds_generate/{engine}": spread([sum(r["time/generate"] for r in rows) for rows in steps]),
    }


def main() -> None:
    options = parser(__doc__, repeats=1, threads=1)
    options.add_argument("demo", type=Path, help="folder of a finished demo")
    options.add_argument("--runs", type=Path, help="folder of the runs (default DEMO/engines)")
    options.add_argument("--seeds", default="0,1,2")
    options.add_argument("--engines", default=",".join(ENGINES))
    options.add_argument("--train-only", action="store_true")
    args = options.parse_args()
    seeds, engines = [int(s) for s in args.seeds.split(",")], args.engines.split(",")
    runs = (args.runs or args.demo / "engines").absolute()
    for seed in seeds:
        for engine in engines:  # in turn
            done = train(args.demo, runs, engine, seed, args.threads)
            print(f"{engine}, seed {seed}: {done.seconds:.0f} s", file=sys.stderr, flush=True)
    if args.train_only:
        return
    found = scored(args.demo, runs, [f"{engine}_{seed}" for engine in engines for seed in seeds], args.threads)
    measured = {key: value for engine in engines for key, value in summary(engine, seeds, found, runs).items()}
    gaps = [found[f"true_reward/vllm_{seed}"] - found[f"true_reward/builtin_{seed}"] for seed in seeds]
    measured |= {"true_reward_gap/vllm": spread(gaps), "true_reward/sft": spread([found["true_reward/sft"]])}
    emit(report("engine_chain", {"seeds": seeds, "steps": 20}, measured, len(seeds), args.threads), args.output)


if __name__ == "__main__":
    main()
