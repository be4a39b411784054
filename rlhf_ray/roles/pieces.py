"""Cutting rows into forward passes, so that ranks whose every pass is a collective (ZeRO-3) make equally many."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from rlhf_ray.batches import Sequences
from rlhf_ray.models.sharded import MaxOverRanks


def lockstep_batches(rows: int, rows_per_forward: int, max_over_ranks: MaxOverRanks = int) -> Iterator[slice]:
    """Slices that hold every row, at most `rows_per_forward` each; where other ranks need more, the last one again and again."""
    own = -(-rows // rows_per_forward)
    for number in range(max_over_ranks(own)):
        start = min(number, own - 1) * rows_per_forward
        yield slice(start, min(start + rows_per_forward, rows))


def padding_batch(device: torch.device) -> Sequences:
    """One row of one prompt token and one reply token, to take part in a pass that only other ranks need."""
    token, real = torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.bool)
    return Sequences(token.to(device), real.to(device), real[:, :1].to(device))
