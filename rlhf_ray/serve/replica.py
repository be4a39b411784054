"""A replica: one base, the adapters on it, and the replies that are being written. Knows nothing of HTTP or of Ray.

Ask ──> names -> versions ──> prompt ids ──> slots ──> rows of the decode thread ──> text ──> reward, KL ──> events
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
from rlhf_ray.models.decode_types import DecodeRequest
from rlhf_ray.registry import Registry
from rlhf_ray.serve.asks import Ask
from rlhf_ray.serve.catalogue import BASE, Catalogue, Readout, Version, run_versions
from rlhf_ray.serve.choices import Choice, Speaker
from rlhf_ray.serve.engine import DecodeThread, Token
from rlhf_ray.serve.errors import ApiError, adapter_refused, internal, model_not_found, out_of_time, overloaded
from rlhf_ray.serve.following import Following, forget_the_dead
from rlhf_ray.serve.judge import Judge
from rlhf_ray.serve.listing import entries
from rlhf_ray.serve.mailbox import Mailbox
from rlhf_ray.serve.metrics import Metrics, NoMetrics
from rlhf_ray.serve.prompting import Prompting
from rlhf_ray.serve.slots import AdapterSlots, SlotsBusy
from rlhf_ray.serve.text import ReplyText

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
        self.slots = AdapterSlots[Readout](self.engine, self.limits.max_loaded_adapters)
        self.judge = Judge(self.engine)
        self.prompting = Prompting(self.backbone, self.limits)
        self.catalogue = Catalogue()
        registry = None if config.registry is None else Registry(config.registry)
        notes = Path(config.output_dir) / "replicas" / f"{name}.json"
        notes.parent.mkdir(parents=True, exist_ok=True)
        forget_the_dead(notes.parent)
        self.following = Following(self.catalogue, self.slots, self.backbone, registry, notes, self.metrics)
        self.started = int(time.time())
        self._routes: dict[int, tuple[Mailbox, Choice]] = {}
        self._asks = 0
        self._reserved = 0
        self._checked_steps = -1
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Serve the names there are, and follow the registry from now on."""
        await self.following.take(self.runs)
        await self.following.look()
        self._keep(self.following.forever(self.config.poll_interval_s))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.to_thread(self.engine.stop)
        self.following.notes.unlink(missing_ok=True)

    # ---- what it can be asked ------------------------------------------------------------------------------------------

    async def events(self, ask: Ask, arrived: float | None = None, whole: bool = False) -> AsyncIterator[list[Event]]:
        """Lists of events as in asks.py; closing the iterator frees every row. Errors are events as well.

        arrived: `time.monotonic()` that the deadline counts from; default now.  whole: nobody reads along (see mailbox.py)."""
        arrived = time.monotonic() if arrived is None else arrived
        deadline = self.loop.time() + self.limits.request_timeout_s
        try:
            async with AsyncExitStack() as held:
                async with asyncio.timeout_at(deadline):
                    self._admit(ask, held)
                    choices, speakers, judge = await self._prepare(ask, held)
                yield [{"start": self._start(choices, speakers)}]
                mailbox = Mailbox(whole and not ask.stops)  # a stop string has to be noticed on the way
                async for events in self._write(ask, choices, judge, deadline, arrived, mailbox):
                    yield events
        except ApiError as error:
            yield [{"error": error.as_dict()}]
        except TimeoutError:
            yield [{"error": out_of_time(self.limits.request_timeout_s).as_dict()}]

    async def models(self) -> list[dict[str, Any]]:
        """See listing.py."""
        return entries(self.catalogue, self.started)

    async def status(self) -> dict[str, Any]:
        """What it serves (see `Following.status`), and how busy it is."""
        busy = {"rows": self.engine.running, "adapters": self.slots.held(), "steps": self.engine.steps}
        return self.following.status() | {"busy": busy}

    async def check_health(self) -> None:
        """Raises unless the decoder decodes: it has since the last check, or it does now."""
        if not self.engine.alive or self.engine.failures > 3:
            raise RuntimeError("the decoder has failed")
        moved, self._checked_steps = self.engine.steps != self._checked_steps, self.engine.steps
        if moved and self.engine.running:
            return
        ids = (*self.backbone.eos_ids[:1], *bos_ids(self.backbone.tokenizer))[-1:] or (0,)
        mailbox = Mailbox()
        ticket = self.engine.submit(DecodeRequest(tuple(ids), 0, 1, (), greedy=True))
        self._routes[ticket] = mailbox, Choice(0, self._base(BASE), {}, (), 1, ReplyText(self.backbone.tokenizer))
        try:
            async with asyncio.timeout(HEALTH_S):
                [(token, _), *_] = await mailbox.take()
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
        self.metrics.set("adapters_loaded", len(self.slots.held()))
        self.metrics.set("decode_steps", self.engine.steps)

    # ---- from an ask to rows -------------------------------------------------------------------------------------------

    def _admit(self, ask: Ask, held: AsyncExitStack) -> None:
        room = self.limits.max_batch_rows + self.limits.max_waiting_rows
        if ask.rows > room:
            raise ApiError(
                400, f"{ask.rows} replies are asked for at once; at most {room} can be.", "too_many_replies", "n"
            )
        if self._reserved + ask.rows > room:
            raise overloaded(self.limits.retry_after_s)
        self._reserved += ask.rows
        held.callback(self._release, ask.rows)

    def _release(self, rows: int) -> None:
        self._reserved -= rows

    async def _prepare(self, ask: Ask, held: AsyncExitStack) -> tuple[list[Choice], list[Speaker], Speaker | None]:
        """Choices ready to be submitted; who speaks; and who judges, if anybody."""
        speakers = [await self._speaker(model, held) for model in ask.models]
        judge = await self._reward(ask.reward, held) if ask.reward else None
        choices: list[Choice] = []
        for prompt in ask.prompts:
            for speaker in speakers:
                ids = await self.prompting.ids(prompt, speaker.template)
                room = self.prompting.room(len(ids), ask.max_tokens)
                for _ in range(ask.n):
                    text = ReplyText(self.backbone.tokenizer, ask.stops)
                    choices.append(Choice(len(choices), speaker, prompt, ids, room, text))
        return choices, speakers, judge

    async def _speaker(self, model: str, held: AsyncExitStack) -> Speaker:
        if model == BASE:
            return self._base(model)
        version = self._version(model)
        speaker = await self._seated(model, version, held)
        if speaker.slot is not None and speaker.slot.loaded.kind == "reward":
            raise ApiError(
                400, f"{model!r} is a reward model: it scores replies, and writes none.", "not_a_policy", "model"
            )
        return speaker

    def _base(self, model: str) -> Speaker:
        return Speaker(model, BASE, self.backbone.identity.weights_sha256, self.template, self.backbone.eos_ids)

    def _version(self, model: str) -> Version:
        version = self.catalogue.resolve(model)
        if self.catalogue.is_refused(model) or (version is not None and version.id in self.catalogue.refused):
            raise adapter_refused(model)
        if version is None:
            raise model_not_found(model)
        return version

    async def _seated(self, model: str, version: Version, held: AsyncExitStack) -> Speaker:
        try:
            slot = await held.enter_async_context(self.slots.use(version.id, version.read))
        except SlotsBusy:
            raise overloaded(self.limits.retry_after_s, "model") from None
        except RlhfRayError as error:
            self.catalogue.refused[version.id] = "; ".join(map(str, error.problems))
            raise adapter_refused(model) from None
        self.catalogue.known.setdefault(version.id, slot.loaded)
        return Speaker(model, version.id, slot.loaded.sha256, slot.loaded.template, slot.loaded.stop_ids, slot)

    async def _reward(self, asked: str | bool, held: AsyncExitStack) -> Speaker:
        there = self.catalogue.rewards()
        name = asked if isinstance(asked, str) else self.config.reward or (there[0] if len(there) == 1 else None)
        if name is None:
            what = (
                "no reward adapter is served"
                if not there
                else f"several are served; name one of {', '.join(sorted(there))}"
            )
            raise ApiError(400, f"reward: {what}.", "no_reward", "reward")
        judge = await self._seated(name, self._version(name), held)
        if judge.slot is None or judge.slot.head is None:
            raise ApiError(400, f"reward: {name!r} is no reward adapter.", "not_a_reward", "reward")
        return judge

    def _start(self, choices: Sequence[Choice], speakers: Sequence[Speaker]) -> Event:
        base = self.backbone.identity.weights_sha256[:8]
        return {
            "prompt_tokens": sum({id(c.prompt): len(c.prompt_ids) for c in choices}.values()),
            "choices": [choice.speaker.model for choice in choices],
            "adapters": {s.model: {"id": s.id, "sha256": s.sha256, "fingerprint": f"{base}/{s.id}"} for s in speakers},
        }

    # ---- writing -------------------------------------------------------------------------------------------------------

    async def _write(
        self,
        ask: Ask,
        choices: list[Choice],
        judge: Speaker | None,
        deadline: float,
        arrived: float,
        mailbox: Mailbox,
    ) -> AsyncIterator[list[Event]]:
        seed = ask.seed if ask.seed is not None else secrets.randbits(62)
        tickets = {}
        judging: set[asyncio.Task[None]] = set()
        left = len(choices)
        first = True
        self._asks += 1
        try:
            for choice in choices:
                ticket = self.engine.submit(self._request(ask, choice, seed))
                tickets[choice] = ticket
                self._routes[ticket] = mailbox, choice
            while left:
                async with asyncio.timeout_at(deadline):
                    got = await mailbox.take()
                if first:
                    for name in {c.speaker.model for c in choices}:
                        self.metrics.observe("time_to_first_token_seconds", time.monotonic() - arrived, adapter=name)
                    first = False
                events: dict[int, Event] = {}
                last: list[Event] = []
                for found, choice in got:
                    if isinstance(found, dict):
                        left -= 1
                        last.append(
                            {"i": choice.index, "end": choice.end, "completion_tokens": len(choice.reply_ids), **found}
                        )
                        self._count(choice, time.monotonic() - arrived)
                    elif isinstance(found, Exception):
                        raise found
                    elif choice.end is None:
                        self._say(ask, choice, found, events)
                        if choice.end is not None:
                            if found.end is None:  # a stop string, of which the decoder knows nothing
                                self.engine.cancel(tickets[choice])
                            task = asyncio.create_task(self._judge(ask, choice, judge, mailbox))
                            judging.add(task)
                if events or last:
                    yield [*events.values(), *last]
        finally:
            self._asks -= 1
            for choice, ticket in tickets.items():
                self._routes.pop(ticket, None)
                if choice.end is None and self.engine.alive:
                    self.engine.cancel(ticket)
            for task in judging:
                task.cancel()

    def _request(self, ask: Ask, choice: Choice, seed: int) -> DecodeRequest:
        """Sample k of prompt p has the same random numbers whichever model writes it, so that only models make a difference."""
        per_prompt = len(ask.models) * ask.n
        prompt, sample = choice.index // per_prompt, choice.index % ask.n
        slot = choice.speaker.slot
        return DecodeRequest(
            choice.prompt_ids,
            derived_seed(seed, "serve", prompt, sample),
            choice.room,
            choice.speaker.stop_ids,
            temperature=ask.temperature or 1.0,
            top_p=ask.top_p,
            top_k=ask.top_k,
            greedy=ask.temperature == 0,
            adapter=None if slot is None else slot.name,
        )

    def _say(self, ask: Ask, choice: Choice, token: Token, events: dict[int, Event]) -> None:
        """Take in one token: what can be said now goes into the event of its choice."""
        if token.end == "error":
            raise internal()
        choice.reply_ids.append(token.token_id)
        choice.logprob += token.logprob
        choice.end = token.end
        said = choice.text.push(token.token_id) if token.end != "stop" else ""
        if token.end is not None:
            said += choice.text.finish()
        if choice.text.stopped:
            choice.end = "stop"
        if said or ask.logprobs:
            event = events.setdefault(choice.index, {"i": choice.index, "text": ""})
            event["text"] += said
            if ask.logprobs:
                event.setdefault("tokens", []).append([self._name(token.token_id), token.logprob])

    def _name(self, token_id: int) -> str:
        return str(self.backbone.tokenizer.decode([token_id]))

    async def _judge(self, ask: Ask, choice: Choice, judge: Speaker | None, mailbox: Mailbox) -> None:
        """Put {reward, kl} of a finished reply, or the error, into the mailbox."""
        try:
            found: dict[str, Any] = {}
            if judge is not None:
                found["reward"] = await self._score(choice, judge)
            if ask.kl:
                found["kl"] = await self._kl(ask, choice)
            mailbox.put((found, choice), urgent=True)
        except Exception as error:
            mailbox.put((error if isinstance(error, ApiError) else internal(), choice), urgent=True)

    async def _score(self, choice: Choice, judge: Speaker) -> float | None:
        assert judge.slot is not None and judge.slot.head is not None
        same = (
            "ids" in choice.prompt or "raw" in choice.prompt or judge.template.sha256 == choice.speaker.template.sha256
        )
        prompt = choice.prompt_ids if same else await self.prompting.ids(choice.prompt, judge.template)
        return await self.judge.reward(prompt, choice.reply_ids, judge.slot.name, judge.slot.head)

    async def _kl(self, ask: Ask, choice: Choice) -> float | None:
        """The k1 estimate on this one reply: log-probability under the adapter minus that under the base, nats."""
        if choice.speaker.slot is None:
            return 0.0
        base = await self.judge.base_logprob(choice.prompt_ids, choice.reply_ids, ask.temperature or 1.0)
        return None if base is None else choice.logprob - base

    def _deliver(self, tokens: Sequence[Token]) -> None:
        """On the engine's thread."""
        self.loop.call_soon_threadsafe(self._route, tokens)

    def _route(self, tokens: Sequence[Token]) -> None:
        for token in tokens:
            route = self._routes.get(token.ticket)
            if route is not None:
                mailbox, choice = route
                mailbox.put((token, choice), token.end is not None, self._asks)

    def _count(self, choice: Choice, seconds: float) -> None:
        name = choice.speaker.model
        self.metrics.count("replies", adapter=name, end=str(choice.end))
        self.metrics.count("prompt_tokens", len(choice.prompt_ids), adapter=name)
        self.metrics.count("completion_tokens", len(choice.reply_ids), adapter=name)
        self.metrics.observe("reply_seconds", seconds, adapter=name)

    def _keep(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
