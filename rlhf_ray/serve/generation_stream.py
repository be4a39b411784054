"""One request while it is written: tokens of its rows come in, events (generation.py) go out, and every row is freed at the end.

submit ──> a row of the decode thread for each generation ──> add_token ... ──> scored ──> finish ──> ... ──> close
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rlhf_ray.maths.rng import derived_seed
from rlhf_ray.sampler.requests import DecodeRequest
from rlhf_ray.serve.api_errors import ApiError, internal_error
from rlhf_ray.serve.decode_options import DecodeOptions
from rlhf_ray.serve.decode_thread import DecodedToken, DecodeThread
from rlhf_ray.serve.generation import Event, Generation, GenerationRequest, ServedModel
from rlhf_ray.serve.metrics import Metrics
from rlhf_ray.serve.response_scorer import ResponseScorer
from rlhf_ray.serve.token_bytes import token_bytes

FLUSH_INTERVAL_S = 0.03
"""Between two flushes of a stream: 30 a second look like writing."""
FLUSH_INTERVAL_PER_STREAM_S = 0.003
"""Grows with the number of streams, so that together they make 300 flushes a second at most."""


@dataclass(frozen=True, eq=False)
class ScoredGeneration:
    """A generation that is complete. scores: {reward, kl, ...}, those that were requested; or why they could not be had."""

    generation: Generation
    scores: dict[str, Any] | ApiError


class TokenBuffer:
    """What was decoded for one request, until it is worth handing on. Lives on one event loop.

    Passing every token of 32 streams through the processes of a service, each on its own every few milliseconds, would cost more
    than decoding them. So the first token is flushed at once, and so is the end of a response; what comes between is batched.

    whole: flush the first item and the ends only; the client does not stream."""

    def __init__(self, whole: bool = False) -> None:
        self._whole = whole
        self._items: list[DecodedToken | ScoredGeneration] = []
        self._ready = asyncio.Event()
        self._flushed_at = float("-inf")

    def put(self, item: DecodedToken | ScoredGeneration, urgent: bool, streams: int = 1) -> None:
        """urgent: flush what there is at once.  streams: that are being written now."""
        self._items.append(item)
        interval = max(FLUSH_INTERVAL_S, FLUSH_INTERVAL_PER_STREAM_S * streams)
        if self._whole and self._flushed_at > 0:
            interval = float("inf")
        if urgent or time.monotonic() - self._flushed_at >= interval:
            self._ready.set()

    async def get(self) -> list[DecodedToken | ScoredGeneration]:
        """Everything there is, once a flush is due."""
        await self._ready.wait()
        self._ready.clear()
        self._flushed_at = time.monotonic()
        return self.take()

    def take(self) -> list[DecodedToken | ScoredGeneration]:
        """Everything there is, due or not."""
        items, self._items = self._items, []
        return items


class TokenRouter:
    """From the decode thread to the buffers of an event loop, by ticket. Build it on that loop. open_streams: being written now."""

    def __init__(self) -> None:
        self.open_streams = 0
        self.buffers: dict[int, TokenBuffer] = {}
        self._loop = asyncio.get_running_loop()

    def deliver(self, tokens: Sequence[DecodedToken]) -> None:
        """Called on the decode thread."""
        self._loop.call_soon_threadsafe(self._route, tokens)

    def _route(self, tokens: Sequence[DecodedToken]) -> None:
        for token in tokens:
            buffer = self.buffers.get(token.ticket)
            if buffer is not None:
                buffer.put(token, token.end is not None, self.open_streams)


@dataclass
class GenerationStream:
    """A request that is admitted, with its models in memory and its prompts encoded.

    reward_model: scores the responses; None if no reward is requested.  arrived_at: `time.monotonic()` of the request.
    places: rows that it may have in the decode thread at a time; what is beyond waits here for those before it."""

    request: GenerationRequest
    generations: Sequence[Generation]
    reward_model: ServedModel | None
    engine: DecodeThread
    router: TokenRouter
    scorer: ResponseScorer
    metrics: Metrics
    buffer: TokenBuffer
    arrived_at: float
    options: DecodeOptions = field(default_factory=DecodeOptions)
    places: int = 2**31
    _waiting: deque[Generation] = field(default_factory=deque)
    _seed: int = 0
    _by_ticket: dict[int, Generation] = field(default_factory=dict)
    _scoring: dict[Generation, asyncio.Task[None]] = field(default_factory=dict)
    _finished: set[Generation] = field(default_factory=set)
    _has_tokens: bool = False

    async def events(self, deadline: float) -> AsyncGenerator[list[Event], None]:
        """Lists of events until every generation has ended. deadline: of the event loop's clock.

        TimeoutError at the deadline, ApiError if a generation fails, both behind what was decoded so far: it is paid for. Every
        row is freed, however this iterator ends."""
        self.router.open_streams += 1
        try:
            if self.request.echo_first:
                async with asyncio.timeout_at(deadline):
                    echoed = [await self._echo(generation) for generation in self.generations]
                yield echoed
            self.submit()
            while len(self._finished) < len(self.generations):
                async with asyncio.timeout_at(deadline):
                    items = await self.buffer.get()
                if events := self.advance(items):
                    yield events
        except (ApiError, TimeoutError):
            if events := self._unfinished_events():
                yield events
            raise
        finally:
            self.router.open_streams -= 1
            self.close()

    async def _echo(self, generation: Generation) -> Event:
        told = await self.scorer.told(replace(self.request, prompt_logprobs=None), generation)
        return {"i": generation.index, "text": told["prompt_text"], "tokens": told.get("listed", [])}

    def submit(self) -> None:
        """A row of the decode thread for every generation, for as many as there are places."""
        self._seed = self.request.seed if self.request.seed is not None else secrets.randbits(62)
        self._waiting.extend(self.generations)
        for _ in range(min(self.places, len(self._waiting))):
            self._submit_next()

    def _submit_next(self) -> None:
        generation = self._waiting.popleft()
        if generation.max_new_tokens == 0:  # only the prompt is asked about
            generation.end = "length"
            self._scoring[generation] = asyncio.create_task(self._score(generation))
            return
        flow = self.request.key, generation.served.id, str(id(self))  # not the model's name: a version has several
        ticket = self.engine.submit(self._decode_request(generation, self._seed), flow)
        self._by_ticket[ticket] = generation
        self.router.buffers[ticket] = self.buffer

    def advance(self, items: Sequence[DecodedToken | ScoredGeneration]) -> list[Event]:
        """From what the buffer flushed: an event with the new text of each generation, then the ends of complete ones."""
        self._observe_first_token()
        texts: dict[int, Event] = {}
        ends: list[Event] = []
        for item in items:
            if isinstance(item, ScoredGeneration):
                ends.append(self.finish(item))
            elif self._by_ticket[item.ticket].end is None:  # else it goes on for a step after its stop string
                self.add_token(item, texts)
        return [*texts.values(), *ends]

    def _unfinished_events(self) -> list[Event]:
        """Of every generation that has not ended: the text that is left of what was decoded, and how many tokens."""
        texts: dict[int, Event] = {}
        for item in self.buffer.take():
            if isinstance(item, DecodedToken) and item.end != "error" and self._by_ticket[item.ticket].end is None:
                self.add_token(item, texts)
        return [
            {"i": g.index, "text": "", **texts.get(g.index, {}), "completion_tokens": len(g.response_ids)}
            for g in self.generations
            if g.response_ids and g not in self._finished
        ]

    def add_token(self, token: DecodedToken, events: dict[int, Event]) -> None:
        """Append a token; the text that it completes goes into its generation's event. A generation that ends is scored."""
        if token.end == "error":
            raise internal_error()
        generation = self._by_ticket[token.ticket]
        generation.response_ids.append(token.token_id)
        generation.logprobs.append(token.logprob)
        generation.top.append(token.top)
        generation.end = token.end
        text = generation.text.push(token.token_id) if token.end != "stop" else ""
        if token.end is not None:
            text += generation.text.finish()
        if generation.text.stopped:
            generation.end = "stop"
        if text or self.request.logprobs:
            event = events.setdefault(generation.index, {"i": generation.index, "text": ""})
            event["text"] += text
            event["completion_tokens"] = len(generation.response_ids)
            if self.request.logprobs:
                self._list_tokens(generation, event)
        if generation.end is not None:
            if token.end is None:  # a stop string, of which the decode thread knows nothing
                self.engine.cancel(token.ticket)
            self._scoring[generation] = asyncio.create_task(self._score(generation))

    def finish(self, scored: ScoredGeneration) -> Event:
        """The last event of a generation. Raises the ApiError that its scoring met."""
        if isinstance(scored.scores, ApiError):
            raise scored.scores
        generation, adapter = scored.generation, scored.generation.served.model
        self._finished.add(generation)
        if self._waiting:
            self._submit_next()
        self.metrics.count("replies", adapter=adapter, end=str(generation.end))
        self.metrics.count("prompt_tokens", len(generation.prompt_ids), adapter=adapter)
        self.metrics.count("completion_tokens", len(generation.response_ids), adapter=adapter)
        self.metrics.observe("reply_seconds", time.monotonic() - self.arrived_at, adapter=adapter)
        return {
            "i": generation.index,
            "end": generation.end,
            "completion_tokens": len(generation.response_ids),
            **({"mean_logprob": _mean_logprob(generation)} if self.request.ranked else {}),
            **scored.scores,
        }

    def close(self) -> None:
        """Free the rows of generations that have not ended, and drop the scoring that still runs."""
        for ticket, generation in self._by_ticket.items():
            self.router.buffers.pop(ticket, None)
            if generation.end is None and self.engine.alive:
                self.engine.cancel(ticket)
        for task in self._scoring.values():
            task.cancel()

    def _decode_request(self, generation: Generation, seed: int) -> DecodeRequest:
        """Sample k of prompt p has the same random numbers whichever model writes it, so that only models make a difference."""
        per_prompt = len(self.request.models) * self.request.n
        prompt, sample = generation.index // per_prompt, generation.index % self.request.n
        cached = generation.served.cached
        return DecodeRequest(
            generation.prompt_ids,
            derived_seed(seed, "serve", prompt, sample),
            generation.max_new_tokens,
            (*(() if self.request.ignore_eos else generation.served.stop_ids), *generation.stop_ids),
            temperature=self.request.temperature or 1.0,
            top_p=self.request.top_p,
            top_k=self.request.top_k,
            greedy=self.request.temperature == 0,
            adapter=None if cached is None else cached.adapter_name,
            **self.options.decode,
        )

    def _list_tokens(self, generation: Generation, event: Event) -> None:
        """Add those whose text has been returned since the last call."""
        start = len(generation.text.tokens)
        generation.text.settle()
        for i, token in enumerate(generation.text.tokens[start:], start=start):
            event.setdefault("tokens", []).append([token.text, generation.logprobs[i]])
            event.setdefault("bytes", []).append(list(token.raw))
            if self.request.top_logprobs:
                event.setdefault("top", []).append(self._top(generation, i))

    def _top(self, generation: Generation, i: int) -> list[list[Any]]:
        """The likeliest tokens at place i; the one that was taken with the text that it has in the reply."""
        shown, taken = token_bytes(self.engine.backbone.tokenizer).shown, generation.text.tokens[i]
        named = {generation.response_ids[i]: (taken.text, list(taken.raw))}
        return [[text, p, raw] for other, p in generation.top[i] for text, raw in [named.get(other) or shown(other)]]

    def _observe_first_token(self) -> None:
        if not self._has_tokens:
            seconds = time.monotonic() - self.arrived_at
            for model in {generation.served.model for generation in self.generations}:
                self.metrics.observe("time_to_first_token_seconds", seconds, adapter=model)
            self._has_tokens = True

    async def _score(self, generation: Generation) -> None:
        """Put the scores of an ended generation, or the error, into the buffer."""
        try:
            request = replace(self.request, echo=False) if self.request.echo_first else self.request
            scores = await self.scorer.scores(request, generation, self.reward_model)
            self.buffer.put(ScoredGeneration(generation, scores), urgent=True)
        except Exception as error:
            failure = error if isinstance(error, ApiError) else internal_error()
            self.buffer.put(ScoredGeneration(generation, failure), urgent=True)


def _mean_logprob(generation: Generation) -> float:
    """Over every token that was decoded, a stop string's too, as vLLM counts: an empty reply is as likely as what ended it."""
    return sum(generation.logprobs) / len(generation.logprobs) if generation.logprobs else 0.0
