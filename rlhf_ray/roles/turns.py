"""Several runs in one process on one base: one of them runs at a time, and all of them sample together.

Each run is an ordinary loop on a thread of its own. It has the turn until it samples: then its requests wait, and the next run has
the turn. When every run waits to sample, all requests are decoded as one batch, whose rows each name their adapter, and the runs go
on with their replies, one after the other in the order in which they came:

    run 1   score evaluate update | sample ...........................| score evaluate update | sample
    run 2                          score evaluate update | sample ....                         score ...
                                                         one decode of all rows

A step of decoding is bound by reading the base and by launching kernels, hardly by its rows, so the batch costs little more than
one run's. Nothing runs at the same time, so models, optimizers and engines need no locks, and the schedule follows from the order
and the tokens alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from rlhf_ray.models.shared_base import Place, SharedBase
from rlhf_ray.runtime.session import kept_generators
from rlhf_ray.runtime.signals import Stop
from rlhf_ray.sampler.engine import Sampler
from rlhf_ray.sampler.requests import DecodeRequest, DecodeResult, KeepStepping

Replies = Sequence[DecodeResult] | Exception
Decode = Callable[[Mapping[str, Sequence[DecodeRequest]]], Mapping[str, Replies]]
"""Requests by run -> replies, or what is wrong with that run's."""


@dataclass
class _Run:
    """requests: what it waits for; None while it runs or could.  replies: what it has been given."""

    requests: Sequence[DecodeRequest] | None = None
    replies: Replies | None = None


class Turns:
    """Who has the turn. Methods are called by the threads of the runs, `register` by anybody.

    told: hears the name of whoever has the turn, "" while all sample."""

    def __init__(self, decode: Decode, told: Callable[[str], object] = lambda name: None) -> None:
        self._decode, self._told = decode, told
        self._changed = threading.Condition()
        self._runs: dict[str, _Run] = {}  # in the order in which they came
        self._turn: str | None = None

    def register(self, name: str) -> None:
        """One more run, which from here on the others wait for. It calls `begin` next, and `leave` whatever happens."""
        with self._changed:
            if name in self._runs:
                raise ValueError(f"run {name} is there already")
            self._runs[name] = _Run()

    def begin(self, name: str) -> None:
        """Wait for the first turn."""
        with self._changed:
            self._next()
            self._changed.wait_for(lambda: self._turn == name)

    def sample(self, name: str, requests: Sequence[DecodeRequest]) -> list[DecodeResult]:
        """Give the turn away until all runs sample; then the replies to `requests`. Raises what is wrong with them, or with the
        whole batch."""
        run = self._runs[name]
        with self._changed:
            run.requests = requests
            self._turn = None
            self._next()
            self._changed.wait_for(lambda: self._turn == name)
        if run.requests is not None:  # the turn came without replies: it is this run's to decode for all
            self._decode_all()
        replies, run.replies = run.replies, None
        if isinstance(replies, Exception):
            raise replies
        return list(replies or ())

    def leave(self, name: str) -> None:
        """The run has ended. It has the turn, unless it never began."""
        with self._changed:
            del self._runs[name]
            if self._turn == name:
                self._turn = None
            self._next()

    def has_turn(self, name: str) -> bool:
        return self._turn == name

    def _next(self) -> None:
        """Give the turn to the first who need not wait for others; where there is none, to the first of all, who decodes."""
        if self._turn is None and self._runs:
            ready = [name for name, run in self._runs.items() if run.requests is None]
            self._turn = next(iter(ready or self._runs))
            self._told(self._turn if ready else "")
            self._changed.notify_all()

    def _decode_all(self) -> None:
        with self._changed:
            waiting = {name: run.requests for name, run in self._runs.items() if run.requests is not None}
        try:
            found = self._decode(waiting)
        except Exception as error:
            found = dict.fromkeys(waiting, error)
        with self._changed:
            for name in waiting:
                self._runs[name].requests, self._runs[name].replies = None, found[name]
            self._told(str(self._turn))


@dataclass
class _Sampling:
    """The sampler of all, and the rows that each run may have in a step."""

    sampler: Sampler | None = None
    rows: dict[str, int] = field(default_factory=dict)

    def decode(self, requests: Mapping[str, Sequence[DecodeRequest]]) -> Mapping[str, Replies]:
        assert self.sampler is not None
        self.sampler.max_rows = sum(self.rows[name] for name in requests)
        return self.sampler.run_apart(requests)


class Seats:
    """The runs of one process, and what they share.   told: see `Turns`."""

    def __init__(self, told: Callable[[str], object] = lambda name: None) -> None:
        self.base = SharedBase()
        self.sampling = _Sampling()
        self.turns = Turns(self.sampling.decode, told)

    def seat(self, name: str) -> Seat:
        """A seat for one more run. name: a Python identifier; no two runs have the same at one time."""
        self.turns.register(name)
        return Seat(self, name)


class Seat:
    """One run among those of a process; a `Session` hands it to the stage.  stop: ends this run and no other."""

    def __init__(self, seats: Seats, name: str) -> None:
        self.seats, self.name, self.stop = seats, name, Stop()
        self.place: Place = seats.base.place(name)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """All that the run does on its thread happens inside. Its adapters are gone at the end."""
        try:
            self.seats.turns.begin(self.name)
            try:
                yield
            finally:
                self.place.leave()
        finally:
            self.seats.sampling.rows.pop(self.name, None)
            self.seats.turns.leave(self.name)

    def waits(self) -> bool:
        """Whether it is another run's turn."""
        return not self.seats.turns.has_turn(self.name)

    def sampler(self, own: Sampler) -> SampledTogether:
        """What this run samples with. own: what it would sample with if it were alone; the first run's decodes for all."""
        sampling = self.seats.sampling
        sampling.sampler = sampling.sampler or own
        sampling.rows[self.name] = own.max_rows
        return SampledTogether(self)


class SampledTogether:
    """The part of `DecodeEngine` that a generator needs, on the batch of all runs."""

    def __init__(self, seat: Seat) -> None:
        self.seat = seat

    def run(
        self,
        requests: Sequence[DecodeRequest],
        keep_stepping: KeepStepping | None = None,
        idle_adapter: str | None = None,
    ) -> list[DecodeResult]:
        """See `DecodeEngine.run`. Meanwhile the other runs have their turns."""
        if keep_stepping is not None:
            raise ValueError("runs that share a base do not decode in lockstep with other ranks")
        self.seat.place.pause()
        try:
            with kept_generators():
                return self.seat.seats.turns.sample(self.seat.name, requests)
        finally:
            self.seat.place.resume()
