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
from _common import RESULTS, data_folder, emit, parser, report, spread

from rlhf_ray.config import PPOConfig
from rlhf_ray.console import LocalConsole
from rlhf_ray.launch.launch import launch
from rlhf_ray.storage.files import atomic_write_json

HERE = Path(__file__).parent
CHUNK = 64
DECLARED_CPUS = 64
BUILDERS = {role: f"_control_plane:build_{role}" for role in ("generator", "scorer")}
NOTHING = "def score(prompts, completions, **columns):\n    return [0.0 for _ in completions]\n"
PHASES = ("rollout", "evaluate", "experience", "update", "publish", "checkpoint", "step")

ASSUMED: dict[str, Any] = {
    "model": "8B, bfloat16, LoRA r 16 on all linear layers",
    "adapter, bytes": 168e6,
    "rows per GPU and step": 64,
    "tokens per prompt": 512,
    "tokens per reply": 512,
    "share of GPUs that sample": 0.5,
    "share of GPUs that learn (the rest scores)": 0.375,
    "decode, tokens per second and GPU": 8_000,
    "update, tokens per second and GPU": 12_000,
    "evaluation, as a share of the update": 0.33,
    "GPUs per node": 8,
    "network, bytes per second and node": 12.5e9,
}
GPUS = (8, 64, 512)


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
        "learner_mib": case["learner_rss"] / 2**20,
    }


def overhead(case: dict[str, Any]) -> dict[str, float]:
    """Of an empty step with its checkpoint against the bare one, by part, and in seconds: the share of a step of one second."""
    seconds = {name: figure["median"] for name, figure in figures(case)["seconds"].items()}
    bare = statistics.median(case["bare"][1:])
    without = seconds["step"] - bare
    return {"bare": bare, "step": without, "checkpoint": seconds["checkpoint"], "all": without + seconds["checkpoint"]}


def slope(cases: dict[str, Any], phase: str) -> float:
    """Seconds of `phase` per unit of what the cases are named by, between the smallest and the largest."""
    small, large = min(cases, key=float), max(cases, key=float)
    at = [cases[name]["seconds"][phase]["median"] for name in (small, large)]
    return max((at[1] - at[0]) / (float(large) - float(small)), 0.0)


def costs_of(measured: dict[str, Any]) -> dict[str, float]:
    """Seconds per chunk, row and token, byte, from the tables."""
    rows, adapters = measured["rows"], measured["adapter_mb"]
    costs = {
        "second_per_chunk": slope(rows, "rollout") * CHUNK,
        "second_per_row_and_token": slope(rows, "experience") / (64 + 64),
        "second_per_gathered_byte": 0.0,
    }
    for case in measured["ranks"].values():
        alone = next(c for c in rows.values() if c["chunks"] == case["chunks"])
        more = [c["seconds"]["rollout"]["median"] for c in (case, alone)]
        costs["second_per_gathered_byte"] = max(more[0] - more[1], 0.0) / (
            case["chunks"] * CHUNK * bytes_of_a_row(64, 64)
        )
    for phase in ("publish", "checkpoint", "rollout"):
        costs[f"second_per_adapter_byte_{phase}"] = slope(adapters, phase) / 1e6
    return costs


def on_paper(measured: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a step on 8, 64 and 512 GPUs: what computes, and what it costs around."""
    costs, a = costs_of(measured), ASSUMED
    prompt, reply, adapter = a["tokens per prompt"], a["tokens per reply"], a["adapter, bytes"]
    found = {}
    for gpus in GPUS:
        count, nodes = gpus * a["rows per GPU and step"], -(-gpus // a["GPUs per node"])
        samplers, learners = (
            gpus * a[name] for name in ("share of GPUs that sample", "share of GPUs that learn (the rest scores)")
        )
        held = count * bytes_of_a_row(prompt, reply)
        beside = min(a["GPUs per node"], learners)
        wire = held * beside / a["network, bytes per second and node"] if nodes > 1 else 0.0
        updated = (1 + a["evaluation, as a share of the update"]) * count * (prompt + reply)
        found[str(gpus)] = {
            "decode": count * reply / (samplers * a["decode, tokens per second and GPU"]),
            "evaluation and update": updated / (learners * a["update, tokens per second and GPU"]),
            "chunks of each learner rank": costs["second_per_chunk"] * (count / CHUNK) / learners,
            "gather of all rows on every rank": costs["second_per_gathered_byte"] * held + wire,
            "shaping of all rows on every rank": costs["second_per_row_and_token"] * count * (prompt + reply),
            "publish": costs["second_per_adapter_byte_publish"] * adapter,
            "adapter to the generators' nodes": (
                nodes * adapter / a["network, bytes per second and node"] if nodes > 1 else 0.0
            ),
            "adapter loaded and hashed by a generator": costs["second_per_adapter_byte_rollout"] * adapter,
            "checkpoint, if each step has one": costs["second_per_adapter_byte_checkpoint"] * adapter,
        }
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
    options.add_argument(
        "--paper", action="store_true", help="measure nothing: the model on paper anew, in the result that is there"
    )
    arguments = options.parse_args()
    if arguments.paper:
        path = RESULTS / "control_plane.json"
        result = json.loads(path.read_text())
        result["measured"]["on_paper"] = on_paper(result["measured"])
        atomic_write_json(path, result)
        return
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
    }
    measured["on_paper"] = on_paper(measured)
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
