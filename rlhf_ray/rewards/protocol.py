"""What a reward is: anything that scores the replies of a rollout. A new kind is one class with `score`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.batches import Rollout, Sequences
from rlhf_ray.data.records import Row
from rlhf_ray.models.batching import Batching
from rlhf_ray.models.forward import to_device
from rlhf_ray.models.zero3 import MaxOverRanks


@dataclass(frozen=True)
class Texts:
    """What a Python reward sees of some rows: prompts and replies as text, reply ids, and the raw columns of the data file."""

    prompts: Sequence[str]
    completions: Sequence[str]
    completion_ids: Sequence[list[int]]
    columns: Sequence[dict[str, Any]]


@dataclass(frozen=True)
class RewardInputs:
    """The replies to be scored, in whatever form a kind of reward reads them.

    rows: the data rows behind the rollout's rows, in the same order.  to_texts: decodes; called once, if a reward asks for
    `texts`."""

    rollout: Rollout
    rows: Sequence[Row]
    to_texts: Callable[[Rollout, Sequence[Row]], Texts]

    def __len__(self) -> int:
        return len(self.rollout)

    @cached_property
    def texts(self) -> Texts:
        """Replies and prompts as text."""
        return self.to_texts(self.rollout, self.rows)

    @property
    def finished(self) -> list[bool]:
        """Whether each reply ended by itself."""
        return list(self.rollout.finished.tolist())

    def sequences(
        self, batching: Batching, device: torch.device, max_over_ranks: MaxOverRanks = int
    ) -> Iterator[tuple[Tensor, Sequences]]:
        """Token ids of the rows of every forward pass, and which rows these are: i64[M].

        max_over_ranks: under ZeRO-3, how ranks with rollouts of different sizes come to make equally many passes."""
        return sequences_of(self.rollout, batching, device, max_over_ranks)


def sequences_of(
    rollout: Rollout, batching: Batching, device: torch.device, max_over_ranks: MaxOverRanks = int
) -> Iterator[tuple[Tensor, Sequences]]:
    """`RewardInputs.sequences` of a rollout alone."""
    for rows in batching.passes(rollout.attention_mask.sum(dim=1), max_over_ranks):
        seq = batching.sequences(rollout.tokens, rollout.prompt_mask, rollout.response_mask, rows)
        yield rows, to_device(seq, device)


def broken_as_inf(scores: Tensor) -> Tensor:
    """`scores` of a reward that applies to every reply: what is not a number in them is a fault, not an abstention."""
    return torch.nan_to_num(scores, nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)


class Reward(ABC):
    """name: of its metric, `reward/<name>`.  weight: its factor in the sum of a job's rewards.

    waits: whether it mostly waits for somebody else, and uses no model and nothing of the calling thread: it is then asked on a
    thread beside, while the models go on."""

    name: str
    weight: float
    waits: bool = False

    @abstractmethod
    def score(self, inputs: RewardInputs) -> Tensor:
        """f32[rows] on the CPU: NaN where the reward does not apply to a reply, infinite where it should have a number and has none
        (`broken_as_inf`)."""

    def parts(self, inputs: RewardInputs) -> dict[str, Tensor]:
        """Its score under its name, f32[rows], and whatever it is made of under `<name>/...`: each is a metric of its own."""
        return {self.name: self.score(inputs)}

    def join(self) -> None:  # noqa: B027  (most kinds make no collective pass)
        """Under ZeRO-3, what a rank without a rollout does while others score theirs: the same passes, over one token."""

    def drift(self, inputs: RewardInputs) -> Tensor | None:
        """f32[rows]: 1 where what is scored is not quite what was sampled, else 0; None for rewards that see the very tokens."""
        return None
