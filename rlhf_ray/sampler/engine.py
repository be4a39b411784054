"""One continuous decode engine over a transformers model and its key-value cache; rollouts, evaluation and serving all use it.

A request waits, is read (all of its prompt but the last token, many prompts at once, into a cache of its own), is staged, gets a
slot, and from then on takes part in every step: one token for each row in a slot, the last prompt token first. A finished row
leaves its slot to a staged row; when none is left, the last row moves into the gap, so no step computes an empty slot. Where the
cache has a budget, rows of very different lengths are in groups of their own, which take their steps in turns (row_group.py).

    waiting --read prompts--> staged --slot free--> rows 0..n-1 --stop id or length--> result

The schedule depends on the requests and the tokens alone: equal requests give equal bits on the same model, versions, threads and
device, whoever runs them and whatever ran before.
"""

from __future__ import annotations

import inspect
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.cache_utils import Cache

from rlhf_ray.errors import ConfigError, InvariantError, RlhfRayError
from rlhf_ray.models.context import rope_limit
from rlhf_ray.sampler.adapter_routing import AdapterRouter
from rlhf_ray.sampler.kv_cache import SlotCache
from rlhf_ray.sampler.requests import (
    DecodeEvent,
    DecodeRequest,
    DecodeResult,
    KeepStepping,
    Limits,
    check_requests,
)
from rlhf_ray.sampler.row_group import GroupSize, RowGroup, group_to_join, keep_to_budget
from rlhf_ray.sampler.rows import PREFILL_TOKENS, Batch, DecodeRow, Reading, live, prompt_groups
from rlhf_ray.sampler.sampling import likeliest, sample_tokens
from rlhf_ray.sampler.state_cache import Caches
from rlhf_ray.sampler.static_step import StaticSteps, slides

__all__ = ["DecodeEvent", "DecodeRequest", "DecodeResult", "Sampler"]

STAGED_SHARE = 4
"""When slots become free, at least max_rows / 4 prompts are read at once: reading them one by one would cost a forward each."""

PASSES = 256
"""Rows that may be decoded before an earlier one which the cache has no room for."""

UNLIMITED = 2**31
"""Context of models that have no limit of their own."""
MOST_ROWS = {"cpu": 64, "cuda": 256}
"""Rows of a step where nobody sets them. A GPU reads the whole base in each step, so rows are nearly free until products of
matrices take as long (a 7B base on an A100: about 250 rows)."""
WIDTHS = {"cuda": 64}
"""Multiples of columns that a step attends to on a GPU: kernels and plans for few widths, not for a new one with each token."""


def rows_at_once(wanted: int | None, chunk: int, device: str) -> int:
    """max_rows of a sampler that is given `chunk` requests at a time, on a device of this type. wanted: what the job says.

    >>> rows_at_once(None, 512, "cuda"), rows_at_once(None, 512, "cpu"), rows_at_once(96, 64, "cpu")
    (256, 64, 64)
    """
    return min(MOST_ROWS.get(device, MOST_ROWS["cpu"]) if wanted is None else wanted, chunk)


class Sampler:
    """The decode engine (`decode_types.DecodeEngine`) over `model`, a transformers causal language model or a PEFT model of one.

    pad_id: any id of the vocabulary, used as padding and always masked.   max_rows: rows that take a step together.
    forward: how `model` is called where that must go through a module around it (ZeRO-3's hooks); None calls it directly.
    width_multiple: the columns that a step attends to are rounded up to one of it; default: WIDTHS of the model's device, else 1.
    chunk: prompt tokens that are read before the rows in their slots take their next step; a longer prompt is read in pieces
    (chunked prefill: Sarathi-Serve, arXiv:2403.02310). None reads prompts whole, and all that have a slot first: most tokens a
    second, and what training uses.   max_cached: tokens that the cache is kept to: of each group of rows, their number times the
    tokens of the longest one; others wait.
    static: steps over shapes that last, where rows share an adapter and all layers attend to all columns (static_step.py); without
    max_cached.
    prefill_tokens: prompt tokens that are read at once; default: PREFILL_TOKENS of the model's device.
    Not thread-safe. While it decodes, it alone may use the model; between calls it leaves no trace on it.
    Raises ConfigError if the model keeps state other than in a cache of transformers, or if pad_id is not in its vocabulary.
    """

    def __init__(
        self,
        model: nn.Module,
        pad_id: int,
        max_rows: int = 64,
        forward: Callable[..., Any] | None = None,
        width_multiple: int | None = None,
        chunk: int | None = None,
        max_cached: int | None = None,
        static: bool = False,
        prefill_tokens: int | None = None,
    ) -> None:
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        config = base.config.get_text_config()
        self._caches = Caches(base)
        _check_pad(config, pad_id)
        self._accepted = inspect.signature(base.forward).parameters
        self._vocabulary = int(config.vocab_size)
        self._context = min(int(getattr(config, "max_position_embeddings", None) or 0), rope_limit(config)[0])
        self._device: torch.device = base.get_input_embeddings().weight.device
        self._router = AdapterRouter(model, forward)
        self._pad_id = pad_id
        self.max_rows = max_rows
        can_be_static = static and forward is None and not self._caches.recurrent and not slides(config)
        can_be_static &= max_cached is None  # caches of several groups, which are made anew as others need room
        self._static = StaticSteps(pad_id) if can_be_static else None
        self._multiple = width_multiple or WIDTHS.get("cuda" if can_be_static else self._device.type, 1)
        self._chunk, self._max_cached = chunk, max_cached
        self._prefill_tokens = prefill_tokens or PREFILL_TOKENS.get(self._device.type, PREFILL_TOKENS["cpu"])
        self._ids = itertools.count()
        self._clear()

    def _clear(self, requests: Sequence[DecodeRequest] = ()) -> None:
        """Forget everything, free the cache; prepare for `requests`, or for whatever may be submitted if there is none."""
        self._waiting: deque[DecodeRow] = deque()
        self._staged: deque[DecodeRow] = deque()
        self._to_read: deque[list[DecodeRow]] = deque()  # prompts of staged rows, to be read together
        self._reading: Reading | None = None
        self._steps_first = 0  # before more is read of the prompts
        if not requests:
            cache = self._open_cache()
        elif len(requests) > self.max_rows:
            longest = max(len(r.prompt_ids) + r.max_new_tokens for r in requests)
            cache = self._caches.slots(self.max_rows, longest, multiple=self._multiple, whole=True)
        else:  # all begin together, and end before the columns do
            longest = max(len(r.prompt_ids) for r in requests) + max(r.max_new_tokens for r in requests)
            cache = self._caches.slots(len(requests), longest, multiple=self._multiple, whole=True, spare=0)
        self._groups = [RowGroup(cache)]  # the one whose turn it is first

    def _open_cache(self) -> SlotCache:
        """Of whatever may come."""
        return self._caches.slots(
            self.max_rows, self._context or UNLIMITED, multiple=self._multiple, max_cells=self._max_cached
        )

    def _new_group(self) -> RowGroup:
        taken = {group.number for group in self._groups}
        return RowGroup(self._open_cache(), next(number for number in itertools.count() if number not in taken))

    @property
    def _decoding(self) -> list[DecodeRow]:
        return [row for group in self._groups for row in live(group.rows)]

    # ---- the engine, as callers see it ------------------------------------------------------------------------------------

    def run(
        self,
        requests: Sequence[DecodeRequest],
        keep_stepping: KeepStepping | None = None,
        idle_adapter: str | None = None,
    ) -> list[DecodeResult]:
        """See `DecodeEngine.run`. Rows are admitted in the order of the requests."""
        check_requests(requests, self._limits())
        rows = self._begin(requests)
        try:
            with self.session():
                while True:
                    busy = self.busy
                    more = keep_stepping(busy) if keep_stepping is not None else busy
                    if busy:
                        if (error := _broken(self._advance(), rows)) is not None:
                            raise error
                    elif more:
                        self._idle_forward(idle_adapter)
                    else:
                        return [row.result() for row in rows]
        finally:
            self._clear()

    def run_apart(
        self, requests: Mapping[str, Sequence[DecodeRequest]]
    ) -> dict[str, list[DecodeResult] | RlhfRayError]:
        """`run` for several owners in one batch, whose rows are admitted owner by owner.

        An owner of whom a request is wrong, or whose logits are not finite, gets the error that `run` would raise, and the others
        their replies. What breaks a forward as a whole is raised."""
        found: dict[str, list[DecodeResult] | RlhfRayError] = {}
        for owner, mine in requests.items():
            try:
                check_requests(mine, self._limits())
            except ConfigError as error:
                found[owner] = error
        queued = iter(self._begin([r for owner, mine in requests.items() if owner not in found for r in mine]))
        rows = {
            owner: list(itertools.islice(queued, len(mine))) for owner, mine in requests.items() if owner not in found
        }
        try:
            with self.session():
                while self.busy:
                    events = self._advance()
                    for owner, theirs in rows.items():
                        if owner not in found and (broken := _broken(events, theirs)) is not None:
                            found[owner] = broken
                            for row in theirs:
                                self.cancel(row.id)
            return {
                owner: found[owner] if owner in found else [row.result() for row in rows[owner]] for owner in requests
            }
        finally:
            self._clear()

    def submit(self, request: DecodeRequest) -> int:
        """See `DecodeEngine.submit`."""
        check_requests([request], self._limits())
        return self._queue(request).id

    def step(self) -> list[DecodeEvent]:
        """See `DecodeEngine.step`."""
        try:
            with self.session():
                return self._advance() if self.busy else []
        except BaseException:
            self._clear()  # a half-done forward must not become somebody's reply
            raise

    def cancel(self, request_id: int) -> bool:
        """See `DecodeEngine.cancel`."""
        for row in itertools.chain(self._waiting, self._staged, self._decoding):
            if row.id == request_id and row.end is None:
                row.end = "cancelled"
                break
        else:
            return False
        self._waiting = deque(row for row in self._waiting if row.end is None)
        self._staged = deque(row for row in self._staged if row.end is None)
        for group in self._groups:
            group.forget_ended()
        self._to_read = deque(together for together in map(live, self._to_read) if together)
        if self._reading is not None and not live(self._reading.rows):
            self._reading = None
        return True

    def release(self) -> None:
        """Give back the memory of the cache. Nothing happens while requests are there."""
        if not self.busy:
            self._clear()

    @property
    def busy(self) -> bool:
        """See `DecodeEngine.busy`."""
        return bool(self._waiting or self._staged or self._decoding)

    @property
    def free_slots(self) -> int:
        """See `DecodeEngine.free_slots`."""
        return max(0, self.max_rows - len(self._decoding) - len(self._staged) - len(self._waiting))

    @contextmanager
    def session(self) -> Iterator[None]:
        """Hold this around many `step` calls to prepare and restore the model once instead of at every step.

        Inside it the weights of adapters that rows are using must not change."""
        # Not inference_mode: tensors made in it can never meet autograd again, and a learner may share this model and its hooks.
        is_outermost = not self._router.is_open
        if is_outermost:
            for group in self._groups:
                group.batch = None  # it holds copies of adapter weights, which may have changed since
        try:
            with torch.no_grad(), self._router.session():
                yield
        finally:
            if is_outermost and self._static is not None:
                self._static.forget()

    # ---- the schedule -----------------------------------------------------------------------------------------------------

    def _limits(self) -> Limits:
        return Limits(self._vocabulary, self._context, self._router.names)

    def _begin(self, requests: Sequence[DecodeRequest]) -> list[DecodeRow]:
        """Queue `requests` in an engine that is empty, with a cache as long as they need."""
        if self.busy:
            raise RuntimeError("Sampler.run: the engine still has submitted requests")
        self._clear(requests)
        return [self._queue(request) for request in requests]

    def _queue(self, request: DecodeRequest) -> DecodeRow:
        row = DecodeRow(next(self._ids), request, frozenset(request.stop_ids), list(request.begun))
        self._waiting.append(row)
        return row

    def _advance(self) -> list[DecodeEvent]:
        """Exactly one forward: some prompts, or a part of one, or one token of every row of a group."""
        wanted = self.max_rows - len(self._decoding) - len(self._staged)
        if self._waiting and wanted > 0:
            self._stage(max(wanted, self.max_rows // STAGED_SHARE))
        waits = self._steps_first > 0 and (self._decoding or any(row.is_read for row in self._staged))
        if (self._reading is not None or self._to_read) and not waits:
            self._steps_first = len(self._groups) if self._chunk is not None else 0
            self._read_prompts()
            return []
        self._steps_first -= 1
        self._fill_slots()
        return self._decode()

    def _stage(self, count: int) -> None:
        """The next rows of the queue, up to one whose adapter cannot share a forward with those before it: it waits for them."""
        rows: list[DecodeRow] = []
        sizes = [group.size for group in self._groups]
        adapters = {row.request.adapter for row in (*self._decoding, *self._staged)}
        while self._waiting and len(rows) < count and (row := self._next(sizes, adapters)) is not None:
            adapters.add(row.request.adapter)
            rows.append(row)
        self._staged.extend(rows)
        mixed = self._router.mixes(row.request.adapter for row in rows)
        tokens = self._prefill_tokens if self._chunk is None else self._chunk
        self._to_read.extend(prompt_groups(rows, mixed, not self._caches.recurrent, tokens))

    def _next(self, sizes: list[GroupSize], adapters: set[str | None]) -> DecodeRow | None:
        """Takes the row that is staged next from the queue, into one of the groups. A long one that the cache has no room for yet
        lets shorter ones go first, PASSES of them at most: so it neither stops them nor waits on."""
        first = self._waiting[0]
        for place, row in enumerate(self._waiting):
            most = row.most
            if place and most >= first.most:
                continue  # has no room either; of four groups one might take it, but not before the first
            if not self._router.together(adapters | {row.request.adapter}):
                return None
            number = group_to_join(sizes, most, self.max_rows, self._max_cached)
            if number is not None:
                first.passed += place > 0
                del self._waiting[place]
                if number == len(sizes):
                    sizes.append(GroupSize())
                    self._groups.append(self._new_group())
                sizes[number] += most
                self._groups[number].coming.append(row)
                return row
            if first.passed >= PASSES:
                return None
        return None

    def _fill_slots(self) -> None:
        """Give free slots to staged rows, then close the gaps that are left with the last rows."""
        if not self._staged and all(row.end is None for group in self._groups for row in group.rows):
            return
        room = self.max_rows - len(self._decoding)
        coming = [row for row in self._staged if row.is_read][:room]
        self._staged = deque(row for row in self._staged if row not in coming)
        if self._max_cached is not None:  # before rows join: the caches must not grow for slots that are about to go
            for group in self._groups:
                group.close_gaps()
            for group in self._groups:
                if len(self._groups) > 1 and not group.rows and not group.coming:
                    self._groups = [other for other in self._groups if other is not group]
                    self._router.drop(group.stage)
        joining = [[row for row in group.coming if row in coming] for group in self._groups]
        if self._max_cached is not None:
            keep_to_budget(self._groups, joining, self.max_rows, self._max_cached)
        for group, rows in zip(self._groups, joining):
            group.join(rows)

    # ---- the forwards -----------------------------------------------------------------------------------------------------

    def _read_prompts(self) -> None:
        """Run all but the last token of some prompts, or the next part of them, LEFT padded (recurrent layers: of one length)."""
        if self._reading is None:
            self._reading = Reading.of(self._to_read.popleft(), self._pad_id, self._device, self._caches.prompts())
        reading, whole = self._reading, self._chunk is None or self._caches.recurrent or len(self._reading.ids) > 1
        end = reading.width if whole else min(reading.done + (self._chunk or 0), reading.width)
        forward = self._router.forward(reading.adapters, "prompts")
        mask = None if self._caches.recurrent else reading.positions[:, :end] >= 0
        part = slice(reading.done, end)
        self._logits(forward, reading.ids[:, part], mask, reading.positions[:, part].clamp(min=0), reading.cache)
        reading.done = end
        if end < reading.width:
            return
        self._reading = None
        self._caches.finish_read(reading.cache)
        for row, place in zip(reading.rows, reading.places):
            row.prefix = reading.cache, place
        if self._chunk is None and len(self._groups) == 1 and not self._decoding:
            self._groups[0].place(live(reading.rows), self.max_rows)

    def _decode(self) -> list[DecodeEvent]:
        """One token of every row of the group whose turn it is."""
        group = next(group for group in self._groups if group.rows)
        self._groups.remove(group)
        self._groups.append(group)
        rows = group.rows
        if group.batch is None:
            forward = self._router.forward([row.request.adapter for row in rows], group.stage)
            group.batch = Batch.of(rows, forward, self._device)
        batch = group.batch
        adapters = {row.request.adapter for row in rows}
        if self._static is not None and len(adapters) == 1 and group.cache.layers:
            logits = self._static_step(self._static, group.cache, batch, adapters.pop())
        else:
            logits = self._step(group.cache, batch)
        tokens, logprobs = sample_tokens(logits, batch.plan, batch.counters[1])
        ids, numbers = torch.stack(
            (tokens.double(), logprobs.double())
        ).tolist()  # both exact, and one wait for the GPU
        taken = zip(map(int, ids), numbers, likeliest(logits, batch.plan))
        events = [row.take(*got) for row, got in zip(rows, taken)]
        batch.advance(tokens)
        broken = [slot for slot, event in enumerate(events) if event.end == "error"]
        group.cache.clear(broken)
        return events

    def _step(self, cache: SlotCache, batch: Batch) -> Tensor:
        """Logits [N, V] of one token of every row."""
        cache.begin_step(len(batch.tokens), batch.longest)
        positions = batch.counters[0][:, None]
        mask = None
        if self._caches.attends:
            age = torch.arange(cache.width - 1, -1, -1, device=self._device)  # of each column; the current one's is 0
            mask = age <= positions
        logits = self._logits(batch.forward, batch.tokens[:, None], mask, positions, cache)
        cache.end_step()
        return logits

    def _static_step(self, static: StaticSteps, cache: SlotCache, batch: Batch, adapter: str | None) -> Tensor:
        forward = batch.forward

        def logits(ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
            return self._logits(forward, ids, mask, positions, cache)

        return static.step(cache, batch.tokens, batch.counters[0], batch.longest, logits, adapter)

    def _logits(
        self, forward: Callable[..., Any], ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Cache | None
    ) -> Tensor:
        """[N, V], of the last column.   ids, positions: i64[N, W].   mask: [N, cached + W], True on real tokens; None is all."""
        optional = {"position_ids": positions, "logits_to_keep": 1, "past_key_values": cache, "cache_params": cache}
        inputs = {name: value for name, value in optional.items() if name in self._accepted}
        mask = None if mask is None else mask.long()
        output = forward(input_ids=ids, attention_mask=mask, use_cache=cache is not None, **inputs)
        return output.logits[:, -1]

    def _idle_forward(self, adapter: str | None) -> None:
        ids = torch.full((1, 1), self._pad_id, device=self._device)
        self._logits(self._router.forward([adapter]), ids, torch.ones_like(ids), torch.zeros_like(ids), None)


def _broken(events: Sequence[DecodeEvent], rows: Sequence[DecodeRow]) -> InvariantError | None:
    """The error for the first of `rows` whose logits were not finite."""
    broken = {event.request_id for event in events if event.end == "error"}
    for index, row in enumerate(rows):
        if row.id in broken:
            return InvariantError.at(
                f"request {index} of the sampler, adapter {row.request.adapter or 'none'}",
                "the model's logits are not finite",
                "finite numbers",
                f"nan or inf at reply token {len(row.token_ids) - 1}",
                "look at the adapter's weights and at the base model's precision",
            )
    return None


def _check_pad(config: Any, pad_id: int) -> None:
    if not 0 <= pad_id < config.vocab_size:
        raise ConfigError.at("pad_id", "not in the vocabulary", f"0 <= id < {config.vocab_size}", str(pad_id))
