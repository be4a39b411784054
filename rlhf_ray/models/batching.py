"""How rows are cut into forward passes: how many at once, in which order, and where their padding is.

Rows of unequal lengths cost what the longest of their pass costs. So the longest come first, rows of like length together, prompt
and reply without padding between them (what that saves: benchmarks/README.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_ray.batches import Sequences
from rlhf_ray.config import PPOConfig
from rlhf_ray.models.zero3 import MaxOverRanks


@dataclass(frozen=True)
class Batching:
    """rows: of a forward pass.   tokens: of one, padding included: as many rows as fit, at least one, whatever `rows` says.

    contiguous: False for runs begun under defaults_version 1 and 2: rows in the order in which they come, prompts padded on the
    left.   packed: all rows of a pass as one, where the base reads such (packing.py); not in runs begun under version 3."""

    rows: int
    tokens: int | None = None
    contiguous: bool = True
    packed: bool = False

    @classmethod
    def of(cls, config: PPOConfig) -> Batching:
        """Of a job's updates, evaluations and scores."""
        rows, tokens = config.per_device_train_batch_size, config.tokens_per_microbatch
        return cls(rows, tokens, config.has_contiguous_rows, config.has_packed_rows)

    def order(self, lengths: Tensor) -> Tensor:
        """i64[N]: rows in the order in which passes take them.   lengths: i64[N], tokens of each."""
        if not self.contiguous:
            return torch.arange(len(lengths))
        return torch.argsort(lengths, descending=True, stable=True)

    def cuts(self, longest_first: Sequence[int]) -> list[slice]:
        """Where rows of these lengths, in `order`, are cut into passes."""
        rows = len(longest_first)
        if self.tokens is None or not self.contiguous:
            return [slice(start, min(start + self.rows, rows)) for start in range(0, rows, self.rows)]
        found, start = [], 0
        while start < rows:
            stop = min(start + max(self.tokens // longest_first[start], 1), rows)
            found.append(slice(start, stop))
            start = stop
        return found

    def passes(self, lengths: Tensor, max_over_ranks: MaxOverRanks = int) -> Iterator[Tensor]:
        """Indices of the rows of every pass; where other ranks need more passes, the last one again and again (ZeRO-3)."""
        order = self.order(lengths)
        cuts = self.cuts(lengths[order].tolist())
        for number in range(max_over_ranks(len(cuts))):
            yield order[cuts[min(number, len(cuts) - 1)]]

    def sequences(self, tokens: Tensor, prompt_mask: Tensor, response_mask: Tensor, index: Tensor) -> Sequences:
        """Rows `index` as a pass sees them; see `Sequences.trim`."""
        return Sequences.trim(tokens[index], prompt_mask[index], response_mask[index], self.contiguous, self.packed)
