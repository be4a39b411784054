"""The thread that owns a base, its adapters and the sampler, and decodes all requests in one batch (continuous batching).

Only this thread touches the model. Other threads queue what they want of it: rows to decode, rows to cancel, or a function to be
called between two steps (to score responses). Rows join and leave the batch at every token; the tokens of a step go to one
callback, all together. Rows that wait for a place take turns (fair_queue.py). Adapters are made ready by other threads and put
beside the model (models/adapter_pool.py), where nothing that is in use changes; this thread alone lets them go.

A row that breaks fails alone. Logits that are not finite end their row; where a step raises, the rows that had not been through one
yet take theirs one by one (if it is none of them, all do), what raises again is refused, and all others go on behind the tokens
that they have.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from peft import PeftModel

from rlhf_ray.config import LoraConfig
from rlhf_ray.errors import ArtifactError, ConfigError, RlhfRayError
from rlhf_ray.models.adapter_files import AdapterFiles
from rlhf_ray.models.adapter_pool import AdapterPool, PackedAdapter
from rlhf_ray.models.adapter_targets import linear_layers, refused_by_peft
from rlhf_ray.models.adapters import adapter_parameters, adapter_sha256, add_from_files, remove_adapter, wrap
from rlhf_ray.models.backbone import Backbone
from rlhf_ray.sampler.engine import STAGED_SHARE, Sampler
from rlhf_ray.sampler.requests import DecodeEngine, DecodeEvent, DecodeRequest
from rlhf_ray.sampler.vllm_engine import VLLMEngine
from rlhf_ray.serve.fair_queue import FairQueue, Flow

log = logging.getLogger(__name__)
T = TypeVar("T")

NICENESS = 5
"""Of the decode thread, and so of torch's own threads that it starts: processes that accept, refuse and pass on requests come
first, since each of them needs milliseconds only, and decoding would keep them waiting for a whole time slice."""
PLACEHOLDER = "placeholder"
"""PEFT keeps one adapter active and must not lose it: a rank-1 one with B = 0 on a single layer, which no row ever names."""


IDLE_S = 10.0
"""After so long without a row the memory of the key-value cache is given back."""
CALLS_S = 0.05
"""So long calls may keep rows that decode waiting for their next step; one more that has begun is finished. Scoring clients that
ask again at once would otherwise have the thread for themselves."""
FAILURES = 3
"""Steps that raise one after the other, until all rows are given up: then it is not the rows."""


class DecodedToken(NamedTuple):
    """One token of one ticket. end: None while the row goes on; "error" if there will be no more, for the reason in `error`.
    top: (id, log-probability) of the likeliest tokens, if the request lists them."""

    ticket: int
    token_id: int
    logprob: float
    end: Literal["stop", "length", "error"] | None
    error: str = ""
    top: tuple[tuple[int, float], ...] = ()


Deliver = Callable[[Sequence[DecodedToken]], None]


@dataclass(eq=False, slots=True)
class _Row:
    """A row that is being decoded. tokens: so far.  proven: it has been through a step that did not raise."""

    ticket: int
    request: DecodeRequest
    request_id: int = -1
    tokens: list[int] = field(default_factory=list)
    proven: bool = False


_Call = tuple[Callable[[PeftModel], Any], Future[Any]]


class DecodeThread:
    """backbone: a causal language model without adapters.  max_rows: rows that take a step together.

    deliver: called on this thread with the tokens of every step; it must not block.  num_threads: of torch, on this thread.
    chunk, max_cached: see `Sampler`.  vllm: decodes in its place, and is closed at the end; then `backbone` may be without weights.
    Every public method may be called from any thread."""

    def __init__(
        self,
        backbone: Backbone,
        max_rows: int,
        deliver: Deliver,
        num_threads: int | None = None,
        chunk: int | None = None,
        max_cached: int | None = None,
        vllm: VLLMEngine | None = None,
    ) -> None:
        self.backbone, self.max_rows = backbone, max_rows
        self.has_weights = backbone.device.type != "meta"
        """Of `model`: else nothing can be scored on it."""
        self.model: PeftModel = _with_placeholder(backbone)
        self.pool = AdapterPool(self.model)
        self._vllm = vllm
        self.sampler: DecodeEngine = vllm or Sampler(
            self.model, backbone.pad_id, max_rows, chunk=chunk, max_cached=max_cached
        )
        self.steps = 0
        """Forward passes so far: a health check sees whether it moves."""
        self.calls_done = 0
        """Calls that did not raise, so far: a health check sees that moving as well."""
        self.failures = 0
        """Steps that raised, one after the other; 0 after one that did not."""
        self._deliver = deliver
        self._num_threads = num_threads
        self._tickets = itertools.count()
        self.longest_step_s = 0.0
        """The longest time between two steps while rows waited for the second one. Whoever reads it sets it to 0."""
        self._pending: deque[tuple[int, DecodeRequest | None, Flow]] = deque()  # to decode, or None: to cancel
        self._queue = FairQueue[DecodeRequest]()
        self._calls: deque[_Call] = deque()  # between two steps
        self._changes: deque[_Call] = deque()  # of PEFT's modules, which no step may see half done
        self._rows: dict[int, _Row] = {}  # by ticket
        self._by_id: dict[int, _Row] = {}  # by request id of the sampler
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)
        self._thread.start()

    # ---- from any thread -----------------------------------------------------------------------------------------------

    def submit(self, request: DecodeRequest, flow: Flow = ("", "", "")) -> int:
        """Queue a row; its tokens are delivered under the ticket that is returned. A bad request is delivered as an error.

        flow: whose turn it takes, by API key, model and request."""
        ticket = next(self._tickets)
        self._enqueue(ticket, request, flow)
        return ticket

    def cancel(self, ticket: int) -> None:
        """The row is dropped before the next step. No further token of it is delivered after that step; it has no last one."""
        self._enqueue(ticket, None)

    def call(self, function: Callable[[PeftModel], T], changes_modules: bool = False) -> Future[T]:
        """`function(model)` between two steps, on the decode thread, without gradients; after what was cancelled before is gone.

        changes_modules: it adds or removes adapters of PEFT; all batches are then put together anew."""
        future: Future[T] = Future()
        with self._changed:
            if self._stopping:
                raise RuntimeError("the engine is stopped")
            (self._changes if changes_modules else self._calls).append((function, future))
            self._changed.notify()
        return future

    def pack(self, files: AdapterFiles) -> PackedAdapter | None:
        """An adapter made ready for `add_adapter`; None if it has to go into PEFT's modules. Costs this thread nothing.

        ArtifactError if it does not fit the base, ConfigError if vLLM cannot have it."""
        fits = self.pool.fits(files)
        if self._vllm is not None and not fits:
            what = "vLLM cannot adapt stacked expert weights"
            raise ConfigError.at(files.path, what, "adapters of linear layers", fix="set engine: builtin")
        packed = self.pool.pack(files) if fits else None
        if self._vllm is not None and packed is not None and files.head is None:
            self._vllm.check_adapter(files.path, files.config, self.pool.unpacked(packed))
        return packed

    def add_adapter(self, name: str, packed: PackedAdapter | None, files: AdapterFiles) -> None:
        """Call it on a thread that may wait. files: with tensors, where `packed` is None."""
        if packed is None:
            self.call(lambda model: _add_to_peft(model, name, files), changes_modules=True).result()
            return
        if self.has_weights:
            self.pool.add(name, packed)
        if self._vllm is not None and files.head is None:  # replies are written by vLLM, and scored here
            try:
                self._hand_over(self._vllm, name, packed, files)
            except BaseException:
                self._forget(name)
                raise

    def remove_adapter(self, name: str) -> Future[None]:
        """Rows that use it must have been cancelled, or be over."""
        if self._vllm is not None or name in self.pool:
            return self.call(lambda _: self._forget(name))
        return self.call(lambda model: remove_adapter(model, name), changes_modules=True)

    def _hand_over(self, vllm: VLLMEngine, name: str, packed: PackedAdapter, files: AdapterFiles) -> None:
        number, ready = vllm.ready_adapter(name, files.config, self.pool.unpacked(packed))
        self.call(lambda _: vllm.put_adapter(name, number, ready)).result()

    def _forget(self, name: str) -> None:
        if name in self.pool:
            self.pool.remove(name)
        if self._vllm is not None:
            self._vllm.drop_adapter(name)

    def stop(self) -> None:
        """Ends the thread after the step it is in; rows that are left get an error."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def running(self) -> int:
        """Rows submitted and not over."""
        return len(self._rows) + len(self._queue) + len(self._pending)

    def waiting_by_model(self) -> dict[str, int]:
        """Rows that wait for a place, by the version of the model they are for."""
        return dict(self._queue.waiting(1))

    def _enqueue(self, ticket: int, request: DecodeRequest | None, flow: Flow = ()) -> None:
        with self._changed:
            if self._stopping:
                raise RuntimeError("the engine is stopped")
            self._pending.append((ticket, request, flow))
            self._changed.notify()

    # ---- on the decode thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # a thread of its own priority is Linux's alone
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)
        with torch.no_grad():
            while self._wait_for_work():
                self._run_calls(self._changes)
                try:
                    self._decode()
                except Exception as error:
                    self._fail_step(error)
        self._fail_rows("the service is stopping")
        for calls in (self._calls, self._changes):
            while calls:
                calls.popleft()[1].cancel()
        if self._vllm is not None:
            self._vllm.close()

    def _wait_for_work(self) -> bool:
        with self._changed:
            while not (self._stopping or self._pending or self._calls or self._changes or self.sampler.busy):
                if not self._changed.wait(IDLE_S):
                    self.sampler.release()
            return not self._stopping

    def _run_calls(self, calls: deque[_Call], seconds: float = math.inf) -> None:
        """Those that wait now, for about so long; what they make others ask for comes after the next step."""
        until = time.monotonic() + seconds
        for _ in range(len(calls)):
            self._admit_pending()  # rows that were cancelled before the call
            function, future = calls.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                found = function(self.model)
            except BaseException as error:
                future.set_exception(error)
            else:
                self.calls_done += 1
                future.set_result(found)
            if time.monotonic() >= until:
                return

    def _decode(self) -> None:
        """Step until no row is left, or a change of the modules waits, which a session must not see."""
        with self.sampler.session():
            since = time.monotonic()
            while not self._stopping and not self._changes:
                self._run_calls(self._calls, CALLS_S)
                self._admit_pending()
                self._feed()
                if not self.sampler.busy:
                    return
                events = self.sampler.step()
                self.steps += 1
                self.failures = 0
                self._take(events)
                now = time.monotonic()
                self.longest_step_s, since = max(self.longest_step_s, now - since), now

    def _admit_pending(self) -> None:
        while self._pending:
            ticket, request, flow = self._pending.popleft()
            if request is not None:
                self._queue.push(ticket, flow, len(request.prompt_ids) + request.max_new_tokens, request)
            elif not self._queue.remove(ticket) and ticket in self._rows:
                self.sampler.cancel(self._rows[ticket].request_id)
                self._drop(self._rows[ticket])

    def _feed(self) -> None:
        """Give the sampler the next rows: those that have a place, and as many more as it reads the prompts of together."""
        rejected = []
        while self._queue and len(self._rows) < self.max_rows + self.max_rows // STAGED_SHARE:
            row = _Row(*self._queue.pop())
            try:
                self._submit(row)
            except RlhfRayError as error:
                rejected.append(DecodedToken(row.ticket, -1, 0.0, "error", str(error)))
            else:
                self._rows[row.ticket] = row
        if rejected:
            self._deliver(rejected)

    def _submit(self, row: _Row) -> None:
        row.request_id = self.sampler.submit(replace(row.request, begun=tuple(row.tokens)))
        self._by_id[row.request_id] = row

    def _take(self, events: Sequence[DecodeEvent]) -> None:
        tokens = []
        for event in events:
            row = self._by_id[event.request_id]
            row.tokens.append(event.token_id)
            row.proven = True
            error = "the model's logits are not finite" if event.end == "error" else ""
            tokens.append(DecodedToken(row.ticket, event.token_id, event.logprob, event.end, error, event.top))
            if event.end is not None:
                self._drop(row)
        if tokens:
            self._deliver(tokens)

    def _drop(self, row: _Row) -> None:
        del self._rows[row.ticket], self._by_id[row.request_id]

    def _fail_step(self, error: Exception) -> None:
        """A step that raises empties the sampler: no response may be made of half a forward pass."""
        log.error("a decoding step failed", exc_info=error)
        self.failures += 1
        if self.failures < FAILURES:
            self._go_on_without_what_fails()
        else:
            self._fail_rows("a decoding step failed")
            time.sleep(0.01)

    def _go_on_without_what_fails(self) -> None:
        """The suspects take a step alone; what raises again has failed. First the rows without a step so far; the others too, where
        it was none of those, or not those alone. So a step that raises always finds its rows, whoever comes meanwhile."""
        self._by_id.clear()
        tried = [row for row in self._rows.values() if not row.proven]
        others = [row for row in self._rows.values() if row.proven]
        failed = self._try_alone(tried)
        if not failed or self.failures > 1:
            failed += self._try_alone(others)
            tried += others
        if 0 < failed < len(tried):
            self.failures = 0  # what stepped shows that it was those rows, and not the engine
        for row in list(self._rows.values()):
            try:
                self._submit(row)
            except RlhfRayError as error:  # this thread must outlive whatever a row asks for
                self._fail_alone(row, error)

    def _try_alone(self, suspects: Sequence[_Row]) -> int:
        """Each of these takes a step by itself, and leaves the sampler; how many failed."""
        failed = 0
        for row in suspects:
            try:
                self._submit(row)
                with self.sampler.session():
                    while not (events := self.sampler.step()):
                        pass
            except Exception as error:
                failed += 1
                self._by_id.clear()
                self._fail_alone(row, error)
            else:
                self._take(events)
                if row.ticket in self._rows:
                    self.sampler.cancel(row.request_id)
                    del self._by_id[row.request_id]
        return failed

    def _fail_alone(self, row: _Row, error: Exception) -> None:
        log.error("a row failed alone, under adapter %s", row.request.adapter, exc_info=error)
        del self._rows[row.ticket]
        self._deliver([DecodedToken(row.ticket, -1, 0.0, "error", "a decoding step failed")])

    def _fail_rows(self, why: str) -> None:
        if self._stopping:
            self._admit_pending()
        waiting = list(self._queue) if self._stopping else []
        failed = [DecodedToken(ticket, -1, 0.0, "error", why) for ticket in [*self._rows, *waiting]]
        self._rows.clear()
        self._by_id.clear()
        if failed:
            self._deliver(failed)


def _with_placeholder(backbone: Backbone) -> PeftModel:
    linear = linear_layers(backbone.model)
    refused = refused_by_peft(backbone.model, linear)
    first = next(name for name in linear if name.rpartition(".")[2] not in refused)
    model = wrap(backbone.model, LoraConfig(r=1, lora_alpha=1.0, target_modules=(first,)), PLACEHOLDER, seed=0)
    model.requires_grad_(False)
    model.eval()
    return model


def _add_to_peft(model: PeftModel, name: str, files: AdapterFiles) -> None:
    """Add the adapter, and compare what the model now holds with the files."""
    add_from_files(model, name, files, trainable=False)
    model.eval()
    added = {key: parameter.detach().cpu() for key, parameter in adapter_parameters(model, name).items()}
    sha256 = files.sha256
    if files.tensors.keys() == added.keys():
        sha256 = adapter_sha256(added, files.head, files.offset)
    if sha256 != files.sha256:
        remove_adapter(model, name)
        raise ArtifactError.at(files.path, "the model does not hold the adapter that was read", files.sha256, sha256)
