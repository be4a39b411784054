"""Many adapters on one replica: loading them holds nobody up, and requests for more than there is room for wait for their turn."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.config.serve import ServeConfig
from rlhf_ray.models.adapter_files import read_adapter
from rlhf_ray.registry import Registry, follow
from rlhf_ray.serve import model_index, registry_watcher
from rlhf_ray.serve.adapter_cache import AdapterCache, CacheTooSmall
from rlhf_ray.serve.decode_thread import DecodeThread
from rlhf_ray.serve.generation import GenerationRequest
from rlhf_ray.serve.metrics import NoMetrics
from rlhf_ray.serve.replica import Replica

from .test_decode_thread import PlainCheckpoint, Sink, engine, request, sink  # noqa: F401  # fixtures
from .test_replica import PROMPT, generate, job, run  # noqa: F401


class Counted(NoMetrics):
    def __init__(self) -> None:
        self.counts: Counter[tuple[str, ...]] = Counter()

    def count(self, name: str, value: float = 1, **tags: str) -> None:
        self.counts[(name, *tags.values())] += int(value)


def reader(adapters: Callable[..., Path], seed: int, **fields: Any) -> Callable[[], PlainCheckpoint]:
    return lambda: PlainCheckpoint(read_adapter(adapters(seed, **fields)))


def write_names(registry: Path, count: int, alias_of: Callable[..., Any]) -> None:
    """`count` names with no adapters behind them."""
    for i in range(count):
        alias_of(f"name{i:04d}").write(registry / "aliases" / f"name{i:04d}.json")


def test_an_adapter_is_loaded_while_the_decode_thread_is_busy(
    engine: DecodeThread,  # noqa: F811
    adapters: Callable[..., Path],
) -> None:
    """Loading was a call on that thread: 2.9 s at 32 layers with many adapters loaded, in which nobody got a token."""
    hold = threading.Event()
    try:
        engine.call(lambda model: hold.wait(30))

        async def run() -> None:
            cache = AdapterCache[PlainCheckpoint](engine, 4)
            await asyncio.wait_for(asyncio.gather(*(cache.load(str(i), reader(adapters, i)) for i in range(4))), 20)
            assert len(engine.pool.names) == 4

        asyncio.run(run())
        assert not hold.is_set()
    finally:
        hold.set()


def test_a_burst_of_new_adapters_is_read_one_by_one(
    engine: DecodeThread,  # noqa: F811
    adapters: Callable[..., Path],
) -> None:
    """All at once, they took Python's lock from decoding together: steps of a third of a second."""
    reading, most = set[int](), list[int]()

    def read(seed: int) -> PlainCheckpoint:
        reading.add(seed)
        most.append(len(reading))
        time.sleep(0.02)
        checkpoint = PlainCheckpoint(read_adapter(adapters(seed)))
        reading.discard(seed)
        return checkpoint

    async def run() -> None:
        cache = AdapterCache[PlainCheckpoint](engine, 6)
        await asyncio.gather(*(cache.load(str(seed), partial(read, seed)) for seed in range(6)))

    asyncio.run(run())
    assert most == [1] * 6


def test_requests_for_more_adapters_than_there_is_room_for_all_come_to_their_turn(
    engine: DecodeThread,  # noqa: F811
    adapters: Callable[..., Path],
) -> None:
    """Each holds what it has while it waits for the rest: two of them would wait for each other for ever."""

    async def use(cache: AdapterCache[PlainCheckpoint], *seeds: int) -> None:
        async with cache.use_all({str(seed): reader(adapters, seed) for seed in seeds}) as cached:
            await asyncio.sleep(0.02)
            assert set(cached) == set(map(str, seeds)) and all(
                one.adapter_name in engine.pool for one in cached.values()
            )

    async def run() -> None:
        cache = AdapterCache[PlainCheckpoint](engine, 2)
        pairs = [(a, b) for a in range(4) for b in range(4) if a != b] * 2
        await asyncio.wait_for(asyncio.gather(*(use(cache, *pair) for pair in pairs)), 60)
        assert len(cache.keys()) <= 2
        with pytest.raises(CacheTooSmall):
            await use(cache, 0, 1, 2)
        assert all(one.users == 0 for one in cache._cached.values())

    asyncio.run(run())


def test_a_popular_adapter_does_not_keep_others_out_for_ever(
    engine: DecodeThread,  # noqa: F811
    adapters: Callable[..., Path],
) -> None:
    async def run() -> None:
        cache = AdapterCache[PlainCheckpoint](engine, 1)
        done = asyncio.Event()

        async def popular() -> None:
            while not done.is_set():
                async with cache.use("0", reader(adapters, 0)):
                    await asyncio.sleep(0.01)

        crowd = [asyncio.create_task(popular()) for _ in range(5)]  # it is never idle
        await asyncio.sleep(0.2)
        await asyncio.wait_for(cache.load("1", reader(adapters, 1)), 20)
        done.set()
        await asyncio.gather(*crowd)

    asyncio.run(run())


def test_a_large_adapter_takes_the_room_of_two_that_are_never_idle(
    engine: DecodeThread,  # noqa: F811
    adapters: Callable[..., Path],
) -> None:
    """The first one alone was kept from new requests: the large one waited until its time was up, and all others behind it."""
    size = engine.pool.pack(read_adapter(adapters(0))).nbytes

    async def run() -> None:
        cache = AdapterCache[PlainCheckpoint](engine, 8, 2 * size)
        done = asyncio.Event()

        async def popular(seed: int) -> None:
            while not done.is_set():
                async with cache.use(str(seed), reader(adapters, seed)):
                    await asyncio.sleep(0.02)

        crowd = [asyncio.create_task(popular(seed)) for seed in (0, 0, 0, 1, 1, 1)]
        await asyncio.sleep(0.2)
        try:
            await asyncio.wait_for(cache.load("large", reader(adapters, 9, r=8)), 10)
        finally:
            done.set()
            await asyncio.gather(*crowd)
        assert not any(one.leaving for one in cache._cached.values())

    asyncio.run(run())


@pytest.mark.parametrize("when", ["evicting", "adding"])
def test_a_request_that_is_cancelled_leaves_no_adapter_that_nobody_knows_of(
    engine: DecodeThread,  # noqa: F811
    adapters: Callable[..., Path],
    when: str,
) -> None:
    """What was to go stayed beside the model, what had come was never recorded: lost memory, until nothing fitted any more."""
    hold, begun = threading.Event(), threading.Event()

    async def run() -> None:
        cache = AdapterCache[PlainCheckpoint](engine, 1)
        await cache.load("0", reader(adapters, 0))
        if when == "evicting":
            engine.call(lambda model: (begun.set(), hold.wait(30)))
        else:
            add = engine.pool.add
            engine.pool.add = lambda *args: (begun.set(), hold.wait(30), add(*args))  # type: ignore[method-assign]
        leaving = asyncio.create_task(cache.load("1", reader(adapters, 1)))
        await asyncio.to_thread(begun.wait, 20)
        while when == "evicting" and not cache.evictions:
            await asyncio.sleep(0.01)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(leaving, 5)
        following = asyncio.create_task(cache.load("2", reader(adapters, 2)))
        await asyncio.sleep(0.1)
        hold.set()
        there = await asyncio.wait_for(following, 20)
        assert [*engine.pool.names] == [there.adapter_name] and cache.keys() == ["2"]

    try:
        asyncio.run(run())
    finally:
        hold.set()


def test_tiers_have_budgets_in_bytes_and_are_counted(
    engine: DecodeThread,  # noqa: F811
    adapters: Callable[..., Path],
) -> None:
    """adapter_loads and adapter_evictions were declared and never counted."""
    size = engine.pool.pack(read_adapter(adapters(0))).nbytes
    reads: Counter[int] = Counter()

    def read(seed: int, r: int = 4) -> PlainCheckpoint:
        reads[seed] += 1
        return PlainCheckpoint(read_adapter(adapters(seed, r=r)))

    async def run() -> None:
        metrics = Counted()
        cache = AdapterCache[PlainCheckpoint](engine, 8, 2 * size, 3 * size, metrics)
        for seed in (0, 1, 2, 3, 2, 0):
            await cache.load(str(seed), partial(read, seed))
        # 0 1 2 3 read; 2 is on the device; 0 has left the host's memory by then
        assert reads == {0: 2, 1: 1, 2: 1, 3: 1} and cache.keys() == ["2", "0"]
        await cache.load("3", partial(read, 3))  # from the host's memory
        assert reads[3] == 1 and cache.nbytes == 2 * size and cache.host_used == 3 * size
        assert metrics.counts == {
            ("adapter_lookups", "disk"): 5,
            ("adapter_lookups", "device"): 1,
            ("adapter_lookups", "host"): 1,
            ("adapter_loads",): 6,
            ("adapter_evictions",): 4,
        }
        await cache.load("big", partial(read, 9, r=8))  # as large as both places: the others go
        assert cache.keys() == ["big"]
        with pytest.raises(CacheTooSmall, match="bytes"):
            await cache.load("bigger", partial(read, 10, r=12))

    asyncio.run(run())


def test_ranks_share_a_batch(
    job: Callable[..., ServeConfig],  # noqa: F811
    adapters: Callable[..., Path],
) -> None:
    """Eight ranks and the base in one batch: every reply is the one that its adapter gives alone."""
    ranks = (1, 2, 3, 4, 8, 16, 32, 64)
    named = {f"r{r}": str(adapters(r, r=r)) for r in ranks}
    names = ("base", *named)

    async def body(replica: Replica) -> None:
        alone = [(await generate(replica, name, seed=5))["choices"][0]["text"] for name in names]
        together = await asyncio.gather(*(generate(replica, name, seed=5, n=2) for name in names))
        assert [found["choices"][0]["text"] for found in together] == alone and len(set(alone)) > 6

    run(job(adapters=named), body)


def test_a_comparison_of_more_models_than_places_is_400_and_a_busy_cache_is_waited_for(
    job: Callable[..., ServeConfig],  # noqa: F811
    adapters: Callable[..., Path],
) -> None:
    """Both were 429, the first for ever."""
    named = {f"m{seed}": str(adapters(seed)) for seed in range(3)}

    async def body(replica: Replica) -> None:
        error = (await generate(replica, "m0", "m1", "m2"))["error"]
        assert (error["status"], error["code"]) == (400, "too_many_models")
        found = await asyncio.gather(*(generate(replica, name, max_tokens=40) for name in [*named] * 4))
        assert all(one["error"] is None for one in found)

    run(job(adapters=named, limits={"max_loaded_adapters": 2}), body)


def test_a_start_reads_no_adapter_and_a_damaged_one_is_refused_at_its_first_request(
    job: Callable[..., ServeConfig],  # noqa: F811
    tiny_run: Callable[..., Path],
    base_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every adapter was read, hashed and put into the model: 62 s with 200 of them."""
    registry = Registry(tmp_path / "registry")
    source = str(tiny_run(tmp_path / "run", base_dir, seed=1))
    entries = [registry.promote(source, f"n{i}", force=True, reason="a test").entry for i in range(6)]
    weights = entries[2].path / "adapter_model.safetensors"
    os.chmod(weights, stat.S_IRUSR | stat.S_IWUSR)
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    monkeypatch.setattr("rlhf_ray.serve.model_index.RETRY_S", 1e6)

    async def body(replica: Replica) -> None:
        cache = replica.adapter_cache
        assert len(replica.model_index.live) == 6 and (cache.loads, cache.host_used) == (0, 0)
        assert (await generate(replica, "n1"))["error"] is None and cache.loads == 1
        error = (await generate(replica, "n2"))["error"]
        assert (error["status"], error["code"]) == (503, "adapter_refused")
        status = replica.watcher.status()
        assert "n2" not in status["live"] and "sha256" in status["refused"][entries[2].id]
        listed = await replica.models()
        await replica.watcher.poll()  # finds nothing new
        assert listed is await replica.models(), "made once for every change"
        assert {m["id"]: m.get("kind") for m in listed}["n1"] == "policy" and entries[2].id not in {
            m["id"] for m in listed
        }
        weights.write_bytes(whole)  # repaired: it is tried again after a while, without a change in the registry
        assert (await generate(replica, "n2"))["error"]["status"] == 503
        replica.model_index._retry_at[entries[2].id] = 0.0
        assert (await generate(replica, "n2"))["error"] is None and entries[2].id not in replica.model_index.refused

    run(job(registry=str(tmp_path / "registry")), body)


def test_six_large_requests_do_not_keep_a_small_one_out(job: Callable[..., ServeConfig]) -> None:  # noqa: F811
    """They took every place, so that everybody else got 429 until they were done."""

    async def body(replica: Replica) -> None:
        hold = threading.Event()
        replica.engine.call(lambda model: hold.wait(60))  # nobody is done before all are in
        large = [
            asyncio.create_task(generate(replica, "base", n=8, max_tokens=100, seed=i, key="large")) for i in range(6)
        ]
        try:
            async with asyncio.timeout(30):
                while replica.engine.running < 24:
                    await asyncio.sleep(0.01)
                waiting = asyncio.create_task(generate(replica, "base", max_tokens=4, key="small"))
                while replica.engine.running < 25 and not waiting.done():
                    await asyncio.sleep(0.01)
        finally:
            hold.set()
        small = await waiting
        assert small["error"] is None and not all(task.done() for task in large)
        done = sum(task.done() and task.result()["error"] is None for task in large)
        found = [one["error"] for one in await asyncio.gather(*large)]
        assert done <= 2 and None in found and all(error is None or error["status"] == 429 for error in found)
        assert not replica._claims

    run(job(limits={"max_batch_rows": 8, "max_waiting_rows": 16}), body)


def test_a_list_longer_than_the_places_is_queued(job: Callable[..., ServeConfig]) -> None:  # noqa: F811
    """It was a 400; its rows take turns with those of others."""

    async def body(replica: Replica) -> None:
        found: dict[int, Any] = {}
        prompts = tuple({"text": f"Name bird {i}."} for i in range(40))
        async for events in replica.events(GenerationRequest(("base",), prompts, max_tokens=3)):
            found |= {event["i"]: event["end"] for event in events if "end" in event}
        assert len(found) == 40

    run(job(limits={"max_batch_rows": 2, "max_waiting_rows": 2}), body)


def test_a_promotion_is_seen_within_a_second_at_many_names(
    job: Callable[..., ServeConfig],  # noqa: F811
    tiny_run: Callable[..., Path],
    base_dir: Path,
    tmp_path: Path,
    alias_of: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the next look: two of them a second."""
    registry = Registry(tmp_path / "registry")
    runs = [str(tiny_run(tmp_path / f"run{i}", base_dir, seed=i)) for i in range(2)]
    registry.promote(runs[0], "helper", force=True, reason="a test")
    write_names(tmp_path / "registry", 3000, alias_of)

    async def body(replica: Replica) -> None:
        await replica.watcher.know_all()
        assert len(replica.model_index.live) == 3001
        looks, look = [], replica.watcher._poll_some

        async def counted() -> Any:
            looks.append(1)
            return await look()

        monkeypatch.setattr(replica.watcher, "_poll_some", counted)
        await asyncio.to_thread(registry.promote, runs[1], "helper", force=True, reason="a test")
        before = len(looks)
        async with asyncio.timeout(60):
            while not replica.model_index.live["helper"].startswith("helper@v2"):
                await asyncio.sleep(0.01)
        assert len(looks) - before <= 1

    run(job(registry=str(tmp_path / "registry"), poll_interval_s=0.5), body)


def test_a_start_reads_a_few_of_many_names_and_what_a_request_names_before_the_rest(
    job: Callable[..., ServeConfig],  # noqa: F811
    tiny_run: Callable[..., Path],
    base_dir: Path,
    tmp_path: Path,
    alias_of: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The file of each of 10,000 names was read before the first answer: 3.3 s, against 0.16 s with three names."""
    registry = Registry(tmp_path / "registry")
    runs = [str(tiny_run(tmp_path / f"run{i}", base_dir, seed=i)) for i in range(2)]
    last = registry.promote(runs[0], "zz", force=True, reason="a test").entry
    write_names(tmp_path / "registry", 400, alias_of)
    monkeypatch.setattr(registry_watcher, "PAUSE_S", 1e6)  # the rest is read when the test says so

    async def body(replica: Replica) -> None:
        live, watcher = replica.model_index.live, replica.watcher
        assert len(live) == registry_watcher.AT_ONCE and watcher.status()["unread"] == 301
        assert (await generate(replica, "nobody"))["error"]["status"] == 404
        assert (await generate(replica, "zz"))["error"] is None and live["zz"] == last.id
        assert (await generate(replica, f"{last.id}"))["error"] is None
        assert len(live) == 2 * registry_watcher.AT_ONCE + 1, "another hundred beside it, no other name for it"
        await asyncio.to_thread(registry.promote, runs[1], "zz", force=True, reason="a test")
        monkeypatch.setattr(registry_watcher, "PAUSE_S", 0.0)
        monkeypatch.setattr(follow, "LOOK_S", 0.0)
        await watcher.poll()
        assert live["zz"].startswith("zz@v2") and len(live) == 401
        assert len(await replica.models()) == 1 + 401 + 402
        status = json.loads(watcher.status_file.read_text())
        assert status["unread"] == 0 and status["live"].keys() == live.keys()

    run(job(registry=str(tmp_path / "registry")), body)


@pytest.mark.parametrize("fault", ["too large", "no memory"])
def test_a_version_that_cannot_be_loaded_does_not_keep_other_names_back(
    job: Callable[..., ServeConfig],  # noqa: F811
    tiny_run: Callable[..., Path],
    base_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    """Every poll ended at it: what came behind was never served, and the status file told nothing."""
    registry = Registry(tmp_path / "registry")
    small, large, other = (str(tiny_run(tmp_path / f"run{i}", base_dir, seed=i, r=r)) for i, r in enumerate((4, 16, 4)))
    registry.promote(small, "helper", force=True, reason="a test")
    registry.promote(small, "other", force=True, reason="a test")
    size = sum(t.numel() * 4 for t in read_adapter(Path(small) / "adapter").tensors.values())
    monkeypatch.setattr(model_index, "RETRY_S", 0.2)

    async def body(replica: Replica) -> None:
        live, watcher = replica.model_index.live, replica.watcher
        assert (await generate(replica, "helper"))["error"] is None  # version 2 is put beside it
        bad = await asyncio.to_thread(registry.promote, large, "helper", force=True, reason="a test")
        pool, fails = replica.engine.pool, fault == "no memory"
        add = pool.add

        def failing(*given: Any) -> None:
            if fails:
                raise torch.OutOfMemoryError("no memory")
            add(*given)

        pool.add = failing  # type: ignore[method-assign]
        await asyncio.to_thread(registry.promote, other, "other", force=True, reason="a test")
        deadline = time.monotonic() + 20
        while json.loads(watcher.status_file.read_text())["live"]["other"]["version"] != 2:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
        assert live["helper"].startswith("helper@v1") and live["other"].startswith("other@v2")
        status = json.loads(watcher.status_file.read_text())
        assert list(status["refused"]) == [bad.entry.id] and status["live"]["other"]["version"] == 2
        if fails:
            fails = False
            deadline = time.monotonic() + 20
            while json.loads(watcher.status_file.read_text())["live"]["helper"]["version"] != 2:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)
        assert (await generate(replica, "other"))["error"] is None

    limits = {} if fault == "no memory" else {"max_adapter_bytes": 2 * size}
    run(job(registry=str(tmp_path / "registry"), poll_interval_s=0.1, limits=limits), body)


def test_a_client_that_goes_while_its_name_is_read_does_not_lose_the_name(
    job: Callable[..., ServeConfig],  # noqa: F811
    tiny_run: Callable[..., Path],
    base_dir: Path,
    tmp_path: Path,
    alias_of: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The follower had told of it once, to nobody: 404 until the name was promoted anew."""
    registry = Registry(tmp_path / "registry")
    registry.promote(str(tiny_run(tmp_path / "run", base_dir)), "zz", force=True, reason="a test")
    write_names(tmp_path / "registry", 2 * registry_watcher.AT_ONCE, alias_of)
    monkeypatch.setattr(registry_watcher, "PAUSE_S", 1e6)

    async def body(replica: Replica) -> None:
        begun, hold, stamp = threading.Event(), threading.Event(), Registry.stamp

        def slow(self: Registry, name: str) -> Any:
            begun.set()
            hold.wait(20)
            return stamp(self, name)

        await asyncio.sleep(0.5)  # the poll that follows the start
        monkeypatch.setattr(Registry, "stamp", slow)
        leaving = asyncio.create_task(generate(replica, "zz"))
        await asyncio.to_thread(begun.wait, 20)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        hold.set()
        assert (await generate(replica, "zz"))["error"] is None

    run(job(registry=str(tmp_path / "registry")), body)


def test_the_garbage_collector_does_not_walk_through_what_stays(job: Callable[..., ServeConfig]) -> None:  # noqa: F811
    """A full collection took a quarter of a second, in which nobody got a token."""

    async def body(replica: Replica) -> None:
        before, deadline = gc.get_freeze_count(), time.monotonic() + 20
        while id(replica.engine.sampler) in (seen := {id(found) for found in gc.get_objects()}):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        assert gc.get_freeze_count() > before and len(seen) < 0.1 * gc.get_freeze_count()

    gc.unfreeze()  # what the tests' own fixture has set aside
    run(job(), body)
