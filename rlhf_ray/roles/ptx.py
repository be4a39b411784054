"""The rows of the supervised loss that is mixed into the policy's (PPO-ptx, arXiv:2203.02155). Which of them an optimizer step
learns from is a function of (seed, step, epoch, minibatch): a run has no other cursor, whatever its world size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rlhf_ray.batches import Sequences
from rlhf_ray.config import PPOConfig
from rlhf_ray.data.collate import IGNORE_INDEX, TokenisedRow, collate_sft
from rlhf_ray.data.schedule import Passes
from rlhf_ray.maths.rng import derived_seed
from rlhf_ray.models.batching import Batching


@dataclass(frozen=True)
class PtxBatch:
    """The rows of one optimizer step, right padded, over all ranks.

    tokens: i64[N, T].  real: bool[N, T].  learnt: bool[N, T - 1], column t is about token t + 1."""

    tokens: Tensor
    real: Tensor
    learnt: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> Tensor:
        """i64[N], tokens of each row."""
        return self.real.sum(dim=1)

    def sequences(self, index: Tensor, batching: Batching) -> Sequences:
        """Some rows as a forward pass sees them: the first token, which nothing predicts, is the prompt; the others the reply."""
        return batching.sequences(self.tokens, self.real[:, :1], self.real[:, 1:], index)


class PtxRows:
    """rows: at least as many as an optimizer step takes.  pad_id: behind shorter rows."""

    def __init__(self, rows: Sequence[TokenisedRow], config: PPOConfig, pad_id: int) -> None:
        self.per_minibatch = rows_of_minibatch(config)
        self.epochs, self.minibatches, self.pad_id = config.num_ppo_epochs, config.num_mini_batches, pad_id
        self.passes = Passes(rows, derived_seed(config.seed, "ptx"))

    def minibatch(self, step: int, epoch: int, number: int) -> PtxBatch:
        """Of optimizer step `number` of an epoch of PPO step `step` (from 1; the others from 0)."""
        first = (((step - 1) * self.epochs + epoch) * self.minibatches + number) * self.per_minibatch
        batch = collate_sft([self.passes.at(first + i) for i in range(self.per_minibatch)], self.pad_id)
        return PtxBatch(batch["input_ids"], batch["attention_mask"].bool(), batch["labels"][:, 1:] != IGNORE_INDEX)


def rows_of_minibatch(config: PPOConfig) -> int:
    """As many as a minibatch has replies."""
    return config.rollout_batch_size // config.num_mini_batches
