"""Masks and indices: decided on ids, never on "not pad" (failures F3, F9, F11)."""

from __future__ import annotations

import pytest
import torch

from rlhf_ray.maths import masks

EOS = 2


@pytest.mark.parametrize("pad", [0, EOS], ids=["own pad", "pad equals eos"])
@pytest.mark.parametrize(
    ("ids", "mask", "last", "finished"),
    [
        ([7, 8, EOS, "pad"], [1, 1, 1, 0], 2, True),
        ([7, 8, 9, 10], [1, 1, 1, 1], 3, False),
        ([EOS, "pad", "pad", "pad"], [1, 0, 0, 0], 0, True),
        ([7, EOS, 9, EOS], [1, 1, 0, 0], 1, True),
        ([7, 8, 9, EOS], [1, 1, 1, 1], 3, True),
    ],
)
def test_f9_response_mask_table(ids, mask, last, finished, pad) -> None:
    row = torch.tensor([[pad if x == "pad" else x for x in ids]])
    got_mask, got_finished = masks.response_mask_from_ids(row, [EOS])
    assert got_mask.dtype == torch.bool and got_finished.dtype == torch.bool
    assert got_mask.int().tolist() == [mask]
    assert got_finished.tolist() == [finished]
    assert masks.last_index(got_mask).tolist() == [last]


def test_several_eos_ids_and_none() -> None:
    ids = torch.tensor([[5, 3, 9], [5, 9, 9], [5, 2, 3]])
    mask, finished = masks.response_mask_from_ids(ids, (2, 3))
    assert mask.int().tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 0]]
    assert finished.tolist() == [True, False, True]
    mask, finished = masks.response_mask_from_ids(ids, [])
    assert mask.all() and not finished.any()


def test_no_columns() -> None:
    mask, finished = masks.response_mask_from_ids(torch.zeros(3, 0, dtype=torch.long), [EOS])
    assert mask.shape == (3, 0) and finished.tolist() == [False] * 3


def test_last_index_refuses_empty_rows_and_gaps() -> None:
    with pytest.raises(ValueError, match=r"rows \[1\] have no real token"):
        masks.last_index(torch.tensor([[True, False], [False, False]]))
    with pytest.raises(ValueError, match="without gaps"):
        masks.last_index(torch.tensor([[True, False, True]]))


def test_f11_last_token_is_found_under_any_padding() -> None:
    text = torch.tensor([4, EOS, 6, 7])  # an eos inside the text, and no unique pad id to search for
    for left in range(3):
        for right in range(3):
            mask = torch.tensor([[False] * left + [True] * 4 + [False] * right])
            tokens = torch.full((1, left + 4 + right), EOS)
            tokens[0, left : left + 4] = text
            assert tokens[0, masks.last_token_index(mask)].item() == 7


def test_position_ids_count_real_tokens_only() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    assert masks.position_ids(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]


def test_masked_moments(reply_mask) -> None:
    mask = reply_mask([3, 1], 4)
    x = torch.tensor([[1.0, 2.0, 3.0, torch.nan], [4.0, torch.inf, -1e30, 7.0]])
    assert masks.masked_sum(x, mask).item() == 10
    assert masks.masked_mean(x, mask).item() == 2.5
    assert masks.masked_var(x, mask).item() == 1.25
    assert masks.masked_sum(x, mask, dim=1).tolist() == [6, 4]
    assert masks.masked_mean(x, mask, dim=1).tolist() == [2, 4]
    assert masks.masked_var(x, mask, dim=1).tolist() == pytest.approx([2 / 3, 0])


def test_an_empty_mask_gives_zero_and_no_nan() -> None:
    x, mask = torch.full((2, 3), torch.nan), torch.zeros(2, 3, dtype=torch.bool)
    assert (
        masks.masked_sum(x, mask).item() == masks.masked_mean(x, mask).item() == masks.masked_var(x, mask).item() == 0
    )
    assert masks.masked_mean(x, mask, dim=1).tolist() == [0, 0]


def test_no_gradient_comes_from_outside_the_mask(reply_mask) -> None:
    x = torch.tensor([[1.0, 2.0, torch.nan], [3.0, torch.inf, 5.0]], requires_grad=True)
    (masks.masked_var(x, reply_mask([2, 1], 3)) + masks.masked_mean(x, reply_mask([2, 1], 3))).backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad[~reply_mask([2, 1], 3)].tolist() == [0, 0, 0]


def test_sums_of_half_precision_run_in_float32() -> None:
    x, mask = torch.full((1, 5000), 1.0, dtype=torch.bfloat16), torch.ones(1, 5000, dtype=torch.bool)
    assert masks.masked_sum(x, mask).item() == 5000  # a bf16 accumulator stops at 256
    assert masks.masked_sum(x, mask).dtype == torch.float32


@pytest.mark.parametrize("function", [masks.masked_sum, masks.masked_mean, masks.masked_var, masks.zero_outside])
def test_a_float_mask_and_a_broadcast_are_refused(function) -> None:
    with pytest.raises(ValueError, match=r"expected dtype torch.bool"):
        function(torch.ones(2, 2), torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"expected the shape of the mask \(2, 2\), got \(2,\)"):
        function(torch.ones(2), torch.ones(2, 2, dtype=torch.bool))


def test_wrong_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \[B, R\]"):
        masks.response_mask_from_ids(torch.tensor([1, 2]), [EOS])
    with pytest.raises(ValueError, match=r"expected \[B, T\]"):
        masks.last_token_index(torch.tensor([True]))
    with pytest.raises(ValueError, match=r"torch.bool"):
        masks.position_ids(torch.tensor([[1, 1]]))
