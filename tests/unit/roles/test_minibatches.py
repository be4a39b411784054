"""Every row exactly once per epoch, the same rows in a minibatch whatever the world size, equally many microbatches per rank."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.models.batching import Batching
from rlhf_ray.roles.minibatches import by_length, chunks, microbatches, minibatches


@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 5), st.integers(1, 9))
def test_every_row_once_per_epoch_over_all_ranks(parts: int, rows_each: int, world: int, width: int) -> None:
    """F1, accumulation repeating a microbatch: every row comes exactly once an epoch, over all ranks."""
    rows = parts * rows_each
    seen = []
    for minibatch in minibatches(0, 1, 0, rows, parts):
        counts = []
        for rank in range(world):
            micros = microbatches(minibatch, rank, world, width)
            counts.append([len(m.index) for m in micros])
            seen += [int(i) for m in micros for i in m.index[m.counts]]
        assert all(c == counts[0] for c in counts), "ranks must run alike"
    assert sorted(seen) == list(range(rows))


def test_a_minibatch_does_not_depend_on_the_world_size() -> None:
    for minibatch in minibatches(3, 2, 1, 12, 3):
        one = {int(i) for m in microbatches(minibatch, 0, 1, 4) for i in m.index[m.counts]}
        two = {int(i) for rank in (0, 1) for m in microbatches(minibatch, rank, 2, 4) for i in m.index[m.counts]}
        assert one == two


@given(
    st.integers(1, 6),
    st.integers(1, 8),
    st.integers(1, 5),
    st.integers(1, 9),
    st.none() | st.integers(1, 60),
    st.data(),
)
def test_sorted_by_length_every_row_comes_once_and_ranks_run_alike(
    parts: int, rows_each: int, world: int, width: int, tokens: int | None, data: st.DataObject
) -> None:
    """As many microbatches, of as many rows each, on every rank; at most one row a rank counts for nothing; budgets hold."""
    rows, batching, seen = parts * rows_each, Batching(width, tokens), []
    lengths = torch.tensor(data.draw(st.lists(st.integers(1, 20), min_size=rows, max_size=rows)))
    for minibatch in minibatches(0, 1, 0, rows, parts):
        shapes = []
        for rank in range(world):
            micros = by_length(minibatch, lengths[minibatch], rank, world, batching)
            shapes.append([len(m.index) for m in micros])
            seen += [int(i) for m in micros for i in m.index[m.counts]]
            assert sum(int((~m.counts).sum()) for m in micros) <= 1
            longest = lengths[torch.cat([m.index for m in micros])].tolist()
            assert longest == sorted(longest, reverse=True)
            for micro in micros:
                size, most = len(micro.index), int(lengths[micro.index].max())
                assert size == 1 or (size <= width if tokens is None else size * most <= tokens)
        assert all(shape == shapes[0] for shape in shapes), "ranks must run alike"
    assert sorted(seen) == list(range(rows))


def test_epochs_and_steps_have_orders_of_their_own() -> None:
    orders = [torch.cat(minibatches(0, step, epoch, 32, 4)).tolist() for step in (1, 2) for epoch in (0, 1)]
    assert len({tuple(o) for o in orders}) == 4


def test_chunks_cover_the_rows_in_order() -> None:
    assert [list(c) for c in chunks(5, 2)] == [[0, 1], [2, 3], [4]]
