"""Equal numbers of forward passes on ranks with unequal numbers of rows."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.models.zero3 import lockstep_batches, padding_batch


@given(rows=st.integers(1, 40), width=st.integers(1, 12), others=st.integers(0, 60))
def test_every_row_is_in_a_piece_and_all_ranks_make_as_many(rows: int, width: int, others: int) -> None:
    cut = list(lockstep_batches(rows, width, lambda own: max(own, others)))
    own = -(-rows // width)
    assert len(cut) == max(own, others)
    assert [i for piece in cut[:own] for i in range(rows)[piece]] == list(range(rows))
    assert all(piece == cut[own - 1] for piece in cut[own:]), "surplus passes repeat the last rows"
    assert all(0 < piece.stop - piece.start <= width for piece in cut)


def test_alone_nothing_is_repeated() -> None:
    assert list(lockstep_batches(5, 2)) == [slice(0, 2), slice(2, 4), slice(4, 5)]


def test_the_filler_is_one_prompt_token_and_one_reply_token() -> None:
    seq = padding_batch(torch.device("cpu"))
    assert (tuple(seq.tokens.shape), seq.response_width, bool(seq.attention_mask.all())) == ((1, 2), 1, True)
