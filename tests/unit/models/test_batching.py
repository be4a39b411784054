"""Forward passes: every row in one, rows of like length together, within the budget; equal numbers of passes on unequal ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.models.batching import Batching
from rlhf_ray.models.zero3 import padding_batch

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=40).map(torch.tensor)
BUDGETS = st.none() | st.integers(1, 90)


@given(lengths=LENGTHS, rows=st.integers(1, 12), tokens=BUDGETS, others=st.integers(0, 60), contiguous=st.booleans())
def test_every_row_is_in_a_pass_and_all_ranks_make_as_many(
    lengths: torch.Tensor, rows: int, tokens: int | None, others: int, contiguous: bool
) -> None:
    batching = Batching(rows, tokens, contiguous)
    alone = list(batching.passes(lengths))
    cut = list(batching.passes(lengths, lambda own: max(own, others)))
    assert len(cut) == max(len(alone), others)
    assert sorted(torch.cat(cut[: len(alone)]).tolist()) == list(range(len(lengths)))
    assert all(torch.equal(piece, alone[-1]) for piece in cut[len(alone) :]), "surplus passes repeat the last rows"


@given(lengths=LENGTHS, rows=st.integers(1, 12), tokens=BUDGETS)
def test_passes_hold_what_they_may_and_rows_of_like_length(
    lengths: torch.Tensor, rows: int, tokens: int | None
) -> None:
    passes = list(Batching(rows, tokens).passes(lengths))
    ordered = lengths[torch.cat(passes)].tolist()
    assert ordered == sorted(ordered, reverse=True)
    for piece, after in zip(passes, [*passes[1:], None]):
        longest = int(lengths[piece].max())
        if tokens is None:
            assert len(piece) == rows or (after is None and len(piece) < rows)
        else:
            assert len(piece) * longest <= tokens or len(piece) == 1
            assert after is None or (len(piece) + 1) * longest > tokens, "one more would have fitted"


def test_rows_of_equal_length_keep_their_order_and_old_runs_all_rows() -> None:
    assert Batching(8).order(torch.tensor([3, 5, 3, 5])).tolist() == [1, 3, 0, 2]
    assert [piece.tolist() for piece in Batching(2, 4, False).passes(torch.tensor([1, 9, 5]))] == [[0, 1], [2]]


def test_the_filler_is_one_prompt_token_and_one_reply_token() -> None:
    seq = padding_batch(torch.device("cpu"))
    assert (tuple(seq.tokens.shape), seq.response_width, bool(seq.attention_mask.all())) == ((1, 2), 1, True)
    assert seq.computed_tokens == 2


@pytest.mark.parametrize(("contiguous", "computed"), [(True, 2 * 6), (False, 2 * 8)])
def test_what_a_pass_computes(contiguous: bool, computed: int) -> None:
    """Prompts of 4 and 1 tokens, replies of 2 and 4: side by side 4 + 4 columns, each row by itself 6 and 5."""
    prompts = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 1]]).bool()
    replies = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]).bool()
    seq = Batching(2, None, contiguous).sequences(torch.arange(18).view(2, 9), prompts, replies, torch.arange(2))
    assert seq.computed_tokens == computed and seq.response_width == 4


def test_where_the_tokens_of_packed_rows_are() -> None:
    """Prompts of 4 and 1 tokens, replies of 2 and 4: read are the last prompt token of each row and its reply."""
    prompts = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 1]]).bool()
    replies = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]).bool()
    tokens = torch.arange(18).view(2, 9)
    seq = Batching(2, None, True, packed=True).sequences(tokens, prompts, replies, torch.arange(2))
    assert seq.packed is not None and seq.packed.lengths == (6, 5)
    ids = seq.tokens.flatten()[seq.packed.real_at]
    assert ids.tolist() == [0, 1, 2, 3, 4, 5, 12, 13, 14, 15, 16]
    assert ids[seq.packed.read_at].tolist() == [3, 4, 5, 12, 13, 14, 15, 16]
    older = Batching(2, None, True).sequences(tokens, prompts, replies, torch.arange(2))
    assert older.packed is None and older.computed_tokens == seq.computed_tokens == 12
