"""The thread that owns a base, its adapters and the sampler, and decodes for everybody at once.

The model is touched by this thread alone. Whoever wants something of it leaves a message: a request to decode, a request to stop,
or a function to be called between two steps (to load an adapter, to score replies). Requests join and leave at every token; the
tokens of a step go to one callback, all together.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from peft import PeftModel

from rlhf_ray.config import LoraConfig
from rlhf_ray.errors import RlhfRayError
from rlhf_ray.models.adapter_targets import linear_layers
from rlhf_ray.models.adapters import wrap
from rlhf_ray.models.backbone import Backbone
from rlhf_ray.sampler.engine import Sampler
from rlhf_ray.sampler.requests import DecodeRequest

log = logging.getLogger(__name__)
T = TypeVar("T")

NICENESS = 5
"""Of the decode thread, and so of torch's own threads that it starts: processes that take in, refuse and hand over requests come
first, since each of them is needed for milliseconds only, and decoding would keep them waiting for a whole time slice."""
PLACEHOLDER = "placeholder"
"""PEFT keeps one adapter active and must not lose it: a rank-1 one with B = 0 on a single layer, which no row ever names."""


class DecodedToken(NamedTuple):
    """One token of one ticket. end: None while the row goes on; "error" if there will be no more, for the reason in `error`."""

    ticket: int
    token_id: int
    logprob: float
    end: Literal["stop", "length", "error"] | None
    error: str = ""


Deliver = Callable[[Sequence[DecodedToken]], None]


class DecodeThread:
    """backbone: a causal language model without adapters.  max_rows: rows that take a step together.

    deliver: called on this thread with the tokens of every step; it must not block.  num_threads: torch's, of this thread.
    Every public method may be called from any thread."""

    def __init__(self, backbone: Backbone, max_rows: int, deliver: Deliver, num_threads: int | None = None) -> None:
        self.backbone, self.max_rows = backbone, max_rows
        self.model: PeftModel = _with_placeholder(backbone)
        self.sampler = Sampler(self.model, backbone.pad_id, max_rows=max_rows)
        self.steps = 0
        """Forward passes so far: whoever watches sees whether it moves."""
        self.failures = 0
        """Steps that raised, one after the other; 0 after one that did not."""
        self._deliver = deliver
        self._num_threads = num_threads
        self._tickets = itertools.count()
        self._inbox: deque[tuple[int, DecodeRequest | None]] = deque()  # None: cancel
        self._calls: deque[tuple[Callable[[PeftModel], Any], Future[Any]]] = deque()
        self._rows: dict[int, int] = {}  # ticket -> request id of the sampler
        self._ticket_of: dict[int, int] = {}
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)
        self._thread.start()

    # ---- for everybody -------------------------------------------------------------------------------------------------

    def submit(self, request: DecodeRequest) -> int:
        """Queue a request; its tokens are delivered under the ticket that is returned. A bad one is delivered as an error."""
        ticket = next(self._tickets)
        self._send(ticket, request)
        return ticket

    def cancel(self, ticket: int) -> None:
        """The row is dropped before the next step. No further token of it is delivered after that step; it has no last one."""
        self._send(ticket, None)

    def call(self, function: Callable[[PeftModel], T]) -> Future[T]:
        """`function(model)` between two steps, on the engine's thread, without gradients."""
        future: Future[T] = Future()
        with self._wake:
            if self._stopping:
                raise RuntimeError("the engine is stopped")
            self._calls.append((function, future))
            self._wake.notify()
        return future

    def stop(self) -> None:
        """Ends the thread after the step it is in; rows that are left get an error."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def running(self) -> int:
        """Rows submitted and not over."""
        return len(self._rows) + len(self._inbox)

    # ---- the thread's own ----------------------------------------------------------------------------------------------

    def _send(self, ticket: int, request: DecodeRequest | None) -> None:
        with self._wake:
            if self._stopping:
                raise RuntimeError("the engine is stopped")
            self._inbox.append((ticket, request))
            self._wake.notify()

    def _run(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # a thread of its own priority is Linux's alone
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)
        with torch.no_grad():
            while self._wait():
                self._answer_calls()
                try:
                    self._decode()
                except Exception as error:
                    self._lose_rows(error)
        self._end_rows("the service is stopping")
        while self._calls:
            self._calls.popleft()[1].cancel()

    def _wait(self) -> bool:
        with self._wake:
            while not (self._stopping or self._inbox or self._calls or self.sampler.busy):
                self._wake.wait()
            return not self._stopping

    def _answer_calls(self) -> None:
        while self._calls:
            function, future = self._calls.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function(self.model))
            except BaseException as error:
                future.set_exception(error)

    def _decode(self) -> None:
        """Step until nothing is left to do, or a call waits: calls may change the model, which the session holds still."""
        with self.sampler.session():
            while not self._stopping and not self._calls:
                self._take_in()
                if not self.sampler.busy:
                    return
                events = self.sampler.step()
                self.steps += 1
                self.failures = 0
                tokens = []
                for event in events:
                    ticket = self._ticket_of[event.request_id]
                    error = "the model's logits are not finite" if event.end == "error" else ""
                    tokens.append(DecodedToken(ticket, event.token_id, event.logprob, event.end, error))
                    if event.end is not None:
                        self._forget(ticket)
                if tokens:
                    self._deliver(tokens)

    def _take_in(self) -> None:
        refused = []
        while self._inbox:
            ticket, request = self._inbox.popleft()
            if request is None:
                if ticket in self._rows:
                    self.sampler.cancel(self._rows[ticket])
                    self._forget(ticket)
                continue
            try:
                number = self.sampler.submit(request)
            except RlhfRayError as error:
                refused.append(DecodedToken(ticket, -1, 0.0, "error", str(error)))
            else:
                self._rows[ticket], self._ticket_of[number] = number, ticket
        if refused:
            self._deliver(refused)

    def _forget(self, ticket: int) -> None:
        del self._ticket_of[self._rows.pop(ticket)]

    def _lose_rows(self, error: Exception) -> None:
        """A step that raises empties the sampler: nobody's reply may be made of half a forward pass."""
        log.error("a decoding step failed", exc_info=error)
        self.failures += 1
        self._end_rows("a decoding step failed")
        time.sleep(0.01)

    def _end_rows(self, why: str) -> None:
        waiting = [ticket for ticket, request in self._inbox if request is not None] if self._stopping else []
        lost = [DecodedToken(ticket, -1, 0.0, "error", why) for ticket in [*self._rows, *waiting]]
        self._rows.clear()
        self._ticket_of.clear()
        if lost:
            self._deliver(lost)


def _with_placeholder(backbone: Backbone) -> PeftModel:
    first = next(iter(linear_layers(backbone.model)))
    model = wrap(backbone.model, LoraConfig(r=1, lora_alpha=1.0, target_modules=(first,)), PLACEHOLDER, seed=0)
    model.requires_grad_(False)
    model.eval()
    return model
