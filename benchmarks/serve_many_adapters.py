"""A replica with a thousand adapters: replies a second against one adapter, hit rate, first tokens, stalls, start, promotions.

    python benchmarks/serve_many_adapters.py --adapters 1000 --seconds 60 --output

One replica without HTTP and Ray, in this process. The registry holds `adapters` real ones of ranks 4 to 64 on all linear layers,
and names without files behind them up to `names`; clients ask for adapters by Zipf's law (the k-th has 1/k of the first one's
share), one request after the other, and read the reply as it comes. Baselines, in the same run and in turn with it: the same
clients, all for the first adapter (rank 4); and all for five of them, one of each rank. A stall is the longest time between two
steps of the decode thread while replies wait for the second one; the start with all names is compared with one with three.
--folder keeps the registries for the next run. --busy says in the report that other work was on the machine.
Two replicas, and which of them gets a request: serve_replicas.py.
"""

from __future__ import annotations

import asyncio
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from _common import data_folder, emit, parser, report, spread
from serve_load import make_model

from rlhf_ray.config import LoraConfig
from rlhf_ray.config.serve import ServeConfig
from rlhf_ray.data.templates import load_template
from rlhf_ray.models.adapter_files import save_adapter
from rlhf_ray.models.adapters import adapter_config, adapter_tensors, wrap
from rlhf_ray.models.backbone import Backbone, load_in_float32
from rlhf_ray.registry.alias import Alias, read_alias
from rlhf_ray.registry.names import adapter_id
from rlhf_ray.serve.generation import GenerationRequest
from rlhf_ray.serve.metrics import NoMetrics
from rlhf_ray.serve.replica import Replica
from rlhf_ray.storage.checkpoints import SCHEMA
from rlhf_ray.storage.files import atomic_write_json, describe_files, sha256_file

RANKS, TOKENS, ROWS = (4, 8, 16, 32, 64), 32, 16


def plain_backbone(base: Path) -> Backbone:
    return load_in_float32(str(base))


class Counted(NoMetrics):
    def __init__(self) -> None:
        self.counts: Counter[tuple[str, ...]] = Counter()

    def count(self, name: str, value: float = 1, **tags: str) -> None:
        if name.startswith("adapter_"):
            self.counts[(name, *tags.values())] += int(value)


class Registry:
    """A registry on disk, written directly: a promotion would need a run for each adapter."""

    def __init__(self, folder: Path, backbone: Backbone) -> None:
        self.folder, self.backbone = folder, backbone
        (folder / "aliases").mkdir(parents=True, exist_ok=True)
        atomic_write_json(folder / "registry.json", {"schema": SCHEMA})
        self.base = {
            "path": backbone.identity.path,
            "weights_sha256": backbone.identity.weights_sha256,
            "config_sha256": backbone.identity.config_sha256,
        }
        self.kinds = {}
        for r in RANKS:
            model = wrap(self._plain(), LoraConfig(r=r, lora_alpha=2.0 * r), "x", seed=r)
            self.kinds[r] = adapter_config(model, "x"), adapter_tensors(model, "x")

    def _plain(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.backbone.identity.path)

    def ensure(self, names: list[str], total: int) -> None:
        """Adapters of these names, and names without files behind them up to `total`, as far as they are not there."""
        for i, name in enumerate(names):
            if not self._file(name).exists():
                self.promote(name, i)
        sha256 = "0" * 64
        for i in range(total - len(names)):
            name = f"name{i:05d}"
            if not self._file(name).exists():
                recorded = {"id": adapter_id(name, 1, sha256), "kind": "sft", "adapter_sha256": sha256}
                recorded |= {"base": self.base, "manifest_sha256": sha256}
                Alias(name, None, {1: recorded}).then("promote", 1).write(self._file(name))

    def _file(self, name: str) -> Path:
        return self.folder / "aliases" / f"{name}.json"

    def promote(self, name: str, seed: int) -> Alias:
        alias = read_alias(self._file(name), name) if self._file(name).exists() else Alias(name)
        version = alias.next_version()
        config, tensors = self.kinds[RANKS[seed % len(RANKS)]]
        draw = torch.Generator().manual_seed(seed)
        own = {k: torch.randn(t.shape, generator=draw) * 0.02 if "lora_B" in k else t for k, t in tensors.items()}
        made = self.folder / ".made"
        sha256 = save_adapter(made, own, config, "CAUSAL_LM", None, str(self.base["path"]))
        id = adapter_id(name, version, sha256)
        folder = self.folder / "adapters" / id
        folder.parent.mkdir(exist_ok=True)
        made.rename(folder)
        template = load_template("none")
        manifest = {
            "schema": SCHEMA,
            **{"id": id, "name": name, "version": version, "kind": "sft", "adapter": {"sha256": sha256}},
            "base": self.base,
            "tokenizer_sha256": self.backbone.identity.tokenizer_sha256,
            "template": {"name": template.name, "sha256": template.sha256, "content": {"kind": "none"}},
            "stop_token_ids": None,
            "source": {},
            "lineage": {},
        }
        atomic_write_json(folder / "manifest.json", {**manifest, "files": describe_files(folder)})
        recorded = {
            **{"id": id, "kind": "sft", "adapter_sha256": sha256, "base": self.base, "created": ""},
            "manifest_sha256": sha256_file(folder / "manifest.json"),
        }
        alias = Alias(name, alias.live, {**alias.versions, version: recorded}, alias.history).then("promote", version)
        alias.write(self._file(name))
        return alias


async def started(
    base: Path, registry: Path, output: Path, limits: dict[str, Any], threads: int
) -> tuple[Replica, float]:
    config = ServeConfig(
        output_dir=str(output),
        model_name_or_path=str(base),
        registry=str(registry),
        template="none",
        replicas={"num_threads": threads},  # type: ignore[arg-type]
        limits={"max_batch_rows": ROWS, "default_max_tokens": TOKENS, **limits},  # type: ignore[arg-type]
    )
    began = time.perf_counter()
    replica = Replica(config, metrics=Counted())
    await replica.start()
    return replica, time.perf_counter() - began


async def load(replica: Replica, names: list[str], clients: int, seconds: float, seed: int) -> dict[str, Any]:
    """Replies a second, first token in seconds, errors, and the longest stall."""
    weights = [1 / (i + 1) for i in range(len(names))]
    firsts: list[float] = []
    errors: Counter[str] = Counter()
    replica.engine.longest_step_s, replies, until = 0.0, 0, time.perf_counter() + seconds
    before = Counter(replica.metrics.counts)  # type: ignore[attr-defined]

    async def client(number: int) -> None:
        nonlocal replies
        draw = random.Random(1000 * seed + number)
        while time.perf_counter() < until:
            (name,) = draw.choices(names, weights)
            prompt = {"text": f"Once upon a time {draw.randrange(1000)}"}
            request = GenerationRequest((name,), (prompt,), max_tokens=TOKENS, seed=draw.randrange(2**31))
            sent, seen = time.perf_counter(), False
            async for events in replica.events(request):
                for event in events:
                    if "text" in event and not seen:
                        seen = True
                        firsts.append(time.perf_counter() - sent)
                    if "error" in event:
                        errors[event["error"]["code"]] += 1
                    replies += "end" in event

    began = time.perf_counter()
    await asyncio.gather(*(client(i) for i in range(clients)))
    took = time.perf_counter() - began
    counts = Counter(replica.metrics.counts) - before  # type: ignore[attr-defined]
    lookups = sum(n for key, n in counts.items() if key[0] == "adapter_lookups")
    firsts.sort()
    return {
        "replies_per_second": replies / took,
        "first_token_p50": firsts[len(firsts) // 2],
        "first_token_p99": firsts[int(len(firsts) * 0.99)],
        "longest_stall": replica.engine.longest_step_s,
        "hit_rate": counts["adapter_lookups", "device"] / max(lookups, 1),
        "read_from_disk": counts["adapter_lookups", "disk"] / max(lookups, 1),
        "errors": sum(errors.values()),
    }


async def promotion(registry: Registry, replica: Replica, name: str) -> float:
    """Seconds from the write of a new version until its name means it."""
    alias = await asyncio.to_thread(registry.promote, name, 10_001)
    began = time.perf_counter()
    while not replica.model_index.live[name].startswith(f"{name}@v{alias.live}-"):
        await asyncio.sleep(0.005)
    return time.perf_counter() - began


async def measure(options: Any, folder: Path) -> dict[str, Any]:
    base = data_folder() / "models" / "stories260K" if options.model == "stories260k" else make_model(folder / "base")
    backbone = plain_backbone(base)
    few, many = (Registry(folder / f"{kind}_{options.model}", backbone) for kind in ("few", "many"))
    names = [f"ad{i:04d}" for i in range(options.adapters)]
    few.ensure(names[:3], 3)
    many.ensure(names, options.names)
    limits = {"max_loaded_adapters": options.loaded, "max_host_adapter_bytes": options.host_mib << 20}
    starts: dict[str, list[float]] = {"few": [], "many": [], "known": []}
    for repeat in range(options.repeats + 1):  # the first one warms up
        for kind, registry in (("few", few), ("many", many)):
            replica, seconds = await started(base, registry.folder, folder / f"out_{kind}", limits, options.threads)
            began = time.perf_counter()
            if repeat:
                starts[kind].append(seconds)
                if kind == "many":
                    await replica.watcher.know_all()
                    starts["known"].append(seconds + time.perf_counter() - began)
            if (kind, repeat) != ("many", options.repeats):
                await replica.close()
    figures: dict[str, dict[str, list[float]]] = {"one": {}, "five": {}, "many": {}}
    for repeat in range(options.repeats):
        for kind, asked in (("one", names[:1]), ("five", names[:5]), ("many", names)):
            for figure, value in (await load(replica, asked, options.clients, options.seconds, repeat)).items():
                figures[kind].setdefault(figure, []).append(value)
            print(kind, {k: round(v[-1], 4) for k, v in figures[kind].items()}, file=sys.stderr, flush=True)
    seen = [await promotion(many, replica, name) for name in names[: options.repeats]]
    cache = replica.adapter_cache
    found = {
        "start_seconds_3": spread(starts["few"]),
        "start_seconds_all": spread(starts["many"]),
        "start_against_3": spread([m / f for m, f in zip(starts["many"], starts["few"])]),
        "all_names_read_seconds": spread(starts["known"]),
        "promotion_seen_seconds": spread(seen),
        "replies_against_one": spread(
            [m / o for m, o in zip(figures["many"]["replies_per_second"], figures["one"]["replies_per_second"])]
        ),
        **{f"{kind}_{figure}": spread(values) for kind, by in figures.items() for figure, values in by.items()},
        "device_adapter_mib": spread([cache.nbytes / 2**20]),
        "host_adapter_mib": spread([cache.host_used / 2**20]),
        "peak_rss_mib": spread([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]),
    }
    await replica.close()
    return found


def main() -> None:
    options = parser(__doc__, repeats=3, threads=2)
    options.add_argument("--model", choices=("stories260k", "6m"), default="stories260k")
    options.add_argument("--adapters", type=int, default=1000)
    options.add_argument(
        "--names", type=int, default=10_000, help="names in the registry, those of the adapters included"
    )
    options.add_argument("--loaded", type=int, default=256, help="limits.max_loaded_adapters")
    options.add_argument("--host-mib", type=int, default=1024, help="limits.max_host_adapter_bytes, MiB")
    options.add_argument("--clients", type=int, default=16)
    options.add_argument("--seconds", type=float, default=60.0, help="of each load")
    options.add_argument("--folder", type=Path, help="where registries are kept for the next run")
    options.add_argument("--busy", action="store_true", help="say that other work was on the machine")
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    with tempfile.TemporaryDirectory() as folder:
        measured = asyncio.run(measure(chosen, chosen.folder or Path(folder)))
    names = ("model", "adapters", "names", "loaded", "host_mib", "clients", "seconds")
    settings = {name: getattr(chosen, name) for name in names} | {"ranks": RANKS, "tokens": TOKENS, "rows": ROWS}
    if chosen.busy:
        settings["machine_was_busy"] = "other work ran on these cores at the same time"
    benchmark = f"serve_many_adapters_{chosen.model}"
    emit(report(benchmark, settings, measured, chosen.repeats, chosen.threads), chosen.output)


if __name__ == "__main__":
    main()
