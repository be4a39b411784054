"""The decode thread and its adapters: mixed batches say what separate passes say; nothing in use is ever evicted."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from rlhf_ray.errors import ArtifactError
from rlhf_ray.models.adapter_files import AdapterFiles, read_adapter
from rlhf_ray.models.adapters import wrap
from rlhf_ray.models.backbone import Backbone
from rlhf_ray.sampler.engine import Sampler
from rlhf_ray.sampler.requests import DecodeRequest
from rlhf_ray.serve.adapter_cache import AdapterCache, CacheBusy
from rlhf_ray.serve.decode_thread import DecodedToken, DecodeThread

from .conftest import load_tiny


class Sink:
    """Collects tokens by ticket; `wait` until a ticket is over."""

    def __init__(self) -> None:
        self.tokens: defaultdict[int, list[DecodedToken]] = defaultdict(list)
        self.changed = threading.Condition()

    def __call__(self, tokens: Sequence[DecodedToken]) -> None:
        with self.changed:
            for token in tokens:
                self.tokens[token.ticket].append(token)
            self.changed.notify_all()

    def wait(self, ticket: int, count: int | None = None) -> list[DecodedToken]:
        def over() -> bool:
            seen = self.tokens[ticket]
            return len(seen) >= count if count is not None else bool(seen) and seen[-1].end is not None

        with self.changed:
            assert self.changed.wait_for(over, timeout=60)
            return list(self.tokens[ticket])


@dataclass(frozen=True)
class Read:
    files: AdapterFiles

    def light(self) -> Read:
        return self


@pytest.fixture
def sink() -> Sink:
    return Sink()


@pytest.fixture
def engine(backbone: Backbone, sink: Sink) -> Iterator[DecodeThread]:
    thread = DecodeThread(backbone, 8, sink, num_threads=1)
    yield thread
    thread.stop()


def request(adapter: str | None, seed: int = 0, new: int = 12, **fields: object) -> DecodeRequest:
    prompt = (1, *range(40 + seed, 48 + seed))
    values = {"row_seed": seed, "max_new_tokens": new, "stop_ids": (), "adapter": adapter, **fields}
    return DecodeRequest(prompt_ids=prompt, **values)  # type: ignore[arg-type]


def alone(base_dir: Path, folder: Path | None, ask: DecodeRequest) -> tuple[int, ...]:
    """What the adapter says by itself: a fresh base with nothing else on it."""
    backbone = load_tiny(base_dir)
    model = backbone.model if folder is None else wrap(backbone.model, read_adapter(folder), "x")
    fields = {**ask.__dict__, "adapter": None if folder is None else "x"}
    return Sampler(model, backbone.pad_id).run([DecodeRequest(**fields)])[0].token_ids


def test_a_mixed_batch_says_what_each_adapter_says_alone(
    engine: DecodeThread, sink: Sink, adapters: Callable[..., Path], base_dir: Path
) -> None:
    """Adapters that come while others decode included: float32, greedy and sampled."""

    async def load(slots: AdapterCache[Read], seed: int) -> str:
        return (await slots.load(f"a{seed}", lambda: Read(read_adapter(adapters(seed))))).name

    async def run() -> list[tuple[Path | None, DecodeRequest, int]]:
        slots = AdapterCache[Read](engine, 6)
        asked: list[tuple[Path | None, DecodeRequest, int]] = []
        for seed in range(5):
            name = await load(slots, seed)
            for folder, adapter in ((adapters(seed), name), (None, None)):
                ask = request(adapter, seed, greedy=seed % 2 == 0)
                asked.append((folder, ask, engine.submit(ask)))
        return asked

    asked = asyncio.run(run())
    said = [tuple(t.token_id for t in sink.wait(ticket)) for _, _, ticket in asked]
    expected = [alone(base_dir, folder, ask) for folder, ask, _ in asked]
    assert said == expected
    assert len(set(said)) > 5  # the adapters do differ


def test_a_cancelled_row_stops_and_its_slot_is_free(engine: DecodeThread, sink: Sink) -> None:
    ticket = engine.submit(request(None, new=100))
    sink.wait(ticket, count=3)
    engine.cancel(ticket)
    other = engine.submit(request(None, seed=1, new=5))
    assert len(sink.wait(other)) == 5
    seen = len(sink.tokens[ticket])
    assert seen < 100 and sink.tokens[ticket][-1].end is None
    assert engine.running == 0 and not engine.sampler.busy


def test_a_bad_request_is_told_to_its_sender_alone(engine: DecodeThread, sink: Sink) -> None:
    good, bad = engine.submit(request(None)), engine.submit(request("ad_0009"))
    assert sink.wait(bad)[0].end == "error" and "ad_0009" in sink.wait(bad)[0].error
    assert sink.wait(good)[-1].end == "length"


def test_a_step_that_raises_ends_all_rows_and_the_engine_goes_on(
    engine: DecodeThread, sink: Sink, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> list[object]:
        engine.sampler._clear(256)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine.sampler, "step", broken)
    ticket = engine.submit(request(None))
    assert sink.wait(ticket)[-1].end == "error"
    assert engine.failures == 1
    monkeypatch.undo()
    assert sink.wait(engine.submit(request(None)))[-1].end == "length"
    assert engine.failures == 0


def test_the_least_recently_used_idle_adapter_leaves_and_one_in_use_never(
    engine: DecodeThread, adapters: Callable[..., Path]
) -> None:
    def reader(seed: int) -> Callable[[], Read]:
        return lambda: Read(read_adapter(adapters(seed)))

    async def run() -> None:
        slots = AdapterCache[Read](engine, 2)
        async with slots.use("a0", reader(0)) as first:
            await slots.load("a1", reader(1))
            await slots.load("a2", reader(2))
            assert slots.held() == ["a0", "a2"]  # a1 left, though a0 was older
            async with slots.use("a2", reader(2)):
                with pytest.raises(CacheBusy):
                    await slots.load("a3", reader(3))
            assert first.name in engine.model.peft_config
        await slots.load("a3", reader(3))
        await slots.load("a1", reader(1))
        assert slots.held() == ["a3", "a1"]
        assert len(engine.model.peft_config) == 3  # with the placeholder
        assert (slots.loads, slots.evictions) == (5, 3)

    asyncio.run(run())


def test_many_who_want_one_adapter_load_it_once_and_a_bad_one_hurts_nobody(
    engine: DecodeThread, adapters: Callable[..., Path]
) -> None:
    reads = 0

    def read() -> Read:
        nonlocal reads
        reads += 1
        return Read(read_adapter(adapters(0)))

    def bad() -> Read:
        raise ArtifactError.at("adapter", "is damaged")

    async def run() -> None:
        slots = AdapterCache[Read](engine, 2)
        found = await asyncio.gather(*(slots.load("a0", read) for _ in range(5)))
        assert reads == 1 and len({slot.name for slot in found}) == 1
        told = await asyncio.gather(*(slots.load("bad", bad) for _ in range(3)), return_exceptions=True)
        assert all(isinstance(error, ArtifactError) for error in told)
        assert slots.held() == ["a0"]

    asyncio.run(run())


def test_an_adapter_of_another_shape_is_refused_and_leaves_no_trace(
    engine: DecodeThread, adapters: Callable[..., Path]
) -> None:
    files = read_adapter(adapters(0))
    wrong = AdapterFiles(
        files.config,
        {k: torch.cat([t, t], dim=0) if "lora_B" in k else t for k, t in files.tensors.items()},
        None,
        "0",
        "x",
    )

    async def run() -> None:
        slots = AdapterCache[Read](engine, 2)
        with pytest.raises(ArtifactError, match="wrong shape"):
            await slots.load("wrong", lambda: Read(wrong))
        assert list(engine.model.peft_config) == ["placeholder"]

    asyncio.run(run())


def test_stopping_ends_rows_that_are_left(backbone: Backbone, sink: Sink) -> None:
    engine = DecodeThread(backbone, 2, sink)
    tickets = [engine.submit(request(None, new=100)) for _ in range(4)]
    sink.wait(tickets[0], count=1)
    engine.stop()
    assert all(sink.wait(ticket)[-1].end == "error" for ticket in tickets)
    assert not engine.alive
    with pytest.raises(RuntimeError):
        engine.submit(request(None))
