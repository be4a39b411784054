"""Sampling and scoring all rows of a step over all ranks.

A step's rows are cut by index into chunks; chunk c belongs to rank c mod world size. Results are ordered by row, so they do not
depend on how many ranks there are.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlhf_ray.batches import PromptBatch, Rollout, Scores
from rlhf_ray.data.collate import TokenisedPrompt, prompt_batch
from rlhf_ray.roles.generator import ActiveAdapter, Decoding, Generator
from rlhf_ray.roles.minibatches import chunks
from rlhf_ray.roles.scorer import Scorer
from rlhf_ray.session import Session


@dataclass(frozen=True)
class Collected:
    """All rows of a step, on every rank.  seconds: of this rank, by phase."""

    rollout: Rollout
    scores: Scores
    seconds: dict[str, float]


class Collector:
    """generator, scorer: this rank's.  lockstep: their every forward pass is a collective (ZeRO-3)."""

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
        """Sample one reply to each prompt (repeat a prompt for several) and score it. budgets: longest reply of each row."""
        rollouts: list[Rollout] = []
        scores: list[Scores] = []
        seconds = {"time/generate": 0.0, "time/score": 0.0}
        for number, rows in enumerate(chunks(len(prompts), self.chunk_size)):
            if number % self.session.world_size != self.session.rank:
                continue
            started = time.perf_counter()
            batch = self._batch(prompts, budgets, rows)
            rollout = self.generator.generate(batch, adapter, decoding, role, step)
            sampled = time.perf_counter()
            scores.append(self.scorer.score(rollout, [prompts[i].row for i in rows]))
            rollouts.append(rollout)
            seconds["time/generate"] += sampled - started
            seconds["time/score"] += time.perf_counter() - sampled
        if self.lockstep and len(rollouts) < -(-len(prompts) // (self.chunk_size * self.session.world_size)):
            self.generator.join(adapter)  # the last round has no chunk for this rank
            self.scorer.join()
        everyone = self.session.gather((rollouts, scores))
        return Collected(
            Rollout.concat([r for rank in everyone for r in rank[0]], self.pad_id),
            Scores.concat([s for rank in everyone for s in rank[1]]),
            seconds,
        )

    def _batch(self, prompts: Sequence[TokenisedPrompt], budgets: Sequence[int], rows: range) -> PromptBatch:
        return prompt_batch(
            [prompts[i].ids for i in rows],
            row_ids=torch.tensor(list(rows)),
            max_new_tokens=torch.tensor([budgets[i] for i in rows]),
            pad_id=self.pad_id,
        )
