"""Two replicas under Ray Serve: what it gains that requests go to the replica that has their adapter; and one replica beside them.

    python benchmarks/serve_replicas.py --seconds 40 --output

Registry, clients and Zipf's law as in serve_many_adapters.py, but the replicas are Serve deployments in processes of their own, of
one thread each. Clients ask through a Serve handle, as the service's API process does, and wait for whole replies. All services are
up at once and are loaded in turn: one replica; two with the service's router (affinity.py); two with Serve's own router, which
takes the less busy one of two at random and knows nothing of adapters. A turn begins with what the one before has left in memory;
the first one of each is a warm-up and is not counted.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import ray
import torch
from _common import data_folder, emit, parser, report, spread
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from serve_load import make_model
from serve_many_adapters import RANKS, ROWS, TOKENS, Counted, Registry, plain_backbone

from rlhf_ray.config.load import load_dict
from rlhf_ray.config.resolved import to_dict
from rlhf_ray.config.serve import ServeConfig
from rlhf_ray.serve.generation import Event, GenerationRequest

HERE = Path(__file__).parent
CASES = {"one replica": (1, True), "two, affinity": (2, True), "two, Serve's router": (2, False)}


@serve.deployment(name="Engine")
class Engine:
    """A replica that says what it has counted."""

    async def __init__(self, values: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        from rlhf_ray.serve.replica import Replica

        name = serve.get_replica_context().replica_id.unique_id
        self.replica = Replica(load_dict(ServeConfig, values, "serve job"), name, Counted())
        await self.replica.start()

    async def complete(self, request: GenerationRequest) -> list[Event]:
        return [event async for events in self.replica.events(request, whole=True) for event in events]

    async def __del__(self) -> None:
        await self.replica.close()

    async def counted(self) -> tuple[int, dict[tuple[str, ...], int]]:
        return os.getpid(), dict(self.replica.metrics.counts)  # type: ignore[attr-defined]


def start(case: str, config: ServeConfig, slack: float) -> DeploymentHandle:
    count, by_adapter = CASES[case]
    options: dict[str, Any] = {
        "num_replicas": count,
        "ray_actor_options": {"num_cpus": 0.1},
        "max_ongoing_requests": 4 * ROWS,
    }
    if by_adapter:
        options["request_router_config"] = RequestRouterConfig(
            request_router_class="rlhf_ray.serve.affinity:AffinityRouter",  # type: ignore[arg-type]  # imported from this
            request_router_kwargs={"slack": slack},
        )
    name = case.replace(", ", "-").replace(" ", "-").replace("'", "")
    values = to_dict(config) | {"output_dir": str(Path(config.output_dir) / name)}
    application = Engine.options(**options).bind(values)  # type: ignore[attr-defined]  # what the decorator makes of it
    return serve.run(application, name=name, route_prefix=None)


async def counted(handle: DeploymentHandle, replicas: int) -> Counter[tuple[str, ...]]:
    """Of all replicas together. A handle asks one of them; so ask until all have answered."""
    found: dict[int, Counter[tuple[str, ...]]] = {}
    while len(found) < replicas:
        pid, counts = await handle.counted.remote()
        found[pid] = Counter(counts)
    return sum(found.values(), Counter())


async def load(handle: DeploymentHandle, replicas: int, names: list[str], options: Any, seed: int) -> dict[str, float]:
    weights = [1 / (i + 1) for i in range(len(names))]
    took: list[float] = []
    errors, until = 0, time.perf_counter() + options.seconds
    before = await counted(handle, replicas)

    async def client(number: int) -> None:
        nonlocal errors
        draw = random.Random(1000 * seed + number)
        while time.perf_counter() < until:
            (name,) = draw.choices(names, weights)
            prompt = {"text": f"Once upon a time {draw.randrange(1000)}"}
            request = GenerationRequest((name,), (prompt,), max_tokens=TOKENS, seed=draw.randrange(2**31))
            sent = time.perf_counter()
            events = await handle.complete.remote(request)
            errors += any("error" in event for event in events)
            took.append(time.perf_counter() - sent)

    began = time.perf_counter()
    await asyncio.gather(*(client(i) for i in range(options.clients)))
    seconds = time.perf_counter() - began
    counts = await counted(handle, replicas)
    counts.subtract(before)
    lookups = sum(n for key, n in counts.items() if key[0] == "adapter_lookups")
    took.sort()
    return {
        "replies_per_second": len(took) / seconds,
        "reply_p50": took[len(took) // 2],
        "reply_p99": took[int(len(took) * 0.99)],
        "hit_rate": counts["adapter_lookups", "device"] / max(lookups, 1),
        "read_from_disk": counts["adapter_lookups", "disk"] / max(lookups, 1),
        "errors": float(errors),
    }


def measure(options: Any, folder: Path) -> dict[str, Any]:
    base = data_folder() / "models" / "stories260K" if options.model == "stories260k" else make_model(folder / "base")
    registry = Registry(folder / f"many_{options.model}", plain_backbone(base))
    names = [f"ad{i:04d}" for i in range(options.adapters)]
    registry.ensure(names, len(names))
    config = ServeConfig(
        output_dir=str(folder / "replicas"),
        model_name_or_path=str(base),
        registry=str(registry.folder),
        template="none",
        replicas={"num_threads": 1},  # type: ignore[arg-type]
        limits={  # type: ignore[arg-type]
            "max_batch_rows": ROWS,
            "max_loaded_adapters": options.loaded,
            "max_host_adapter_bytes": options.host_mib << 20,
        },
    )
    ray.init(
        include_dashboard=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}},
    )
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        handles = {case: start(case, config, options.slack) for case in CASES}
        figures: dict[str, dict[str, list[float]]] = {case: {} for case in CASES}
        for turn in range(options.repeats + 1):
            for case, handle in handles.items():
                found = asyncio.run(load(handle, CASES[case][0], names, options, turn))
                print(case, {k: round(v, 4) for k, v in found.items()}, file=sys.stderr, flush=True)
                for figure, value in found.items() if turn else ():
                    figures[case].setdefault(figure, []).append(value)
    finally:
        serve.shutdown()
        ray.shutdown()
    with_it, without = (figures[case]["replies_per_second"] for case in ("two, affinity", "two, Serve's router"))
    return {
        "replies_with_affinity_against_without": spread([a / b for a, b in zip(with_it, without)]),
        **{case: {figure: spread(values) for figure, values in by.items()} for case, by in figures.items()},
    }


def main() -> None:
    options = parser(__doc__, repeats=2, threads=1)
    options.add_argument("--model", choices=("stories260k", "6m"), default="stories260k")
    options.add_argument("--adapters", type=int, default=1000)
    options.add_argument("--loaded", type=int, default=128, help="limits.max_loaded_adapters, of each replica")
    options.add_argument("--host-mib", type=int, default=64, help="limits.max_host_adapter_bytes of each replica, MiB")
    options.add_argument("--slack", type=float, default=8.0, help="replicas.affinity_slack")
    options.add_argument("--clients", type=int, default=16)
    options.add_argument("--seconds", type=float, default=40.0, help="of each turn")
    options.add_argument("--folder", type=Path, help="where the registry is kept for the next run")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(chosen, chosen.folder or Path(folder))
    names = ("model", "adapters", "loaded", "host_mib", "slack", "clients", "seconds")
    settings = {name: getattr(chosen, name) for name in names} | {"ranks": RANKS, "tokens": TOKENS, "rows": ROWS}
    emit(report(f"serve_replicas_{chosen.model}", settings, measured, chosen.repeats, chosen.threads), chosen.output)


if __name__ == "__main__":
    main()
