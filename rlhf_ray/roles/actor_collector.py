"""Sampling and scoring by actors (`placement: split`): the same chunks, the same rows, the same numbers as on a rank of its own.

A rank hands all its chunks out at once, each rollout's reference straight on to a scorer: chunk c is scored while chunk c + 1 is
sampled, and a rollout travels once. A chunk whose generator is lost is sampled again as a whole; a chunk is a function of adapter
and prompts, so it comes out the same.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayTaskError

from rlhf_ray.batches import Rollout, Scores
from rlhf_ray.errors import InvariantError, Problem
from rlhf_ray.roles import invariants
from rlhf_ray.roles.actor_pool import (
    ATTEMPTS,
    LOST,
    ActorHandles,
    ActorPool,
    CallStats,
    PendingCall,
    ask_ref_store,
    put_adapter,
)
from rlhf_ray.roles.collector import Chunk, Collector, RankResults
from rlhf_ray.roles.generator import ActiveAdapter, Decoding
from rlhf_ray.roles.learner import PublishedAdapter
from rlhf_ray.roles.roles_log import Done
from rlhf_ray.runtime.session import Session

LOOK_S = 0.5
"""Seconds between two looks at whether somebody asked to stop."""


class RemoteRoles:
    """A rank's generators and scorers, and the adapters that it hands to them, as references into the object store.

    adapter_ref, version: of the policy.  synced_ref, synced_version: of what is the reference after a reset."""

    def __init__(self, actor_handles: ActorHandles, session: Session) -> None:
        def tell(line: str) -> None:
            session.console.log(f"rank {session.rank}: {line}")

        def warn(line: str) -> None:
            session.console.warn(f"rank {session.rank}: {line}")

        self.generators, self.scorers = (ActorPool(role, actor_handles, tell, warn) for role in ("generator", "scorer"))
        self.ref_store, self.session, self.tell = actor_handles.ref_store, session, tell
        self.version, self.adapter_ref = -1, None
        self.synced_version, self.synced_ref = -1, None

    def publish(self, adapter: PublishedAdapter) -> int:
        """Hand `adapter` over: rank 0 puts it into the object store, once. Every rank calls it. Returns the bytes put there."""
        self.adapter_ref, size = self._put(adapter)
        self.version = adapter.version
        return size

    def sync_reference(self, adapter: PublishedAdapter) -> None:
        """Let scorers take `adapter` for the reference. The policy published last is in the object store already."""
        if adapter.version == self.version:
            self.synced_ref = self.adapter_ref
        else:  # of a run that is resumed
            self.session.barrier()  # all ranks have fetched what was posted before
            self.synced_ref, _ = self._put(adapter)
        self.synced_version = adapter.version

    def _put(self, adapter: PublishedAdapter) -> tuple[Any, int]:
        reference, size = None, 0
        if self.session.is_main:
            reference, size = put_adapter(adapter.tensors)
            if self.ref_store is not None:
                ask_ref_store(self.ref_store, "post", adapter.version, [reference])
        self.session.barrier()
        if not self.session.is_main:
            [reference] = ask_ref_store(self.ref_store, "fetch", adapter.version)
        return reference, size

    def idle(self, busy: dict[str, float], step: float, waited: float) -> dict[str, float]:
        """RankResults of a step in which each role had nothing to do. busy: seconds of work by role, all actors together.  step:
        its seconds.  waited: the learner's, for rollouts and scores."""
        actor_handles = (self.generators, self.scorers)
        found = {f"time/idle_{p.role}": 1.0 - busy[p.role] / (len(p) * step) for p in actor_handles}
        found["time/idle_learner"] = waited / step
        return {name: min(max(share, 0.0), 1.0) for name, share in found.items()}

    def collector(self, chunk_size: int, pad_id: int) -> ActorCollector:
        """What has chunks sampled and scored by these actors."""
        return ActorCollector(self, self.session, chunk_size, pad_id)

    def wake(self) -> list[list[PendingCall]]:
        """Have all actors load their models, without waiting for it; see `introduce`."""
        return [pool.ask_all("describe") for pool in (self.generators, self.scorers)]

    def introduce(self, asked: list[list[PendingCall]]) -> list[tuple[str, dict[str, Any]]]:
        """("generator 0", what it says of itself) of every actor. asked: what `wake` gave."""
        found = []
        for pool, calls in zip((self.generators, self.scorers), asked):
            for said, work in pool.answers(calls, "loading its models"):
                where = {"pid": work.pid, "node": work.node, "gpus": work.gpus, "seconds": work.built}
                found.append((f"{pool.role} {work.index}", {**said, **where}))
        return found


@dataclass
class _ChunkInFlight:
    """One chunk under way. sampling, scoring: the calls of its present attempt; tries: attempts so far."""

    chunk: Chunk
    sampling: PendingCall
    scoring: PendingCall
    tries: int = 1


class ActorCollector(Collector):
    """A collector whose generator and scorer are actors."""

    def __init__(self, remote_roles: RemoteRoles, session: Session, chunk_size: int, pad_id: int) -> None:
        super().__init__(session, chunk_size, pad_id)
        self.remote_roles = remote_roles

    def explain(self, error: InvariantError, adapter: PublishedAdapter) -> InvariantError:
        """`error`, which says that sampler and learner disagree, with the tensor in which each generator differs most."""
        lines = []
        pool = self.remote_roles.generators
        for tensors, work in pool.answers(pool.ask_all("tensors"), "showing its adapter"):
            worst = invariants.worst_tensor(tensors, adapter.tensors)
            who = f"generator {work.index}"
            lines.append(
                f"{who} holds the learner's adapter, all {len(tensors)} tensors: look for precision, temperature or base"
                if worst is None
                else f"{who} differs most in {worst.name} (by {worst.gap:.3g}; sha256 {worst.theirs}, learner {worst.ours})"
            )
        first = error.problems[0]
        return InvariantError(Problem(first.where, first.what, first.expected, first.got, "; ".join(lines)))

    def begin(
        self,
        mine: Sequence[Chunk],
        adapter: ActiveAdapter,
        decoding: Decoding,
        role: str,
        step: int,
        reference: ActiveAdapter | None,
    ) -> Callable[[], RankResults]:
        stop_requested = partial(self.stop_requested, role)
        job = _ChunksInFlight(self.remote_roles, adapter, decoding, role, step, reference, stop_requested)
        job.send(mine)
        return job.wait


class _ChunksInFlight:
    """The chunks of one rank in one step, sampled by the adapter, and scored against the reference, that were handed over last when
    they were sent."""

    def __init__(
        self,
        remote_roles: RemoteRoles,
        adapter: ActiveAdapter,
        decoding: Decoding,
        role: str,
        step: int,
        reference: ActiveAdapter | None,
        stop_requested: Callable[[], str],
    ) -> None:
        """stop_requested: who asked to stop, if anybody did; the chunks are then left."""
        pairs = [(adapter, remote_roles.version)]
        pairs += [] if reference is None else [(reference, remote_roles.synced_version)]
        for wanted, handed_over in pairs:
            if wanted.version != handed_over:
                raise InvariantError.at(
                    f"step {step}",
                    "an adapter was requested that was not handed over",
                    str(handed_over),
                    str(wanted.version),
                )
        self.remote_roles, self.adapter, self.decoding, self.reference = remote_roles, adapter, decoding, reference
        # newer ones may be handed over while these chunks are under way
        self.adapter_ref, self.synced_ref = remote_roles.adapter_ref, remote_roles.synced_ref
        self.role, self.step, self.stop_requested = role, step, stop_requested
        self.results = RankResults(busy={"generator": 0.0, "scorer": 0.0}, faults={"faults/retries": 0.0})
        self.flying: dict[int, _ChunkInFlight] = {}
        self.sampled: dict[int, float] = {}
        # What each actor has been given, by role and index: chunk number and call. It answers in that order, so that only the first
        # of each need be looked at, however many chunks there are.
        self.given: dict[tuple[str, int], deque[tuple[int, PendingCall]]] = {}
        self.heard = dict.fromkeys(
            ("generator", "scorer"), time.monotonic()
        )  # when something of a role's work last changed

    def send(self, mine: Sequence[Chunk]) -> None:
        """Hand all chunks out, without waiting for anything but a restart."""
        for chunk in mine:
            sampling = self._sample(chunk, 0)
            self.flying[chunk.number] = _ChunkInFlight(chunk, sampling, self._score(chunk, sampling.result, 0))

    def wait(self) -> RankResults:
        """What became of them. Its seconds are those of waiting: up to the last rollout, and from then to the last scores."""
        started = time.perf_counter()
        self.heard = dict.fromkeys(self.heard, time.monotonic())  # nobody has listened since they were sent
        done = self._land_all()
        last = max((when for when, *_ in done.values()), default=started)
        self.results.seconds = {"time/generate": last - started, "time/score": time.perf_counter() - last}
        for number in sorted(done):
            self.results.rollouts.append(done[number][1])
            self.results.scores.append(done[number][2])
        return self.results

    def _land_all(self) -> dict[int, tuple[float, Rollout, Scores]]:
        """Chunk number -> (when its rollout was seen, rollout, scores)."""
        done: dict[int, tuple[float, Rollout, Scores]] = {}
        while self.flying:
            ended = self._watch()
            if (why := self.stop_requested()) != "":
                self.results.abandoned = why
                return {}
            for number in dict.fromkeys(ended):
                if (landed := self._land(self.flying[number])) is not None:
                    done[number] = (self.sampled.get(number, time.perf_counter()), *landed)
                    del self.flying[number]
        return done

    def _sample(self, chunk: Chunk, attempt: int) -> PendingCall:
        what = (chunk.prompts, self.adapter, self.adapter_ref, self.decoding, self.role, self.step)
        pool = self.remote_roles.generators
        return self._note(pool, chunk, pool.submit(chunk.number + attempt, "generate_with", *what))

    def _score(self, chunk: Chunk, rollout: Any, attempt: int) -> PendingCall:
        what, pool = (rollout, chunk.rows, self.decoding.temperature), self.remote_roles.scorers
        if self.reference is None:
            return self._note(pool, chunk, pool.submit(chunk.number + attempt, "score_at", *what))
        what_with = (*what, self.reference, self.synced_ref)
        return self._note(pool, chunk, pool.submit(chunk.number + attempt, "score_with", *what_with))

    def _note(self, pool: ActorPool, chunk: Chunk, call: PendingCall) -> PendingCall:
        self.given.setdefault((pool.role, call.index), deque()).append((chunk.number, call))
        self.heard[pool.role] = time.monotonic()
        return call

    def _watch(self) -> list[int]:
        """Wait until something happens; the chunks that have been scored or lost. A role that is silent for its timeout loses the
        actor that has its oldest work."""
        while True:
            first = self._first_of_each_actor()
            ready, _ = ray.wait(list(first), num_returns=1, timeout=LOOK_S)
            if ready and len(first) > 1:  # the others that have ended meanwhile, in the same look
                ready, _ = ray.wait(list(first), num_returns=len(first), timeout=0)
            ended = [number for work in ready for number in self._ended(*first[work])]
            for pool, doing in ((self.remote_roles.generators, "sampling"), (self.remote_roles.scorers, "scoring")):
                self._end_if_silent(pool, doing)
            if ready or self.stop_requested():
                return ended

    def _first_of_each_actor(self) -> dict[Any, tuple[str, int]]:
        """The reference to what each actor has to do first -> its key in `given`. What another actor has got since is dropped."""
        first: dict[Any, tuple[str, int]] = {}
        for key, calls in self.given.items():
            while calls and not self._is_under_way(key[0], *calls[0]):
                calls.popleft()
            if calls:
                first[calls[0][1].work] = key
        return first

    def _is_under_way(self, role: str, number: int, call: PendingCall) -> bool:
        flight = self.flying.get(number)
        return flight is not None and call is (flight.sampling if role == "generator" else flight.scoring)

    def _ended(self, role: str, index: int) -> list[int]:
        """An actor has done, or lost, the first of what it had. The chunk, unless it is yet to be scored."""
        number, call = self.given[role, index].popleft()
        self.heard[role] = time.monotonic()
        if role == "scorer":
            return [number]
        self.heard["scorer"] = self.heard[role]  # there is one more to score
        self.sampled[number] = time.perf_counter()
        try:
            ray.get(call.work)
        except Exception:  # whoever lands the chunk raises it, or sends the chunk on its way again
            return [number]
        return []

    def _end_if_silent(self, pool: ActorPool, doing: str) -> None:
        now = time.monotonic()
        if now - self.heard[pool.role] <= pool.timeout_s:
            return
        self.heard[pool.role] = now
        scoring = doing == "scoring"
        waiting = next((f for n, f in self.flying.items() if (n in self.sampled) == scoring), None)
        if waiting is not None:
            call = waiting.scoring if scoring else waiting.sampling
            pool.end(call.index, self._doing(waiting, doing))

    def _land(self, flight: _ChunkInFlight) -> tuple[Rollout, Scores] | None:
        """Rollout and scores of a chunk that has ended; None if it was lost, and is sent on its way again."""
        try:
            rollout, sampling = self._get(self.remote_roles.generators, flight, flight.sampling, "sampling")
        except LOST as error:
            self._again(flight, self.remote_roles.generators, flight.sampling.index, error, "sampling")
            self.sampled.pop(flight.chunk.number, None)
            flight.sampling = self._sample(flight.chunk, flight.tries)
            flight.scoring = self._score(flight.chunk, flight.sampling.result, flight.tries)
            return None
        self._check_echo(rollout, flight)
        try:
            scores, scoring = self._get(self.remote_roles.scorers, flight, flight.scoring, "scoring")
        except LOST as error:
            self._again(flight, self.remote_roles.scorers, flight.scoring.index, error, "scoring")
            flight.scoring = self._score(flight.chunk, flight.sampling.result, flight.tries)
            return None
        self.results.busy["generator"] += sampling.seconds
        self.results.busy["scorer"] += scoring.seconds
        number = flight.chunk.number
        self.results.done += [Done("generator", number, sampling), Done("scorer", number, scoring)]
        return rollout, scores

    def _get(self, pool: ActorPool, flight: _ChunkInFlight, call: PendingCall, doing: str) -> tuple[Any, CallStats]:
        try:
            result, work = ray.get([call.result, call.work], timeout=self.remote_roles.generators.timeout_s)
        except RayTaskError as error:
            if isinstance(error.cause, LOST):  # of an argument, not of the role
                raise error.cause from error
            raise pool.raised(call.index, error, self._doing(flight, doing)) from error
        return result, work

    def _again(self, flight: _ChunkInFlight, pool: ActorPool, index: int, error: BaseException, doing: str) -> None:
        """Count an attempt that was lost. Raises Interrupted when there have been enough."""
        pool.lost(index)
        what = self._doing(flight, doing)
        if flight.tries >= ATTEMPTS:
            raise pool.exhausted(index, error, what) from error
        flight.tries += 1
        self.results.faults["faults/retries"] += 1.0
        why = pool.kind(index, error)
        self.remote_roles.tell(f"{pool.role} {index}: lost while {what} ({why}); the chunk is done again")

    def _check_echo(self, rollout: Rollout, flight: _ChunkInFlight) -> None:
        if (rollout.adapter_version, rollout.adapter_sha256) != (self.adapter.version, self.adapter.sha256):
            raise invariants.stale_adapter(rollout, self.adapter.sha256, self.step, self.adapter.version)

    def _doing(self, flight: _ChunkInFlight, doing: str) -> str:
        return f"{doing} chunk {flight.chunk.number} of step {self.step}, adapter version {self.adapter.version}"
