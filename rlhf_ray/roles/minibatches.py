"""Which rows a rank works on, in which order: pure functions of (seed, step, epoch, rank, world size).

A minibatch is a slice of one global permutation, so it holds the same rows whatever the world size. Inside it they are sorted by
length: its gradient is a sum over rows, so that their order changes nothing but the amount of padding. Rank r takes its rows r,
r + W, ..., in microbatches that all ranks cut at the same places. They must run equally many (DeepSpeed stages 2 and 3 break
otherwise), so a rank that is a row short gets a repeated one that counts for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_ray.maths.rng import permutation
from rlhf_ray.models.batching import Batching


@dataclass(frozen=True)
class Microbatch:
    """index: i64[M], rows of the step.  counts: bool[M], False on padding rows."""

    index: Tensor
    counts: Tensor


def minibatches(seed: int, step: int, epoch: int, rows: int, num_mini_batches: int) -> list[Tensor]:
    """The rows of each optimizer step of an epoch: disjoint slices of a permutation that together hold every row once."""
    return list(permutation(seed, step, epoch, rows).chunk(num_mini_batches))


def by_length(minibatch: Tensor, lengths: Tensor, rank: int, world_size: int, batching: Batching) -> list[Microbatch]:
    """This rank's share of a minibatch, longest rows first; every rank gets equally many microbatches, of as many rows each.

    minibatch: i64[N], rows of the step.   lengths: i64[N], tokens of each."""
    order = batching.order(lengths)
    rows, longest = (
        minibatch[order],
        lengths[order][::world_size],
    )  # of every place in the ranks' shares, the longest row
    mine = rows[rank::world_size]
    counts = torch.ones(len(mine), dtype=torch.bool)
    if len(mine) < len(longest):
        mine, counts = torch.cat([mine, rows[-1:]]), torch.cat([counts, torch.zeros(1, dtype=torch.bool)])
    return [Microbatch(mine[cut], counts[cut]) for cut in batching.cuts(longest.tolist())]


def microbatches(minibatch: Tensor, rank: int, world_size: int, rows_per_forward: int) -> list[Microbatch]:
    """The same of rows in the order in which they come, all microbatches of `rows_per_forward` rows.

    A minibatch smaller than world_size * rows_per_forward is one microbatch of ceil(rows / world_size) rows per rank."""
    share = -(-len(minibatch) // world_size)
    width = min(rows_per_forward, share)
    mine = minibatch[rank::world_size]
    counts = torch.ones(len(mine), dtype=torch.bool)
    missing = -(-share // width) * width - len(mine)
    if missing:
        mine = torch.cat([mine, minibatch[:1].expand(missing)])
        counts = torch.cat([counts, torch.zeros(missing, dtype=torch.bool)])
    return [Microbatch(i, c) for i, c in zip(mine.split(width), counts.split(width))]


def chunks(rows: int, chunk_size: int) -> list[range]:
    """Row ranges of the chunks of a step; chunk c belongs to rank c mod world size."""
    return [range(start, min(start + chunk_size, rows)) for start in range(0, rows, chunk_size)]
