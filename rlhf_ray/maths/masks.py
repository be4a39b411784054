"""Masks, indices and masked moments.

A mask is bool and True means "real". Masked functions replace what lies outside the mask before they compute, so NaN or garbage
in a padding column can reach neither a result nor a gradient. Letters as in `batches.py`: B replies, R reply columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_mask(mask: Tensor, **values: Tensor) -> None:
    """Raise ValueError unless `mask` is bool and every tensor of `values` has exactly its shape.

    A float mask would be accepted by arithmetic and a [B] tensor would broadcast against [B, B]: both give wrong numbers silently.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"mask: expected dtype torch.bool (True = real token), got {mask.dtype}")
    for name, value in values.items():
        if value.shape != mask.shape:
            raise ValueError(f"{name}: expected the shape of the mask {tuple(mask.shape)}, got {tuple(value.shape)}")


def full_precision(values: Tensor) -> Tensor:
    """`values` in float32, or in float64 if that is what they are: no maths here runs in bf16, fp16 or integers."""
    return values if values.dtype == torch.float64 else values.float()


def response_mask_from_ids(response_ids: Tensor, eos_token_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """m_t = 1 up to and including the first end-of-sequence token, decided on ids alone.

    Because it never asks "is this the pad token?", it is right when pad equals eos, when eos falls in the last column and when
    something follows the eos.

    response_ids: i64[B, R], right padded.   eos_token_ids: every id that ends a reply.
    Returns response_mask bool[B, R] and finished bool[B], True where an eos was emitted.

    >>> mask, finished = response_mask_from_ids(torch.tensor([[7, 8, 2, 0], [7, 8, 9, 10]]), [2])
    >>> mask.int().tolist(), finished.tolist()
    ([[1, 1, 1, 0], [1, 1, 1, 1]], [True, False])
    """
    if response_ids.ndim != 2:
        raise ValueError(f"response_ids: expected [B, R], got shape {tuple(response_ids.shape)}")
    ends = torch.as_tensor(list(eos_token_ids), dtype=response_ids.dtype, device=response_ids.device)
    is_eos = torch.isin(response_ids, ends)
    eos_before = is_eos.cumsum(dim=1) - is_eos.long()
    return eos_before == 0, is_eos.any(dim=1)


def last_index(response_mask: Tensor) -> Tensor:
    """last_i = sum_t m_it - 1, the column of the last real reply token.

    response_mask: bool[B, R], real tokens first.   Returns i64[B].
    Raises ValueError if a row has no token or a gap: -1 would silently address the last column.
    """
    last = last_token_index(response_mask)
    if not torch.equal(last + 1, response_mask.sum(dim=1)):
        raise ValueError("response_mask: real tokens must come first in every row, without gaps")
    return last


def last_token_index(attention_mask: Tensor) -> Tensor:
    """The column of the last True of each row: where a reward head reads, whatever the padding side or amount.

    attention_mask: bool[B, T].   Returns i64[B].   Raises ValueError if a row has no real token.

    >>> last_token_index(torch.tensor([[True, True, False], [False, True, True]])).tolist()
    [1, 2]
    """
    check_mask(attention_mask)
    if attention_mask.ndim != 2:
        raise ValueError(f"mask: expected [B, T], got shape {tuple(attention_mask.shape)}")
    empty = (~attention_mask.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"mask: rows {empty[:8]} have no real token, so they have no last token")
    columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return torch.where(attention_mask, columns, -1).amax(dim=1)


def position_ids(attention_mask: Tensor) -> Tensor:
    """max(cumsum(mask) - 1, 0): positions count real tokens only, so that left padding shifts nothing.

    attention_mask: bool[B, T].   Returns i64[B, T].

    >>> position_ids(torch.tensor([[False, False, True, True]])).tolist()
    [[0, 0, 0, 1]]
    """
    check_mask(attention_mask)
    return (attention_mask.cumsum(dim=-1) - 1).clamp_min(0)


def zero_outside(values: Tensor, mask: Tensor) -> Tensor:
    """`values` where the mask is True and exactly 0 elsewhere; the gradient outside is 0 as well, even where `values` is NaN."""
    check_mask(mask, values=values)
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """sum_t m_t x_t, over all entries or over one dimension.   An empty mask gives 0."""
    real = zero_outside(full_precision(values), mask)
    return real.sum() if dim is None else real.sum(dim=dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """sum_t m_t x_t / sum_t m_t.   An empty mask gives 0, not NaN: there is nothing to report and nothing to learn from."""
    count = mask.sum() if dim is None else mask.sum(dim=dim)
    return masked_sum(values, mask, dim) / count.clamp_min(1)


def masked_var(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """sum_t m_t (x_t - mean)^2 / sum_t m_t, the biased (population) variance.   An empty mask gives 0."""
    mean = masked_mean(values, mask, dim)
    centred = full_precision(values) - (mean if dim is None else mean.unsqueeze(dim))
    return masked_mean(zero_outside(centred, mask).square(), mask, dim)
