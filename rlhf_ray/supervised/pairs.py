"""What the stages that learn from preference pairs share, reward modelling and DPO: how pairs become tokens and batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from rlhf_ray.config import DPOConfig, RewardConfig
from rlhf_ray.data.collate import Tokenised, TokenisedPair, collate_pairs, tokenise_pairs
from rlhf_ray.data.records import Row
from rlhf_ray.data.templates import Template
from rlhf_ray.supervised.task import Task
from rlhf_ray.supervised.trainer import Batch

TokenisePairs = Callable[[Sequence[Row], Template, Any, int], Tokenised[TokenisedPair]]


def pair_tokeniser(config: RewardConfig | DPOConfig) -> TokenisePairs:
    """`Recipe.tokenise` of a stage on pairs."""

    def tokenise(rows: Sequence[Row], template: Template, tokenizer: Any, max_length: int) -> Tokenised[TokenisedPair]:
        return tokenise_pairs(
            rows,
            template,
            tokenizer,
            max_length=max_length,
            too_long=config.data.too_long,
            add_eos_token=config.add_eos_token,
            on_bad_row=config.data.on_bad_row,
            special_tokens=config.data.special_tokens,
        )

    return tokenise


class PairTask(Task):
    """Rows are pairs, and a pair is one item of the loss."""

    def length(self, row: TokenisedPair) -> int:
        return max(len(row.chosen_ids), len(row.rejected_ids))

    def collate(self, picked: Sequence[tuple[TokenisedPair, bool]]) -> Batch:
        """`collate_pairs`, and counts: bool[B], False for a pair that is there to keep ranks in step."""
        batch = collate_pairs([row for row, _ in picked], self.model.backbone.pad_id)
        return {**batch, "counts": torch.tensor([counts for _, counts in picked])}

    def count(self, batch: Batch) -> int:
        return int(batch["counts"].sum())
