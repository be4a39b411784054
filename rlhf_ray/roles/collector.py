"""Sampling and scoring all rows of a step over all ranks.

A step's rows are cut by index into chunks; chunk c belongs to rank c mod world size. Results are ordered by row, so they do not
depend on how many ranks there are. A rank samples and scores its chunks itself; `split.SplitCollector` has actors do it.
"""

from __future__ import annotations

import time
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
from rlhf_ray.roles.scorer import Scorer
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
class Share:
    """What became of one rank's chunks; see `Collected`."""

    rollouts: list[Rollout] = field(default_factory=list)
    scores: list[Scores] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: {"time/generate": 0.0, "time/score": 0.0})
    busy: dict[str, float] = field(default_factory=dict)
    faults: dict[str, float] = field(default_factory=dict)
    done: list[Done] = field(default_factory=list)
    abandoned: str = ""


@dataclass(frozen=True)
class Started:
    """Rows on their way. chunks: this rank's number of them.  rows: of all ranks.  work: does, or waits for, this rank's share."""

    chunks: int
    rows: int
    adapter: ActiveAdapter
    work: Callable[[], Share]


class Collector:
    """generator, scorer: this rank's.  lockstep: their every forward pass is a collective (ZeRO-3).

    abandons: whether a rollout may be left half done; not where one is begun before the step it is for."""

    abandons = True

    def __init__(
        self,
        generator: Generator,
        scorer: Scorer,
        session: Session,
        chunk_size: int,
        pad_id: int,
        lockstep: bool = False,
    ) -> None:
        self.generator, self.scorer, self.session = generator, scorer, session
        self.chunk_size, self.pad_id, self.lockstep = chunk_size, pad_id, lockstep

    def collect(
        self,
        prompts: Sequence[TokenisedPrompt],
        budgets: Sequence[int],
        adapter: ActiveAdapter,
        decoding: Decoding,
        role: str,
        step: int,
    ) -> Collected:
        """Sample one reply to each prompt (repeat a prompt for several) and score it. budgets: longest reply of each row.

        Raises Abandoned, on every rank, if somebody asked to stop meanwhile; evaluations are finished."""
        return self.finish(self.start(prompts, budgets, adapter, decoding, role, step))

    def start(
        self,
        prompts: Sequence[TokenisedPrompt],
        budgets: Sequence[int],
        adapter: ActiveAdapter,
        decoding: Decoding,
        role: str,
        step: int,
    ) -> Started:
        """Have it begun, where somebody else does it; see `collect`. Here it is done when it is asked for."""
        mine = [
            Chunk(number, self._batch(prompts, budgets, rows), [prompts[i].row for i in rows])
            for number, rows in enumerate(chunks(len(prompts), self.chunk_size))
            if number % self.session.world_size == self.session.rank
        ]
        return Started(len(mine), len(prompts), adapter, self._begin(mine, adapter, decoding, role, step))

    def finish(self, started: Started) -> Collected:
        """All rows of what was started, on every rank; all ranks call it."""
        share = started.work()
        if self.lockstep and started.chunks < -(-started.rows // (self.chunk_size * self.session.world_size)):
            self.generator.join(started.adapter)  # the last round has no chunk for this rank
            self.scorer.join()
        mine = (share.rollouts, share.scores, share.busy, share.faults, share.done, share.abandoned)
        everyone = self.session.gather(mine)
        if (reason := next(filter(None, (rank[5] for rank in everyone)), "")) != "":
            raise Abandoned(reason)
        return Collected(
            Rollout.concat([r for rank in everyone for r in rank[0]], self.pad_id),
            Scores.concat([s for rank in everyone for s in rank[1]]),
            share.seconds,
            _summed(rank[2] for rank in everyone),
            _summed(rank[3] for rank in everyone),
            [done for rank in everyone for done in rank[4]],
        )

    def explain(self, error: InvariantError, adapter: Any) -> InvariantError:
        """`error`, which says that sampler and learner disagree, with what more is known of why. Here they are one model.

        adapter: the `PublishedAdapter` of the learner."""
        return error

    def _begin(
        self, mine: Sequence[Chunk], adapter: ActiveAdapter, decoding: Decoding, role: str, step: int
    ) -> Callable[[], Share]:
        return partial(self._work, mine, adapter, decoding, role, step)

    def _work(self, mine: Sequence[Chunk], adapter: ActiveAdapter, decoding: Decoding, role: str, step: int) -> Share:
        """This rank's chunks, sampled and scored here, one after the other."""
        share = Share()
        for chunk in mine:
            if (why := self.wish(role)) != "":
                share.abandoned = why
                break
            started = time.perf_counter()
            fault_point("generator", "sample", step, self.session.rank)
            rollout = self.generator.generate(chunk.prompts, adapter, decoding, role, step)
            sampled = time.perf_counter()
            fault_point("scorer", "score", step, self.session.rank)
            scores = self.scorer.score(rollout, chunk.rows)
            share.scores.append(replace(scores, reward=inject_nan("scorer", "score", scores.reward, step)))
            share.rollouts.append(rollout)
            share.seconds["time/generate"] += sampled - started
            share.seconds["time/score"] += time.perf_counter() - sampled
        return share

    def wish(self, role: str) -> str:
        """Who asked to stop, if what is under way can be left: not where all ranks decode together, and not an evaluation."""
        return "" if self.lockstep or not self.abandons or role != "rollout" else self.session.stop.asked()

    def _batch(self, prompts: Sequence[TokenisedPrompt], budgets: Sequence[int], rows: range) -> PromptBatch:
        return prompt_batch(
            [prompts[i].ids for i in rows],
            row_ids=torch.tensor(list(rows)),
            max_new_tokens=torch.tensor([budgets[i] for i in rows]),
            pad_id=self.pad_id,
        )


def _summed(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total
