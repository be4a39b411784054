"""What a PPO step costs beside its models: the real loop, collector, actors, checks and files around roles that compute nothing.

    python benchmarks/control_plane.py --output

Three sweeps, each step with its checkpoint, on a Ray of declared resources (64 CPUs) on this machine:

    actors     2 to 16 actors, half of them generators (a process each: more do not fit beside each other here)
    rows       256 to 65,536 replies a step of 64 + 64 tokens, in chunks of 64
    adapter    0.2 (that of the other benchmarks' model) to 500 MB

Reported per case: seconds by phase, medians over the steps after the first; calls of Ray by the learner and references looked at;
bytes of a chunk's messages; resident memory of the driver and the learner. "overhead" is the row against a bare loop:
an empty step of 256 replies and its checkpoint, less what the same roles take when they are called one after the other in one
process, without Ray, checks, metrics and files. In seconds it is the share of a step of one second.

`on_paper` is a model, no measurement: 8, 64 and 512 GPUs, from the costs per chunk, row and byte that were measured here and from
the assumptions that it lists.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
from _common import data_folder, emit, parser, report, spread

from rlhf_ray.config import PPOConfig
from rlhf_ray.console import LocalConsole
from rlhf_ray.launch.launch import launch

HERE = Path(__file__).parent
CHUNK = 64
DECLARED_CPUS = 64
BUILDERS = {role: f"_control_plane:build_{role}" for role in ("generator", "scorer")}
NOTHING = "def score(prompts, completions, **columns):\n    return [0.0 for _ in completions]\n"
PHASES = ("rollout", "evaluate", "experience", "update", "publish", "checkpoint", "step")

ASSUMED = {
    "model": "8B, bfloat16, LoRA r 16 on all linear layers: an adapter of 168 MB in float32",
    "rows per GPU and step": 64,
    "tokens per prompt, per reply": (512, 512),
    "share of GPUs that sample, that learn (the rest scores)": (0.5, 0.375),
    "decode, tokens per second and GPU": 8_000,
    "update and evaluation, tokens per second and GPU": 12_000,
    "passes of the update, the evaluation counted as a third": 1.33,
    "GPUs per node": 8,
    "network, bytes per second and node": 12.5e9,
    "checkpoint and adapter, bytes per second to disk": 1e9,
}
ADAPTER_BYTES = 168e6


def job(folder: Path, data: Path, actors: int, ranks: int) -> PPOConfig:
    """Half of the actors are generators."""
    (folder / "nothing.py").write_text(NOTHING)
    (folder / "prompts.jsonl").write_text('{"prompt": "nothing"}\n')
    each = {"num_actors": max(actors // 2, 1), "num_cpus": 0.5, "num_threads": 1}
    return PPOConfig(
        output_dir=str(folder / "run"),
        model_name_or_path=str(data / "models" / "stories260K"),
        template="none",
        template_date="2026-01-01",
        data={"train": str(folder / "prompts.jsonl")},
        rewards=[{"name": "nothing", "function": f"{folder / 'nothing.py'}:score"}],
        placement="split",
        generator=each,
        scorer=each,
        learner={"num_workers": ranks, "num_threads": 1},
        advantage_estimator="rloo",
        num_generations=2,
        rollout_batch_size=256,
        rollout_chunk_size=CHUNK,
        per_device_train_batch_size=CHUNK,
        num_ppo_epochs=1,
        num_mini_batches=4,
        response_length=64,
        eval_on_start=False,
        save_total_limit=1,
        report_to=[],
    )


def run_cases(data: Path, actors: int, ranks: int, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "cases.json").write_text(json.dumps(cases))
        launch("_control_plane:train", job(folder, data, actors, ranks), LocalConsole(quiet=True), BUILDERS)
        found: list[dict[str, Any]] = json.loads((folder / "run" / "found.json").read_text())
    for case in found:
        case["driver_rss"] = psutil.Process().memory_info().rss
        print(f"{actors} actors, {ranks} ranks, {told(case)}", file=sys.stderr, flush=True)
    return found


def seconds_of(case: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By phase, over the steps after the first."""
    steps = [phases | {"step": row["time/step"]} for phases, row in zip(case["phases"], case["metrics"])]
    found = {name: [s[name] for s in steps[1:] if name in s] for name in PHASES}
    found["checkpoint"] = [row["time/checkpoint"] for row in case["metrics"][1:]]  # told with the step after it
    return {name: spread(values) for name, values in found.items() if values}


def told(case: dict[str, Any]) -> str:
    seconds = {name: figure["median"] for name, figure in seconds_of(case).items()}
    return f"{case['rows']} rows, {case['adapter_mb']} MB: {seconds}, calls {case['calls']}"


def figures(case: dict[str, Any]) -> dict[str, Any]:
    steps = case["steps"]
    return {
        "seconds": seconds_of(case),
        "chunks": case["chunks"],
        "calls_per_step": {name: count / steps for name, count in case["calls"].items()},
        "bytes_per_chunk": case["sizes"],
        "driver_mib": case["driver_rss"] / 2**20,
        "learner_peak_mib": max(row["memory/process_peak"] for row in case["metrics"]) / 2**20,
    }


def overhead(case: dict[str, Any]) -> dict[str, float]:
    """Of an empty step with its checkpoint against the bare one, by part, and in seconds: the share of a step of one second."""
    seconds = {name: figure["median"] for name, figure in figures(case)["seconds"].items()}
    bare = statistics.median(case["bare"][1:])
    without = seconds["step"] - bare
    return {"bare": bare, "step": without, "checkpoint": seconds["checkpoint"], "all": without + seconds["checkpoint"]}


def slope(small: dict[str, Any], large: dict[str, Any], phase: str, by: str) -> float:
    """Seconds of `phase` per unit of `by`, between two cases."""
    at = [figures(c)["seconds"][phase]["median"] for c in (small, large)]
    return max((at[1] - at[0]) / (large[by] - small[by]), 0.0)


def on_paper(rows: list[dict[str, Any]], adapters: list[dict[str, Any]], ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds of a step on 8, 64 and 512 GPUs: what computes, and what it costs around."""
    small, large = rows[0], rows[-1]
    adapters = sorted(adapters, key=lambda case: case["adapter_mb"])
    learners_here = 1
    per_chunk = slope(small, large, "rollout", "chunks")
    per_row = slope(small, large, "experience", "rows") / (64 + 64)  # and reply token
    per_byte = {
        p: slope(adapters[0], adapters[-1], p, "adapter_mb") / 1e6 for p in ("publish", "checkpoint", "rollout")
    }
    gathered = 0.0
    if ranks:
        alone = next(c for c in rows if c["rows"] == ranks[0]["rows"])
        more = [figures(c)["seconds"]["rollout"]["median"] for c in (alone, ranks[0])]
        gathered = max(more[1] - more[0], 0.0) / ranks[0]["rows"] / bytes_of_a_row(64, 64)
    prompt, reply = ASSUMED["tokens per prompt, per reply"]  # type: ignore[misc]
    samples, learns = ASSUMED["share of GPUs that sample, that learn (the rest scores)"]  # type: ignore[misc]
    found = {}
    for gpus in (8, 64, 512):
        count, nodes, learners = gpus * 64, max(gpus // 8, 1), gpus * learns
        of_step = count * bytes_of_a_row(prompt, reply)
        wire = of_step * min(8, learners) / 12.5e9 if gpus > 8 else 0.0
        found[str(gpus)] = {
            "decode": count * reply / (gpus * samples * 8_000),
            "update": 1.33 * count * (prompt + reply) / (learners * 12_000),
            "chunks of each learner rank": per_chunk * (count / CHUNK) / (learners / learners_here),
            "gather of all rows on every rank": gathered * of_step + wire,
            "shaping of all rows on every rank": per_row * count * (prompt + reply),
            "publish": per_byte["publish"] * ADAPTER_BYTES,
            "adapter to the generators' nodes": nodes * ADAPTER_BYTES / 12.5e9 if nodes > 1 else 0.0,
            "adapter loaded and hashed by a generator": per_byte["rollout"] * ADAPTER_BYTES,
            "checkpoint": per_byte["checkpoint"] * ADAPTER_BYTES,
        }
    costs = {"second_per_chunk": per_chunk, "second_per_row_and_token": per_row, "second_per_gathered_byte": gathered}
    costs |= {f"second_per_adapter_byte_{name}": value for name, value in per_byte.items()}
    return {"assumed": ASSUMED, "measured_costs": costs, "seconds": found}


def bytes_of_a_row(prompt: int, reply: int) -> int:
    """Of rollout and scores: tokens i64, masks, log-probabilities of sampler and reference f32."""
    return 9 * (prompt + reply) + 8 * reply + 40


def main() -> None:
    import ray

    options = parser(__doc__, repeats=1, threads=1)
    options.add_argument(
        "--steps", type=int, default=4, help="of each case, the first of which does not count (default 4)"
    )
    options.add_argument("--actors", type=int, nargs="+", default=[2, 4, 16])
    options.add_argument("--rows", type=int, nargs="+", default=[256, 1024, 4096, 16384, 65536])
    options.add_argument("--adapters", type=float, nargs="+", default=[10, 0.2, 100, 500], help="MB")
    options.add_argument("--ranks", type=int, default=2, help="learner ranks of the last case, 1 for none (default 2)")
    arguments = options.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    os.environ.setdefault("RAY_worker_niceness", "0")
    data, steps = data_folder(), arguments.steps
    ray.init(num_cpus=DECLARED_CPUS, include_dashboard=False, log_to_driver=False, object_store_memory=2 * 10**9)

    def case(rows: int, megabytes: float) -> dict[str, Any]:
        takes_long = rows > 20_000 or megabytes > 200
        return {"rows": rows, "adapter_mb": megabytes, "steps": 2 if takes_long else steps}

    try:
        first = [case(arguments.rows[0], a) for a in arguments.adapters] + [case(r, 10) for r in arguments.rows[1:]]
        found = run_cases(data, 2, 1, first)
        adapters, rows = found[: len(arguments.adapters)], [found[0], *found[len(arguments.adapters) :]]
        by_actors = {2: next(c for c in rows if c["rows"] == min(4096, arguments.rows[-1]))}
        for actors in arguments.actors:
            if actors not in by_actors:
                by_actors[actors] = run_cases(data, actors, 1, [case(by_actors[2]["rows"], 10)])[0]
        ranks = [] if arguments.ranks < 2 else run_cases(data, 2, arguments.ranks, [case(by_actors[2]["rows"], 10)])
    finally:
        ray.shutdown()
    measured = {
        "rows": {str(c["rows"]): figures(c) for c in rows},
        "adapter_mb": {f"{c['adapter_mb']:g}": figures(c) for c in adapters},
        "actors": {str(n): figures(c) for n, c in by_actors.items()},
        "ranks": {str(arguments.ranks): figures(c) for c in ranks},
        "overhead": {f"{c['adapter_mb']:g}": overhead(c) for c in adapters},
        "on_paper": on_paper(rows, adapters, ranks),
    }
    settings = {
        "roles": "compute nothing; learner one thread, a process for each actor",
        "tokens": "64 + 64 per row",
        "chunk": CHUNK,
        "steps": steps,
        "cpus declared": DECLARED_CPUS,
    }
    emit(report("control_plane", settings, measured, arguments.repeats, arguments.threads), arguments.output)


if __name__ == "__main__":
    main()
