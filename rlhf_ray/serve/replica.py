"""A replica: one base, the adapters on it, and the replies that are being written. Knows nothing of HTTP or of Ray.

request ──> names -> versions ──> prompt ids ──> slots ──> rows of the decode thread ──> text ──> reward, KL ──> events
"""

from __future__ import annotations

import asyncio
import secrets
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import torch

from rlhf_ray.config.serve import ServeConfig
from rlhf_ray.data.encode import bos_ids
from rlhf_ray.data.templates import load_template
from rlhf_ray.errors import RlhfRayError
from rlhf_ray.maths.rng import derived_seed
from rlhf_ray.models.assembly import load_options
from rlhf_ray.models.backbone import Backbone, load_backbone
from rlhf_ray.registry import Registry
from rlhf_ray.sampler.requests import DecodeRequest
from rlhf_ray.serve.adapter_cache import AdapterCache, CacheBusy
from rlhf_ray.serve.api_errors import ApiError, adapter_refused, internal, model_not_found, out_of_time, overloaded
from rlhf_ray.serve.decode_thread import DecodedToken, DecodeThread
from rlhf_ray.serve.generation import Generation, GenerationRequest, ServedModel
from rlhf_ray.serve.metrics import Metrics, NoMetrics
from rlhf_ray.serve.model_index import BASE, ModelIndex, ModelReadout, Version, entries, run_versions
from rlhf_ray.serve.prompting import Prompting
from rlhf_ray.serve.registry_watcher import RegistryWatcher, forget_the_dead
from rlhf_ray.serve.response_scorer import ResponseScorer
from rlhf_ray.serve.text import ResponseText
from rlhf_ray.serve.token_buffer import TokenBuffer

SWITCH_S = 0.001
"""The decode thread gives up Python's lock this often for the event loop; the default of 5 ms would delay every answer."""
HEALTH_S = 30.0

Event = dict[str, Any]


class Replica:
    """Build it on the event loop that will call it, then `await start()`."""

    def __init__(self, config: ServeConfig, name: str = "replica", metrics: Metrics | None = None) -> None:
        sys.setswitchinterval(SWITCH_S)
        self.config, self.limits, self.metrics = config, config.limits, metrics or NoMetrics()
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        threads = config.replicas.num_threads
        if threads is not None:
            torch.set_num_threads(threads)
        self.backbone: Backbone = load_backbone(
            path=config.model_name_or_path,
            revision=config.revision,
            **load_options(config, device),  # type: ignore[arg-type]  # the same fields as a job's
        )
        chat = "chat" if self.backbone.tokenizer.chat_template is not None else "none"
        self.template = load_template(config.template or chat, self.backbone.tokenizer)
        self.runs = run_versions(config.adapters, self.backbone)
        self.loop = asyncio.get_running_loop()
        self.engine = DecodeThread(self.backbone, self.limits.max_batch_rows, self._deliver, threads)
        self.adapter_cache = AdapterCache[ModelReadout](self.engine, self.limits.max_loaded_adapters)
        self.scorer = ResponseScorer(self.engine)
        self.prompting = Prompting(self.backbone, self.limits)
        self.model_index = ModelIndex()
        registry = None if config.registry is None else Registry(config.registry)
        notes = Path(config.output_dir) / "replicas" / f"{name}.json"
        notes.parent.mkdir(parents=True, exist_ok=True)
        forget_the_dead(notes.parent)
        self.watcher = RegistryWatcher(
            self.model_index, self.adapter_cache, self.backbone, registry, notes, self.metrics
        )
        self.started = int(time.time())
        self._routes: dict[int, tuple[TokenBuffer, Generation]] = {}
        self._running_requests = 0
        self._reserved = 0
        self._checked_steps = -1
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Serve the names there are, and follow the registry from now on."""
        await self.watcher.take(self.runs)
        await self.watcher.look()
        self._keep(self.watcher.forever(self.config.poll_interval_s))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.to_thread(self.engine.stop)
        self.watcher.notes.unlink(missing_ok=True)

    # ---- what it can be asked ------------------------------------------------------------------------------------------

    async def events(
        self, request: GenerationRequest, arrived: float | None = None, whole: bool = False
    ) -> AsyncIterator[list[Event]]:
        """Lists of events as in generation.py; closing the iterator frees every row. Errors are events as well.

        arrived: `time.monotonic()` that the deadline counts from; default now.  whole: nobody reads along (see token_buffer.py)."""
        arrived = time.monotonic() if arrived is None else arrived
        deadline = self.loop.time() + self.limits.request_timeout_s
        try:
            async with AsyncExitStack() as held:
                async with asyncio.timeout_at(deadline):
                    self._admit(request, held)
                    generations, served_models, reward_model = await self._prepare(request, held)
                yield [{"start": self._start(generations, served_models)}]
                buffer = TokenBuffer(whole and not request.stops)  # a stop string has to be noticed on the way
                async for events in self._write(request, generations, reward_model, deadline, arrived, buffer):
                    yield events
        except ApiError as error:
            yield [{"error": error.as_dict()}]
        except TimeoutError:
            yield [{"error": out_of_time(self.limits.request_timeout_s).as_dict()}]

    async def models(self) -> list[dict[str, Any]]:
        """See `model_index.entries`."""
        return entries(self.model_index, self.started)

    async def status(self) -> dict[str, Any]:
        """What it serves (see `Following.status`), and how busy it is."""
        busy = {"rows": self.engine.running, "adapters": self.adapter_cache.held(), "steps": self.engine.steps}
        return self.watcher.status() | {"busy": busy}

    async def check_health(self) -> None:
        """Raises unless the decoder decodes: it has since the last check, or it does now."""
        if not self.engine.alive or self.engine.failures > 3:
            raise RuntimeError("the decoder has failed")
        moved, self._checked_steps = self.engine.steps != self._checked_steps, self.engine.steps
        if moved and self.engine.running:
            return
        ids = (*self.backbone.eos_ids[:1], *bos_ids(self.backbone.tokenizer))[-1:] or (0,)
        buffer = TokenBuffer()
        ticket = self.engine.submit(DecodeRequest(tuple(ids), 0, 1, (), greedy=True))
        self._routes[ticket] = buffer, Generation(0, self._base(BASE), {}, (), 1, ResponseText(self.backbone.tokenizer))
        try:
            async with asyncio.timeout(HEALTH_S):
                [(token, _), *_] = await buffer.take()
        finally:
            self._routes.pop(ticket, None)
            if self.engine.alive:
                self.engine.cancel(ticket)
        if token.end == "error":
            raise RuntimeError(f"the decoder has failed: {token.error}")
        self._checked_steps = self.engine.steps

    def gauges(self) -> None:
        """Figures that are set, not counted."""
        self.metrics.set("rows_running", self.engine.running)
        self.metrics.set("adapters_loaded", len(self.adapter_cache.held()))
        self.metrics.set("decode_steps", self.engine.steps)

    # ---- from an ask to rows -------------------------------------------------------------------------------------------

    def _admit(self, request: GenerationRequest, held: AsyncExitStack) -> None:
        room = self.limits.max_batch_rows + self.limits.max_waiting_rows
        if request.rows > room:
            raise ApiError(
                400, f"{request.rows} replies are asked for at once; at most {room} can be.", "too_many_replies", "n"
            )
        if self._reserved + request.rows > room:
            raise overloaded(self.limits.retry_after_s)
        self._reserved += request.rows
        held.callback(self._release, request.rows)

    def _release(self, rows: int) -> None:
        self._reserved -= rows

    async def _prepare(
        self, request: GenerationRequest, held: AsyncExitStack
    ) -> tuple[list[Generation], list[ServedModel], ServedModel | None]:
        """Choices ready to be submitted; who speaks; and who judges, if anybody."""
        served_models = [await self._served_model(model, held) for model in request.models]
        reward_model = await self._reward(request.reward, held) if request.reward else None
        generations: list[Generation] = []
        for prompt in request.prompts:
            for served in served_models:
                ids = await self.prompting.ids(prompt, served.template)
                room = self.prompting.room(len(ids), request.max_tokens)
                for _ in range(request.n):
                    text = ResponseText(self.backbone.tokenizer, request.stops)
                    generations.append(Generation(len(generations), served, prompt, ids, room, text))
        return generations, served_models, reward_model

    async def _served_model(self, model: str, held: AsyncExitStack) -> ServedModel:
        if model == BASE:
            return self._base(model)
        version = self._version(model)
        served = await self._loaded_model(model, version, held)
        if served.cached is not None and served.cached.loaded.kind == "reward":
            raise ApiError(
                400, f"{model!r} is a reward model: it scores replies, and writes none.", "not_a_policy", "model"
            )
        return served

    def _base(self, model: str) -> ServedModel:
        return ServedModel(model, BASE, self.backbone.identity.weights_sha256, self.template, self.backbone.eos_ids)

    def _version(self, model: str) -> Version:
        version = self.model_index.resolve(model)
        if self.model_index.is_refused(model) or (version is not None and version.id in self.model_index.refused):
            raise adapter_refused(model)
        if version is None:
            raise model_not_found(model)
        return version

    async def _loaded_model(self, model: str, version: Version, held: AsyncExitStack) -> ServedModel:
        try:
            cached = await held.enter_async_context(self.adapter_cache.use(version.id, version.read))
        except CacheBusy:
            raise overloaded(self.limits.retry_after_s, "model") from None
        except RlhfRayError as error:
            self.model_index.refused[version.id] = "; ".join(map(str, error.problems))
            raise adapter_refused(model) from None
        self.model_index.known.setdefault(version.id, cached.loaded)
        return ServedModel(
            model, version.id, cached.loaded.sha256, cached.loaded.template, cached.loaded.stop_ids, cached
        )

    async def _reward(self, asked: str | bool, held: AsyncExitStack) -> ServedModel:
        there = self.model_index.rewards()
        name = asked if isinstance(asked, str) else self.config.reward or (there[0] if len(there) == 1 else None)
        if name is None:
            what = (
                "no reward adapter is served"
                if not there
                else f"several are served; name one of {', '.join(sorted(there))}"
            )
            raise ApiError(400, f"reward: {what}.", "no_reward", "reward")
        reward_model = await self._loaded_model(name, self._version(name), held)
        if reward_model.cached is None or reward_model.cached.head is None:
            raise ApiError(400, f"reward: {name!r} is no reward adapter.", "not_a_reward", "reward")
        return reward_model

    def _start(self, generations: Sequence[Generation], served_models: Sequence[ServedModel]) -> Event:
        base = self.backbone.identity.weights_sha256[:8]
        return {
            "prompt_tokens": sum({id(c.prompt): len(c.prompt_ids) for c in generations}.values()),
            "choices": [generation.served.model for generation in generations],
            "adapters": {
                s.model: {"id": s.id, "sha256": s.sha256, "fingerprint": f"{base}/{s.id}"} for s in served_models
            },
        }

    # ---- writing -------------------------------------------------------------------------------------------------------

    async def _write(
        self,
        request: GenerationRequest,
        generations: list[Generation],
        reward_model: ServedModel | None,
        deadline: float,
        arrived: float,
        buffer: TokenBuffer,
    ) -> AsyncIterator[list[Event]]:
        seed = request.seed if request.seed is not None else secrets.randbits(62)
        tickets = {}
        judging: set[asyncio.Task[None]] = set()
        left = len(generations)
        first = True
        self._running_requests += 1
        try:
            for generation in generations:
                ticket = self.engine.submit(self._request(request, generation, seed))
                tickets[generation] = ticket
                self._routes[ticket] = buffer, generation
            while left:
                async with asyncio.timeout_at(deadline):
                    got = await buffer.take()
                if first:
                    for name in {c.served.model for c in generations}:
                        self.metrics.observe("time_to_first_token_seconds", time.monotonic() - arrived, adapter=name)
                    first = False
                events: dict[int, Event] = {}
                last: list[Event] = []
                for found, generation in got:
                    if isinstance(found, dict):
                        left -= 1
                        last.append(
                            {
                                "i": generation.index,
                                "end": generation.end,
                                "completion_tokens": len(generation.response_ids),
                                **found,
                            }
                        )
                        self._count(generation, time.monotonic() - arrived)
                    elif isinstance(found, Exception):
                        raise found
                    elif generation.end is None:
                        self._say(request, generation, found, events)
                        if generation.end is not None:
                            if found.end is None:  # a stop string, of which the decoder knows nothing
                                self.engine.cancel(tickets[generation])
                            task = asyncio.create_task(self._score_response(request, generation, reward_model, buffer))
                            judging.add(task)
                if events or last:
                    yield [*events.values(), *last]
        finally:
            self._running_requests -= 1
            for generation, ticket in tickets.items():
                self._routes.pop(ticket, None)
                if generation.end is None and self.engine.alive:
                    self.engine.cancel(ticket)
            for task in judging:
                task.cancel()

    def _request(self, request: GenerationRequest, generation: Generation, seed: int) -> DecodeRequest:
        """Sample k of prompt p has the same random numbers whichever model writes it, so that only models make a difference."""
        per_prompt = len(request.models) * request.n
        prompt, sample = generation.index // per_prompt, generation.index % request.n
        cached = generation.served.cached
        return DecodeRequest(
            generation.prompt_ids,
            derived_seed(seed, "serve", prompt, sample),
            generation.room,
            generation.served.stop_ids,
            temperature=request.temperature or 1.0,
            top_p=request.top_p,
            top_k=request.top_k,
            greedy=request.temperature == 0,
            adapter=None if cached is None else cached.name,
        )

    def _say(
        self, request: GenerationRequest, generation: Generation, token: DecodedToken, events: dict[int, Event]
    ) -> None:
        """Take in one token: what can be said now goes into the event of its choice."""
        if token.end == "error":
            raise internal()
        generation.response_ids.append(token.token_id)
        generation.logprob += token.logprob
        generation.end = token.end
        said = generation.text.push(token.token_id) if token.end != "stop" else ""
        if token.end is not None:
            said += generation.text.finish()
        if generation.text.stopped:
            generation.end = "stop"
        if said or request.logprobs:
            event = events.setdefault(generation.index, {"i": generation.index, "text": ""})
            event["text"] += said
            if request.logprobs:
                event.setdefault("tokens", []).append([self._name(token.token_id), token.logprob])

    def _name(self, token_id: int) -> str:
        return str(self.backbone.tokenizer.decode([token_id]))

    async def _score_response(
        self, request: GenerationRequest, generation: Generation, reward_model: ServedModel | None, buffer: TokenBuffer
    ) -> None:
        """Put {reward, kl} of a finished reply, or the error, into the buffer."""
        try:
            found: dict[str, Any] = {}
            if reward_model is not None:
                found["reward"] = await self._reward_of(generation, reward_model)
            if request.kl:
                found["kl"] = await self._kl(request, generation)
            buffer.put((found, generation), urgent=True)
        except Exception as error:
            buffer.put((error if isinstance(error, ApiError) else internal(), generation), urgent=True)

    async def _reward_of(self, generation: Generation, reward_model: ServedModel) -> float | None:
        assert reward_model.cached is not None and reward_model.cached.head is not None
        same = (
            "ids" in generation.prompt
            or "raw" in generation.prompt
            or reward_model.template.sha256 == generation.served.template.sha256
        )
        prompt = generation.prompt_ids if same else await self.prompting.ids(generation.prompt, reward_model.template)
        return await self.scorer.reward(
            prompt, generation.response_ids, reward_model.cached.name, reward_model.cached.head
        )

    async def _kl(self, request: GenerationRequest, generation: Generation) -> float | None:
        """The k1 estimate on this one reply: log-probability under the adapter minus that under the base, nats."""
        if generation.served.cached is None:
            return 0.0
        base = await self.scorer.base_logprob(
            generation.prompt_ids, generation.response_ids, request.temperature or 1.0
        )
        return None if base is None else generation.logprob - base

    def _deliver(self, tokens: Sequence[DecodedToken]) -> None:
        """On the engine's thread."""
        self.loop.call_soon_threadsafe(self._route, tokens)

    def _route(self, tokens: Sequence[DecodedToken]) -> None:
        for token in tokens:
            route = self._routes.get(token.ticket)
            if route is not None:
                buffer, generation = route
                buffer.put((token, generation), token.end is not None, self._running_requests)

    def _count(self, generation: Generation, seconds: float) -> None:
        name = generation.served.model
        self.metrics.count("replies", adapter=name, end=str(generation.end))
        self.metrics.count("prompt_tokens", len(generation.prompt_ids), adapter=name)
        self.metrics.count("completion_tokens", len(generation.response_ids), adapter=name)
        self.metrics.observe("reply_seconds", seconds, adapter=name)

    def _keep(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
