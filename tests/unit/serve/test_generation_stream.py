"""A request while it is written: when its tokens are flushed, and what frees its rows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_ray.sampler.requests import DecodeRequest
from rlhf_ray.serve import generation_stream as module
from rlhf_ray.serve.api_errors import ApiError
from rlhf_ray.serve.decode_thread import DecodedToken
from rlhf_ray.serve.generation import Event, Generation, GenerationRequest, ServedModel
from rlhf_ray.serve.generation_stream import FLUSH_INTERVAL_S, GenerationStream, TokenBuffer, TokenRouter
from rlhf_ray.serve.metrics import NoMetrics


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    class Clock:
        now = 100.0

        def monotonic(self) -> float:
            return self.now

    found = Clock()
    monkeypatch.setattr(module, "time", found)
    return found


async def flushed(buffer: TokenBuffer) -> list[Any] | None:
    try:
        return await asyncio.wait_for(buffer.get(), 0.01)
    except TimeoutError:
        return None


def test_the_first_and_the_last_are_flushed_at_once_and_the_others_together(clock: Any) -> None:
    async def scenario() -> None:
        buffer = TokenBuffer()
        buffer.put("a", urgent=False)
        assert await flushed(buffer) == ["a"]
        buffer.put("b", urgent=False)
        assert await flushed(buffer) is None
        clock.now += FLUSH_INTERVAL_S
        buffer.put("c", urgent=False)
        assert await flushed(buffer) == ["b", "c"]
        buffer.put("d", urgent=False)
        buffer.put("e", urgent=True)
        assert await flushed(buffer) == ["d", "e"]

    asyncio.run(scenario())


def test_the_interval_grows_with_the_open_streams(clock: Any) -> None:
    async def scenario() -> None:
        buffer = TokenBuffer()
        buffer.put("a", urgent=False)
        await buffer.get()
        clock.now += 0.25
        buffer.put("b", urgent=False, streams=100)
        assert await flushed(buffer) is None
        clock.now += 0.06
        buffer.put("c", urgent=False, streams=100)
        assert await flushed(buffer) == ["b", "c"]

    asyncio.run(scenario())


def test_without_streaming_only_the_end_is_flushed(clock: Any) -> None:
    async def scenario() -> None:
        buffer = TokenBuffer(whole=True)
        buffer.put("a", urgent=False)
        assert await flushed(buffer) == ["a"]
        clock.now += 60
        buffer.put("b", urgent=False)
        assert await flushed(buffer) is None
        buffer.put("c", urgent=True)
        assert await flushed(buffer) == ["b", "c"]

    asyncio.run(scenario())


class FakeEngine:
    """Tickets 0, 1, ...; tokens come from the test."""

    alive = True

    def __init__(self) -> None:
        self.submitted: list[DecodeRequest] = []
        self.flows: list[tuple[str, ...]] = []
        self.cancelled: list[int] = []

    def submit(self, request: DecodeRequest, flow: tuple[str, ...]) -> int:
        self.submitted.append(request)
        self.flows.append(flow)
        return len(self.submitted) - 1

    def cancel(self, ticket: int) -> None:
        self.cancelled.append(ticket)


class FakeText:
    """Each token is its number and a space; `stop` ends the response."""

    def __init__(self, stop: int | None) -> None:
        self.stop, self.stopped = stop, False

    def push(self, token_id: int) -> str:
        self.stopped = token_id == self.stop
        return "" if self.stopped else f"{token_id} "

    def finish(self) -> str:
        return ""


class FakeScorer:
    """The sum of the tokens, or the error; waits for `may_score`."""

    def __init__(self, error: Exception | None) -> None:
        self.error, self.may_score, self.cancelled = error, asyncio.Event(), 0

    async def scores(self, request: Any, generation: Generation, reward_model: Any) -> dict[str, float | None]:
        try:
            await self.may_score.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return {"reward": float(sum(generation.response_ids))}


class Harness:
    """A stream of two generations over fakes. `send` delivers one step's tokens, as (ticket, token, end)."""

    def __init__(self, stop: int | None = None, error: Exception | None = None) -> None:
        self.engine, self.router, self.scorer = FakeEngine(), TokenRouter(), FakeScorer(error)
        model = ServedModel("m", "m@v0", "0", SimpleNamespace(), ())  # type: ignore[arg-type]
        generations = [Generation(i, model, {}, (1, 2), 9, FakeText(stop)) for i in range(2)]  # type: ignore[arg-type]
        request, engine, scorer = GenerationRequest(("m",), ({},), n=2, seed=1), self.engine, self.scorer
        self.stream = GenerationStream(
            request,
            generations,
            None,
            engine,  # type: ignore[arg-type]
            self.router,
            scorer,  # type: ignore[arg-type]
            NoMetrics(),
            TokenBuffer(),
            0.0,
        )

    def events(self, seconds: float = 10) -> AsyncGenerator[list[Event], None]:
        return self.stream.events(asyncio.get_running_loop().time() + seconds)

    async def send(self, *tokens: tuple[int, int, Any]) -> None:
        await asyncio.sleep(0)
        self.router.deliver([DecodedToken(ticket, token, -1.0, end) for ticket, token, end in tokens])

    def check_freed(self, cancelled: Sequence[int]) -> None:
        assert self.engine.cancelled == list(cancelled)
        assert not self.router.buffers and self.router.open_streams == 0


def play(scenario: Callable[[], Any]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_texts_come_before_the_ends_and_a_stop_string_cancels_its_row(clock: Any) -> None:
    async def scenario() -> None:
        harness = Harness(stop=7)
        events = harness.events()
        harness.scorer.may_score.set()
        first = asyncio.ensure_future(anext(events))
        await harness.send((0, 3, None), (1, 4, "length"))
        texts = [{"i": 0, "text": "3 ", "completion_tokens": 1}, {"i": 1, "text": "4 ", "completion_tokens": 1}]
        assert await first == texts
        assert await anext(events) == [{"i": 1, "end": "length", "completion_tokens": 1, "reward": 4.0}]
        last = asyncio.ensure_future(anext(events))
        clock.now += FLUSH_INTERVAL_S
        await harness.send((0, 7, None), (0, 5, None))  # the decoder's next step knows nothing of the stop string
        assert await last == [{"i": 0, "end": "stop", "completion_tokens": 2, "reward": 10.0}]
        assert [event async for event in events] == []
        harness.check_freed(cancelled=[0])

    play(scenario)


def test_closing_the_iterator_frees_the_rows_and_drops_the_scoring() -> None:
    async def scenario() -> None:
        harness = Harness()
        events = harness.events()
        first = asyncio.ensure_future(anext(events))
        await harness.send((0, 3, None), (1, 4, "length"))
        await first
        await asyncio.sleep(0)
        assert harness.router.open_streams == 1
        await events.aclose()
        await asyncio.sleep(0)
        harness.check_freed(cancelled=[0])
        assert harness.scorer.cancelled == 1

    play(scenario)


def test_a_deadline_frees_every_row() -> None:
    async def scenario() -> None:
        harness = Harness()
        with pytest.raises(TimeoutError):
            await anext(harness.events(0.01))
        harness.check_freed(cancelled=[0, 1])

    play(scenario)


def test_a_special_token_among_the_stop_strings_is_stopped_on_and_not_scored() -> None:
    """It is no text, so that no search finds it; what the model itself ends with is scored, as in training."""

    async def scenario() -> None:
        harness = Harness()
        first, second = harness.stream.generations
        model = ServedModel("m", "m@v0", "0", SimpleNamespace(), (2,))  # type: ignore[arg-type]
        for generation in (first, second):
            generation.served, generation.stop_ids = model, (8,)
        harness.stream.submit()
        assert [request.stop_ids for request in harness.engine.submitted] == [(2, 8), (2, 8)]
        harness.stream.advance([DecodedToken(0, 5, -1.0, None), DecodedToken(1, 5, -1.0, None)])
        harness.stream.advance([DecodedToken(0, 8, -1.0, "stop"), DecodedToken(1, 2, -1.0, "stop")])
        assert [(generation.end, generation.shown) for generation in (first, second)] == [("stop", 1), ("stop", 2)]
        harness.stream.close()

    play(scenario)


def test_a_version_takes_turns_as_one_however_it_is_named() -> None:
    """Three names of one version had three shares."""

    async def scenario() -> None:
        found = set[tuple[str, ...]]()
        for name in ("m", "m@v3", "m@v3-1a2b3c4d"):
            harness = Harness()
            model = ServedModel(name, "m@v3-1a2b3c4d", "0", SimpleNamespace(), ())  # type: ignore[arg-type]
            for generation in harness.stream.generations:
                generation.served = model
            harness.stream.submit()
            found |= {flow[:2] for flow in harness.engine.flows}
            harness.stream.close()
        assert found == {("", "m@v3-1a2b3c4d")}

    play(scenario)


@pytest.mark.parametrize(("error", "status"), [(RuntimeError("secret"), 500), (ApiError(400, "no such template"), 400)])
def test_an_error_of_the_scoring_ends_the_request(error: Exception, status: int) -> None:
    async def scenario() -> None:
        harness = Harness(error=error)
        harness.scorer.may_score.set()
        events = harness.events()
        first = asyncio.ensure_future(anext(events))
        await harness.send((1, 4, "length"))
        await first
        assert await anext(events) == [{"i": 1, "text": "", "completion_tokens": 1}], "what it has cost comes before it"
        with pytest.raises(ApiError) as raised:
            await anext(events)
        assert raised.value.status == status and "secret" not in str(raised.value)
        harness.check_freed(cancelled=[0])

    play(scenario)


def test_a_row_that_fails_ends_the_request() -> None:
    async def scenario() -> None:
        harness = Harness()
        first = asyncio.ensure_future(anext(harness.events()))
        await harness.send((0, -1, "error"))
        with pytest.raises(ApiError):
            await first
        harness.check_freed(cancelled=[0, 1])

    play(scenario)
