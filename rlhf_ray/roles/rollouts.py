"""Which rollout a step learns from, and when its sampling begins.

    max_staleness 0      sample 1 | learn 1 | sample 2 | learn 2 | ...       each by the newest adapter

    max_staleness 1      sample 1 | sample 2 | sample 3 | ...                rollout n + 1 is begun when rollout n has arrived,
                                  | learn 1  | learn 2  | ...                so by the adapter from before update n

(One-step off-policy: arXiv:2410.18252.) The learner's own log-probabilities stay what the ratio is taken against; that the tokens
come from an older policy is corrected by weights (maths/losses.py, `truncated_importance_weights`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rlhf_ray.data.collate import TokenisedPrompt
from rlhf_ray.roles.collector import Collected, Collector, PendingCollection
from rlhf_ray.roles.generator import ActiveAdapter, Decoding
from rlhf_ray.roles.learner import PublishedAdapter
from rlhf_ray.roles.minibatches import chunks

Request = Callable[[int], tuple[Sequence[TokenisedPrompt], Sequence[int]]]
"""Step -> its prompts and the longest reply to each."""


@dataclass(frozen=True)
class Sampled:
    """All rows of `step`, on every rank.  adapter: the one that sampled them.

    reference: the one they were scored against; None for the one that the run started from."""

    step: int
    collected: Collected
    adapter: PublishedAdapter
    reference: ActiveAdapter | None = None


class Rollouts:
    """The rollouts of a run, step after step. Every rank has one and calls its methods alike.

    policy: name of the policy's adapter.  ahead: begin each rollout one step early (max_staleness 1).  last_step: of the run."""

    def __init__(
        self,
        collector: Collector,
        request: Request,
        decoding: Decoding,
        policy: str | None,
        ahead: bool,
        last_step: int,
    ) -> None:
        self.collector, self.request, self.decoding, self.policy = collector, request, decoding, policy
        self.ahead, self.last_step = ahead, last_step
        self.pending: Sampled | None = None  # a rollout that has arrived before its step
        self._started: tuple[int, PendingCollection, PublishedAdapter, ActiveAdapter | None] | None = None

    def take(self, step: int, newest: PublishedAdapter, reference: ActiveAdapter | None = None) -> Sampled:
        """The rollout of `step`, begun before or now; where rollouts are ahead, the next one is begun with `newest`.

        reference: in force now; see `Sampled`. A rollout that was begun before keeps the one in force then."""
        if self._started is None and self.pending is None:
            self._start(step, newest, reference)
        sampled = self.settle()
        if sampled is None or sampled.step != step:
            raise LookupError(f"the rollout of step {step} is asked for, and {sampled and sampled.step} was started")
        self.pending = None
        if self.ahead and step < self.last_step:
            self._start(step + 1, newest, reference)
        return sampled

    def settle(self) -> Sampled | None:
        """Wait for the rollout that is under way, if one is; the one that then waits for its step."""
        if self._started is not None:
            step, started, adapter, reference = self._started
            self._started = None
            self.pending = Sampled(step, self.collector.finish(started), adapter, reference)
        return self.pending

    def _start(self, step: int, adapter: PublishedAdapter, reference: ActiveAdapter | None) -> None:
        prompts, budgets = self.request(step)
        active = ActiveAdapter(self.policy, adapter.version, adapter.sha256)
        started = self.collector.start(prompts, budgets, active, self.decoding, "rollout", step, reference)
        self._started = step, started, adapter, reference


def probed_rows(rows: int, chunk_size: int, wanted: int) -> torch.Tensor:
    """i64[N]: the first rows of every chunk, so that every generator has some; about `wanted` of a step's `rows`."""
    parts = chunks(rows, chunk_size)
    each = -(-wanted // len(parts))
    return torch.tensor([row for part in parts for row in part[:each]])
