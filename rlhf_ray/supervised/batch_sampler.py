"""Which rows each optimizer step of supervised training sees: a function of (seed, epoch) alone, so equal at every world size.

A step's rows are a slice of one permutation. Inside a step they are sorted by length before they are cut into microbatches: the
gradient is a sum over the step's rows, so their order changes nothing but the amount of padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from rlhf_ray.maths.rng import permutation
from rlhf_ray.roles.minibatches import microbatches

MEGABATCH = 50  # steps whose rows group_by_length sorts together: long enough to group, short enough to stay random

Pick = tuple[int, bool]
"""A row's index, and whether it counts; a padding row, which keeps ranks in step, does not."""


def epoch_steps(lengths: Tensor, batch_size: int, seed: int, epoch: int, group_by_length: bool) -> list[Tensor]:
    """The rows of every optimizer step of an epoch, longest first; each row is in exactly one step, the last may be smaller.

    lengths: i64[N] tokens of each row.   group_by_length: the rows of a step are of similar length; steps come in random order.
    """
    order = permutation(seed, 0, epoch, len(lengths))
    if group_by_length:
        order = torch.cat([_longest_first(part, lengths) for part in order.split(MEGABATCH * batch_size)])
    steps = [_longest_first(rows, lengths) for rows in order.split(batch_size)]
    if not group_by_length:
        return steps
    whole = [rows for rows in steps if len(rows) == batch_size]
    rest = steps[len(whole) :]
    return [whole[i] for i in permutation(seed, 1, epoch, len(whole)).tolist()] + rest


def _longest_first(rows: Tensor, lengths: Tensor) -> Tensor:
    return rows[torch.argsort(lengths[rows], descending=True, stable=True)]


class RowOrder(Sampler[list[Pick]]):
    """The microbatches of one rank in one epoch; every rank yields equally many."""

    def __init__(
        self,
        lengths: Sequence[int] | Tensor,
        batch_size: int,
        per_device: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        group_by_length: bool = False,
    ) -> None:
        self.lengths = torch.as_tensor(lengths, dtype=torch.int64)
        self.batch_size, self.per_device, self.seed = batch_size, per_device, seed
        self.rank, self.world_size, self.group_by_length = rank, world_size, group_by_length
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[Pick]]:
        for rows in epoch_steps(self.lengths, self.batch_size, self.seed, self.epoch, self.group_by_length):
            for micro in microbatches(rows, self.rank, self.world_size, self.per_device):
                yield list(zip(micro.index.tolist(), micro.counts.tolist()))

    def __len__(self) -> int:
        sizes = [self.batch_size] * (len(self.lengths) // self.batch_size)
        if left := len(self.lengths) % self.batch_size:
            sizes.append(left)
        shares = [-(-size // self.world_size) for size in sizes]
        return sum(-(-share // min(self.per_device, share)) for share in shares)


def eval_batches(lengths: Sequence[int], size: int, rank: int, world_size: int) -> list[list[int]]:
    """Batches of row indices for one rank: rows of similar length together, batch b at rank b mod world size."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    return batches[rank::world_size]


class PickedRows(Dataset[Any]):
    """Rows by `Pick`: (row, whether it counts)."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, pick: Pick) -> tuple[Any, bool]:
        index, counts = pick
        return self.rows[index], counts


class EpochLoader(DataLoader[Any]):
    """A DataLoader whose batch sampler is told the epoch; transformers' Trainer calls `set_epoch` before each one."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
