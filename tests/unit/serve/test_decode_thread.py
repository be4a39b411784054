"""The decode thread and its adapters: mixed batches give the tokens of separate passes; nothing in use is ever evicted."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch

from rlhf_ray.errors import ArtifactError
from rlhf_ray.models.adapter_files import AdapterFiles, read_adapter
from rlhf_ray.models.adapters import wrap
from rlhf_ray.models.backbone import Backbone
from rlhf_ray.sampler.engine import Sampler
from rlhf_ray.sampler.logits import LogitsOptions
from rlhf_ray.sampler.requests import DecodeEvent, DecodeRequest
from rlhf_ray.serve.adapter_cache import AdapterCache
from rlhf_ray.serve.decode_thread import DecodedToken, DecodeThread
from rlhf_ray.serve.openai_types import SamplingParams

from .conftest import load_tiny
from .edges import numeric_fields


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
class PlainCheckpoint:
    files: AdapterFiles

    def without_tensors(self) -> PlainCheckpoint:
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


def alone(base_dir: Path, folder: Path | None, decode_request: DecodeRequest) -> tuple[int, ...]:
    """The tokens of the adapter by itself: a fresh base with nothing else on it."""
    backbone = load_tiny(base_dir)
    model = backbone.model if folder is None else wrap(backbone.model, read_adapter(folder), "x")
    fields = {**decode_request.__dict__, "adapter": None if folder is None else "x"}
    return Sampler(model, backbone.pad_id).run([DecodeRequest(**fields)])[0].token_ids


def test_a_mixed_batch_gives_the_tokens_of_each_adapter_alone(
    engine: DecodeThread, sink: Sink, adapters: Callable[..., Path], base_dir: Path
) -> None:
    """Adapters that come while others decode included: float32, greedy and sampled."""

    async def load(cache: AdapterCache[PlainCheckpoint], seed: int) -> str:
        return (await cache.load(f"a{seed}", lambda: PlainCheckpoint(read_adapter(adapters(seed))))).adapter_name

    async def run() -> list[tuple[Path | None, DecodeRequest, int]]:
        cache = AdapterCache[PlainCheckpoint](engine, 6)
        submitted: list[tuple[Path | None, DecodeRequest, int]] = []
        for seed in range(5):
            name = await load(cache, seed)
            for folder, adapter in ((adapters(seed), name), (None, None)):
                decode_request = request(adapter, seed, greedy=seed % 2 == 0)
                submitted.append((folder, decode_request, engine.submit(decode_request)))
        return submitted

    submitted = asyncio.run(run())
    token_ids = [tuple(t.token_id for t in sink.wait(ticket)) for _, _, ticket in submitted]
    expected = [alone(base_dir, folder, decode_request) for folder, decode_request, _ in submitted]
    assert token_ids == expected
    assert len(set(token_ids)) > 5  # the adapters do differ


def test_a_cancelled_row_stops_and_its_place_in_the_batch_is_free(engine: DecodeThread, sink: Sink) -> None:
    ticket = engine.submit(request(None, new=100))
    sink.wait(ticket, count=3)
    engine.cancel(ticket)
    other = engine.submit(request(None, seed=1, new=5))
    assert len(sink.wait(other)) == 5
    seen = len(sink.tokens[ticket])
    assert seen < 100 and sink.tokens[ticket][-1].end is None
    assert engine.running == 0 and not engine.sampler.busy


def test_calls_that_follow_each_other_do_not_keep_rows_from_their_steps(engine: DecodeThread, sink: Sink) -> None:
    """Two clients that score again and again: all their calls ran before the next step."""
    done, last = [0, 0], 60

    def again(client: int) -> None:
        if done[client] < last:
            engine.call(lambda model: time.sleep(0.02)).add_done_callback(lambda _: again(client))
            done[client] += 1

    engine.call(lambda model: [again(client) for client in (0, 1)])
    assert len(sink.wait(engine.submit(request(None, new=10)))) == 10
    assert max(done) < last and engine.calls_done > 2


def test_a_bad_request_is_an_error_for_its_own_ticket_alone(engine: DecodeThread, sink: Sink) -> None:
    good, bad = engine.submit(request(None)), engine.submit(request("ad_0009"))
    assert sink.wait(bad)[0].end == "error" and "ad_0009" in sink.wait(bad)[0].error
    assert sink.wait(good)[-1].end == "length"


def test_a_step_that_raises_ends_all_rows_and_the_engine_goes_on(
    engine: DecodeThread, sink: Sink, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> list[object]:
        engine.sampler._clear()
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine.sampler, "step", broken)
    ticket = engine.submit(request(None))
    assert sink.wait(ticket)[-1].end == "error"
    assert engine.failures == 1
    monkeypatch.undo()
    assert sink.wait(engine.submit(request(None)))[-1].end == "length"
    assert engine.failures == 0


@pytest.fixture
def poison(engine: DecodeThread) -> Iterator[set[int]]:
    """Tokens at which a forward raises: a stand-in for any fault of one row (a kernel, a bad adapter, memory)."""
    tokens: set[int] = set()

    def raise_at(module: object, args: tuple[torch.Tensor, ...]) -> None:
        if tokens & set(args[0].flatten().tolist()):
            raise RuntimeError("a fault of one row")

    hook = engine.model.get_input_embeddings().register_forward_pre_hook(raise_at)
    yield tokens
    hook.remove()


def test_a_row_whose_prompt_breaks_a_step_fails_alone(
    engine: DecodeThread, sink: Sink, poison: set[int], base_dir: Path
) -> None:
    """The others, decoding or just come as well, give the tokens that they give without it, each once."""
    bad = 47 + 40
    good = [request(None, seed, new=40) for seed in range(3)]
    expected = [alone(base_dir, None, r) for r in good]
    tickets = [engine.submit(r) for r in good[:2]]
    sink.wait(tickets[0], count=3)
    poison.add(bad)
    assert not any(bad in tokens for tokens in expected)
    wrong = [engine.submit(request(None, seed=40, new=40)), engine.submit(request(None, seed=45, new=40))]
    tickets.append(engine.submit(good[2]))
    assert [(t.end, t.error) for ticket in wrong for t in sink.wait(ticket)] == [
        ("error", "a decoding step failed")
    ] * 2
    assert [tuple(t.token_id for t in sink.wait(ticket)) for ticket in tickets] == expected
    assert engine.failures == 0


def test_a_row_that_breaks_a_step_later_fails_alone(
    engine: DecodeThread, sink: Sink, poison: set[int], base_dir: Path
) -> None:
    requests = [request(None, seed, new=30, row_seed=seed) for seed in range(4)]
    expected = [alone(base_dir, None, r) for r in requests]
    others = {token for tokens in expected[1:] for token in tokens}
    place = next(i for i, token in enumerate(expected[0][4:-1], start=4) if token not in others)
    poison.add(expected[0][place])
    assert expected[0].index(expected[0][place]) == place
    tickets = [engine.submit(r) for r in requests]
    broken, *whole = [sink.wait(ticket) for ticket in tickets]
    assert [tuple(t.token_id for t in tokens) for tokens in whole] == expected[1:]
    assert tuple(t.token_id for t in broken[:-1]) == expected[0][: place + 1] and broken[-1].end == "error"


def test_a_row_that_cannot_be_submitted_again_does_not_end_the_thread(
    engine: DecodeThread, sink: Sink, poison: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its adapter is gone, say, when the others go on after a step that raised."""
    good, gone = engine.submit(request(None, seed=0, new=60)), engine.submit(request(None, seed=1, new=60))
    sink.wait(gone, count=2)
    submit = engine.sampler.submit

    def refuse(asked: DecodeRequest) -> int:
        if asked.row_seed == 1:
            raise ArtifactError.at("adapter", "is gone")
        return submit(asked)

    monkeypatch.setattr(engine.sampler, "submit", refuse)
    poison.add(87)
    bad = engine.submit(request(None, seed=40))
    assert [sink.wait(ticket)[-1].end for ticket in (bad, gone, good)] == ["error", "error", "length"]
    assert engine.alive


@pytest.mark.parametrize("who", ["one that was there", "all that come"])
def test_rows_that_break_every_step_fail_alone_whoever_comes_meanwhile(
    engine: DecodeThread, sink: Sink, monkeypatch: pytest.MonkeyPatch, base_dir: Path, who: str
) -> None:
    """With a newcomer before each retry newcomers alone were suspected; after the third step that raised all rows were failed."""
    there = [request(None, seed, new=40) for seed in range(3)]
    come = [request(None, seed, new=5) for seed in range(10, 13)]
    bad = {0} if who == "one that was there" else {10, 11, 12}
    expected = {r.row_seed: alone(base_dir, None, r) for r in (*there, *come)}
    sampler, step, feed, left = engine.sampler, engine.sampler.step, engine._feed, list(come)
    assert isinstance(sampler, Sampler)
    begun, tickets = threading.Event(), dict[int, int]()

    def breaks() -> list[DecodeEvent]:
        held = (*sampler._waiting, *sampler._staged, *sampler._decoding)
        if begun.is_set() and any(row.end is None and row.request.row_seed in bad for row in held):
            sampler._clear()
            raise RuntimeError("a fault of one row")
        return step()

    def crowded() -> None:
        if engine._rows and all(len(row.tokens) >= 3 for row in engine._rows.values()):
            begun.set()
        if begun.is_set() and left:
            newcomer = left.pop(0)
            tickets[newcomer.row_seed] = engine.submit(newcomer)
            engine._admit_pending()
        feed()

    monkeypatch.setattr(sampler, "step", breaks)
    monkeypatch.setattr(engine, "_feed", crowded)
    engine.call(lambda model: tickets.update((r.row_seed, engine.submit(r)) for r in there)).result(60)  # all at once
    found = {seed: sink.wait(tickets[seed]) for seed in (0, 1, 2)}
    found |= {seed: sink.wait(tickets[seed]) for seed in (10, 11, 12)}
    assert {seed for seed, tokens in found.items() if tokens[-1].end == "error"} == bad
    assert all(tuple(t.token_id for t in found[seed]) == expected[seed] for seed in found.keys() - bad)
    assert engine.failures == 0


ASKED = numeric_fields(SamplingParams)
EDGES: dict[str, Sequence[Any]] = {
    **{
        name: [number.wrap(x) for x in number.values() if number.allows(x)]
        for name, (number,) in ASKED.items()
        if name in {*DecodeRequest.__annotations__, *LogitsOptions.__annotations__} and name != "temperature"
    },
    "temperature": (0.01, math.nextafter(0.01, 1), 0.011, 99.9, math.nextafter(100, 0), 100.0),
    "row_seed": (-(2**63), -1, 0, 2**63 - 1),
    "max_new_tokens": (1, 2),
    "top_logprobs": (0, 1, 20),
}
EDGES["top_k"] = [*(x for x in EDGES["top_k"] if x >= 0), 2**31 - 1, 2**63 - 1]
"""What the API allows of each number of a request to the sampler, at the edges of float32 and of its bounds; -1 stays there."""


def decode_requests(name: str, values: Sequence[Any]) -> list[DecodeRequest]:
    if name in LogitsOptions.__annotations__:
        wrapped = ({name: tuple((int(i), b) for i, b in x.items()) if isinstance(x, dict) else x} for x in values)
        fields: list[dict[str, Any]] = [{"logits": LogitsOptions(**asked)} for asked in wrapped]
    else:
        fields = [{name: x} for x in values]
    return [request(None, i, new=4, **asked) for i, asked in enumerate(fields)]


def test_every_number_of_a_decode_request_has_its_edges() -> None:
    hints = get_type_hints(DecodeRequest) | get_type_hints(LogitsOptions)
    assert {name for name, hint in hints.items() if hint in (int, float)} | {"logit_bias"} == EDGES.keys()
    assert all(len(values) > 1 for values in EDGES.values())


def test_numbers_at_the_edge_of_float32_hurt_nobody(engine: DecodeThread, sink: Sink, base_dir: Path) -> None:
    """top_p 1e-50 is 0 in float32: it kept no token, and the step raised for every row."""
    innocent = request(None, seed=1, new=200, top_p=0.9)
    expected = alone(base_dir, None, innocent)
    ticket = engine.submit(innocent)
    asked = [r for name, values in EDGES.items() for r in decode_requests(name, values)]
    edges = [sink.wait(ticket) for ticket in [engine.submit(r) for r in asked]]
    assert [tokens[-1].end for tokens in edges] == ["length"] * len(asked)
    assert tuple(t.token_id for t in sink.wait(ticket)) == expected
    assert engine.failures == 0
    wrong = [request(None, **{name: x}) for name, x in (("temperature", 1e-50), ("temperature", 1e39), ("top_p", 0.0))]
    assert all(sink.wait(engine.submit(r))[-1].end == "error" for r in wrong)


def test_the_least_recently_used_idle_adapter_is_evicted_and_one_in_use_never(
    engine: DecodeThread, adapters: Callable[..., Path]
) -> None:
    def reader(seed: int) -> Callable[[], PlainCheckpoint]:
        return lambda: PlainCheckpoint(read_adapter(adapters(seed)))

    async def run() -> None:
        cache = AdapterCache[PlainCheckpoint](engine, 2)
        async with cache.use("a0", reader(0)) as first:
            await cache.load("a1", reader(1))
            await cache.load("a2", reader(2))
            assert cache.keys() == ["a0", "a2"]  # a1 was evicted, though a0 was older
            async with cache.use("a2", reader(2)):
                waiting = asyncio.create_task(cache.load("a3", reader(3)))
                await asyncio.sleep(0.1)
                assert not waiting.done() and first.adapter_name in engine.pool  # was: CacheBusy, a 429
            await asyncio.wait_for(waiting, 10)
            assert cache.keys() == ["a0", "a3"] and first.adapter_name in engine.pool
        await cache.load("a3", reader(3))
        await cache.load("a1", reader(1))
        assert cache.keys() == ["a3", "a1"]
        assert len(engine.pool.names) == 2 and list(engine.model.peft_config) == ["placeholder"]
        assert (cache.loads, cache.evictions) == (5, 3)

    asyncio.run(run())


def test_concurrent_uses_load_an_adapter_once_and_a_bad_one_does_no_harm(
    engine: DecodeThread, adapters: Callable[..., Path]
) -> None:
    reads = 0

    def read() -> PlainCheckpoint:
        nonlocal reads
        reads += 1
        return PlainCheckpoint(read_adapter(adapters(0)))

    def bad() -> PlainCheckpoint:
        raise ArtifactError.at("adapter", "is damaged")

    async def run() -> None:
        cache = AdapterCache[PlainCheckpoint](engine, 2)
        found = await asyncio.gather(*(cache.load("a0", read) for _ in range(5)))
        assert reads == 1 and len({cached.adapter_name for cached in found}) == 1
        errors = await asyncio.gather(*(cache.load("bad", bad) for _ in range(3)), return_exceptions=True)
        assert all(isinstance(error, ArtifactError) for error in errors)
        assert cache.keys() == ["a0"]

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
        cache = AdapterCache[PlainCheckpoint](engine, 2)
        with pytest.raises(ArtifactError, match="wrong shape"):
            await cache.load("wrong", lambda: PlainCheckpoint(wrong))
        assert list(engine.model.peft_config) == ["placeholder"] and not engine.pool.names

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
