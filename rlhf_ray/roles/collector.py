"""Sampling and scoring all rows of a step over all ranks.

A step's rows are cut by index into chunks; chunk c belongs to rank c mod world size. Results are ordered by row, so they do not
depend on how many ranks there are. `LocalCollector` samples and scores a rank's chunks on the rank itself, `ActorCollector`
(actor_collector.py) has actors do it; what both share is `Collector`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from rlhf_ray.batches import PromptBatch, Rollout, Scores
from rlhf_ray.data.collate import TokenisedPrompt, prompt_batch
from rlhf_ray.data.records import Row
from rlhf_ray.errors import InvariantError
from rlhf_ray.roles.generator import ActiveAdapter, Decoding, Generator
from rlhf_ray.roles.minibatches import chunks
from rlhf_ray.roles.roles_log import Done
from rlhf_ray.roles.scorer import PendingScores, Scorer
from rlhf_ray.runtime.fault_injection import fault_point, inject_nan
from rlhf_ray.runtime.session import Session
from rlhf_ray.runtime.signals import Abandoned


@dataclass(frozen=True)
class Collected:
    """All rows of a step, on every rank.  seconds: of this rank, by phase.  busy: seconds of work by role, faults: counted, done:
    which actor did which chunk, over all ranks; all three empty where a rank does everything itself."""

    rollout: Rollout
    scores: Scores
    seconds: dict[str, float]
    busy: dict[str, float] = field(default_factory=dict)
    faults: dict[str, float] = field(default_factory=dict)
    done: list[Done] = field(default_factory=list)


@dataclass(frozen=True)
class Chunk:
    """Rows that are sampled together. number: in the step.  rows: the data rows behind the prompts."""

    number: int
    prompts: PromptBatch
    rows: list[Row]


@dataclass
class RankResults:
    """What became of one rank's chunks; see `Collected`. Gathered over ranks as it is.  abandoned: who asked to stop, if they were
    left."""

    rollouts: list[Rollout] = field(default_factory=list)
    scores: list[Scores] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: {"time/generate": 0.0, "time/score": 0.0})
    busy: dict[str, float] = field(default_factory=dict)
    faults: dict[str, float] = field(default_factory=dict)
    done: list[Done] = field(default_factory=list)
    abandoned: str = ""


@dataclass(frozen=True)
class PendingCollection:
    """Rows on their way. chunks: this rank's number of them.  rows: of all ranks.  wait: does, or waits for, this rank's chunks."""

    chunks: int
    rows: int
    adapter: ActiveAdapter
    reference: ActiveAdapter | None
    wait: Callable[[], RankResults]


class Collector(ABC):
    """lockstep: every forward pass is a collective (ZeRO-3).

    abandons: whether a rollout may be left half done; not where one is begun before the step it is for."""

    abandons = True

    def __init__(self, session: Session, chunk_size: int, pad_id: int, lockstep: bool = False) -> None:
        self.session, self.chunk_size, self.pad_id, self.lockstep = session, chunk_size, pad_id, lockstep

    @abstractmethod
    def begin(
        self,
        mine: Sequence[Chunk],
        adapter: ActiveAdapter,
        decoding: Decoding,
        role: str,
        step: int,
        reference: ActiveAdapter | None,
    ) -> Callable[[], RankResults]:
        """Begin this rank's chunks, where somebody else does them. Returns what does them, or waits for them."""

    def join(  # noqa: B027  (actors are never in lockstep)
        self, adapter: ActiveAdapter, reference: ActiveAdapter | None
    ) -> None:
        """In lockstep, what a rank without a chunk does while others do theirs."""

    def collect(
        self,
        prompts: Sequence[TokenisedPrompt],
        budgets: Sequence[int],
        adapter: ActiveAdapter,
        decoding: Decoding,
        role: str,
        step: int,
        reference: ActiveAdapter | None = None,
    ) -> Collected:
        """Sample one reply to each prompt (repeat a prompt for several) and score it. budgets: longest reply of each row.
        reference: the adapter that is the reference by now; None for the one that the run started from.

        Raises Abandoned, on every rank, if somebody asked to stop meanwhile; evaluations are finished."""
        return self.finish(self.start(prompts, budgets, adapter, decoding, role, step, reference))

    def start(
        self,
        prompts: Sequence[TokenisedPrompt],
        budgets: Sequence[int],
        adapter: ActiveAdapter,
        decoding: Decoding,
        role: str,
        step: int,
        reference: ActiveAdapter | None = None,
    ) -> PendingCollection:
        """Have it begun, where somebody else does it; see `collect`. Here it is done when it is asked for."""
        mine = [
            Chunk(number, self._batch(prompts, budgets, rows), [prompts[i].row for i in rows])
            for number, rows in enumerate(chunks(len(prompts), self.chunk_size))
            if number % self.session.world_size == self.session.rank
        ]
        wait = self.begin(mine, adapter, decoding, role, step, reference)
        return PendingCollection(len(mine), len(prompts), adapter, reference, wait)

    def finish(self, pending: PendingCollection) -> Collected:
        """All rows of what was started, on every rank; all ranks call it."""
        own = pending.wait()
        if self.lockstep and pending.chunks < -(-pending.rows // (self.chunk_size * self.session.world_size)):
            self.join(pending.adapter, pending.reference)  # the last round has no chunk for this rank
        ranks: list[RankResults] = self.session.gather(own)
        if (reason := next(filter(None, (rank.abandoned for rank in ranks)), "")) != "":
            raise Abandoned(reason)
        return Collected(
            Rollout.concat([rollout for rank in ranks for rollout in rank.rollouts], self.pad_id),
            Scores.concat([scores for rank in ranks for scores in rank.scores]),
            own.seconds,
            _summed(rank.busy for rank in ranks),
            _summed(rank.faults for rank in ranks),
            [done for rank in ranks for done in rank.done],
        )

    def explain(self, error: InvariantError, adapter: Any) -> InvariantError:
        """`error`, which says that sampler and learner disagree, with what more is known of why. Here they are one model.

        adapter: the `PublishedAdapter` of the learner."""
        return error

    def stop_requested(self, role: str) -> str:
        """Who asked to stop, if what is under way can be left: not where all ranks decode together, and not an evaluation."""
        return "" if self.lockstep or not self.abandons or role != "rollout" else self.session.stop.asked()

    def _batch(self, prompts: Sequence[TokenisedPrompt], budgets: Sequence[int], rows: range) -> PromptBatch:
        return prompt_batch(
            [prompts[i].ids for i in rows],
            row_ids=torch.tensor(list(rows)),
            max_new_tokens=torch.tensor([budgets[i] for i in rows]),
            pad_id=self.pad_id,
        )


class LocalCollector(Collector):
    """generator, scorer: this rank's own."""

    def __init__(
        self,
        generator: Generator,
        scorer: Scorer,
        session: Session,
        chunk_size: int,
        pad_id: int,
        lockstep: bool = False,
    ) -> None:
        super().__init__(session, chunk_size, pad_id, lockstep)
        self.generator, self.scorer = generator, scorer

    def begin(
        self,
        mine: Sequence[Chunk],
        adapter: ActiveAdapter,
        decoding: Decoding,
        role: str,
        step: int,
        reference: ActiveAdapter | None,
    ) -> Callable[[], RankResults]:
        return partial(self._sample_and_score, mine, adapter, decoding, role, step, reference)

    def _sample_and_score(
        self,
        mine: Sequence[Chunk],
        adapter: ActiveAdapter,
        decoding: Decoding,
        role: str,
        step: int,
        reference: ActiveAdapter | None,
    ) -> RankResults:
        """This rank's chunks, sampled and scored here, one after the other. What a reward has to wait for arrives while later
        chunks are sampled."""
        results, scored = RankResults(), list[PendingScores]()
        try:
            for chunk in mine:
                if (why := self.stop_requested(role)) != "":
                    return RankResults(seconds=results.seconds, abandoned=why)
                started = time.perf_counter()
                fault_point("generator", "sample", step, self.session.rank)
                rollout = self.generator.generate(chunk.prompts, adapter, decoding, role, step)
                sampled = time.perf_counter()
                for earlier in scored:
                    earlier.check()  # a reward that cannot be had ends the step now
                fault_point("scorer", "score", step, self.session.rank)
                scored.append(self.scorer.begin(rollout, chunk.rows, reference))
                results.rollouts.append(rollout)
                results.seconds["time/generate"] += sampled - started
                results.seconds["time/score"] += time.perf_counter() - sampled
            started = time.perf_counter()
            for pending in scored:
                scores = pending.result()
                results.scores.append(replace(scores, reward=inject_nan("scorer", "score", scores.reward, step)))
            results.seconds["time/score"] += time.perf_counter() - started
        finally:
            self.scorer.beside.drop()  # what nobody waits for any more
        return results

    def join(self, adapter: ActiveAdapter, reference: ActiveAdapter | None) -> None:
        self.generator.join(adapter)
        self.scorer.join(reference)


def _summed(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total
