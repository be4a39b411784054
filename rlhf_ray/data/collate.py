"""Token lists to padded tensors. The pad id is always given: it may equal eos, so masks alone say which tokens are real."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_ray.batches import PromptBatch
from rlhf_ray.data.tokenise import (
    IGNORE_INDEX,
    Tokenised,
    TokenisedPair,
    TokenisedPrompt,
    TokenisedRow,
    require_batch,
    tokenise_pairs,
    tokenise_prompts,
    tokenise_sft,
)

__all__ = [
    "IGNORE_INDEX",
    "Tokenised",
    "TokenisedPair",
    "TokenisedPrompt",
    "TokenisedRow",
    "collate_pairs",
    "collate_sft",
    "pad_left",
    "pad_right",
    "prompt_batch",
    "require_batch",
    "tokenise_pairs",
    "tokenise_prompts",
    "tokenise_sft",
]


def pad_right(rows: Sequence[Sequence[int]], value: int) -> tuple[Tensor, Tensor]:
    """i64[B, T] filled with `value` behind each row, and bool[B, T], True on the rows' own entries; T the longest row."""
    return _pad(rows, value, left=False)


def pad_left(rows: Sequence[Sequence[int]], value: int) -> tuple[Tensor, Tensor]:
    """As `pad_right`, with the filling before each row."""
    return _pad(rows, value, left=True)


def _pad(rows: Sequence[Sequence[int]], value: int, left: bool) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows), default=0)
    ids = torch.full((len(rows), width), value, dtype=torch.int64)
    real = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, row in enumerate(rows):
        columns = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, columns] = torch.tensor(row, dtype=torch.int64)
        real[i, columns] = True
    return ids, real


def collate_sft(examples: Sequence[TokenisedRow], pad_id: int) -> dict[str, Tensor]:
    """input_ids, attention_mask, labels: i64[B, T], right padded. Labels are IGNORE_INDEX wherever the mask is 0 (F24)."""
    ids, real = pad_right([example.input_ids for example in examples], pad_id)
    labels, _ = pad_right([example.labels for example in examples], IGNORE_INDEX)
    return {"input_ids": ids, "attention_mask": real.long(), "labels": labels}


def collate_pairs(examples: Sequence[TokenisedPair], pad_id: int) -> dict[str, Tensor]:
    """input_ids, attention_mask: i64[2B, T], right padded; rows 0 to B-1 are chosen, row B+i is the rejected one of row i.
    margin: f32[B]."""
    ids, real = pad_right([e.chosen_ids for e in examples] + [e.rejected_ids for e in examples], pad_id)
    margins = torch.tensor([e.margin for e in examples], dtype=torch.float32)
    return {"input_ids": ids, "attention_mask": real.long(), "margin": margins}


def prompt_batch(
    prompts: Sequence[Sequence[int]],
    row_ids: Sequence[int] | Tensor,
    max_new_tokens: Sequence[int] | Tensor,
    pad_id: int,
) -> PromptBatch:
    """Prompts left padded for generation; `row_ids` and `max_new_tokens` have one entry per prompt (i64[B] if tensors).

    Raises ValueError for a prompt without tokens, or lists of different lengths.
    """
    ids, real = pad_left(prompts, pad_id)
    return PromptBatch(ids, real, torch.as_tensor(row_ids), torch.as_tensor(max_new_tokens))
