"""Which rows an optimizer step sees: every row once an epoch, the same rows at every world size."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.supervised.batch_sampler import MEGABATCH, EpochLoader, PickedRows, RowOrder, epoch_steps, eval_batches

worlds = st.integers(1, 3)
row_counts = st.integers(1, 40)


def lengths_of(n: int) -> list[int]:
    return [(7 * i) % 11 + 1 for i in range(n)]


@settings(max_examples=60, deadline=None)
@given(n=row_counts, world=worlds, per_device=st.integers(1, 3), accumulation=st.integers(1, 3), grouped=st.booleans())
def test_each_row_counts_exactly_once_an_epoch_at_any_world_size(
    n: int, world: int, per_device: int, accumulation: int, grouped: bool
) -> None:
    """Seeds F1: accumulation over the same rows again and again, or over fewer rows than it says."""
    batch = per_device * accumulation * world
    orders = [RowOrder(lengths_of(n), batch, per_device, 5, rank, world, grouped) for rank in range(world)]
    seen = Counter(i for order in orders for micro in order for i, counts in micro if counts)
    assert seen == Counter(range(n))


@settings(max_examples=60, deadline=None)
@given(n=row_counts, world=worlds, per_device=st.integers(1, 3), accumulation=st.integers(1, 3))
def test_ranks_run_equally_many_microbatches_no_larger_than_allowed(
    n: int, world: int, per_device: int, accumulation: int
) -> None:
    orders = [RowOrder(lengths_of(n), per_device * accumulation * world, per_device, 0, r, world) for r in range(world)]
    runs = [list(order) for order in orders]
    assert {len(run) for run in runs} == {len(orders[0])}
    assert all(1 <= len(micro) <= per_device for run in runs for micro in run)


@pytest.mark.parametrize("grouped", [False, True])
def test_the_rows_of_a_step_do_not_depend_on_the_world_size(grouped: bool) -> None:
    def steps(world: int, per_device: int) -> list[set[int]]:
        accumulation = 12 // (world * per_device)
        ranks = [list(RowOrder(lengths_of(50), 12, per_device, 3, r, world, grouped)) for r in range(world)]
        micros = [[i for rank in ranks for i, counts in rank[m] if counts] for m in range(len(ranks[0]))]
        return [
            {i for part in micros[start : start + accumulation] for i in part}
            for start in range(0, len(micros), accumulation)
        ]

    assert steps(1, 12) == steps(2, 3) == steps(3, 2) == steps(1, 1)


def test_epochs_and_seeds_give_other_orders_and_the_same_seed_the_same() -> None:
    order = RowOrder(lengths_of(30), 6, 3, seed=1)
    first = list(order)
    order.set_epoch(1)
    assert list(order) != first
    order.set_epoch(0)
    assert list(order) == first
    assert list(RowOrder(lengths_of(30), 6, 3, seed=2)) != first


def test_group_by_length_puts_rows_of_similar_length_into_a_step() -> None:
    lengths = torch.randint(1, 200, (600,), generator=torch.Generator().manual_seed(0))

    def spread(grouped: bool) -> float:
        steps = epoch_steps(lengths, 12, 0, 0, grouped)
        return sum(float(lengths[rows].max() - lengths[rows].min()) for rows in steps) / len(steps)

    assert spread(True) < spread(False) / 10
    means = [float(lengths[rows].float().mean()) for rows in epoch_steps(lengths, 12, 0, 0, True)]
    assert means != sorted(means, reverse=True), "steps of long and of short rows must alternate at random"
    assert 12 * MEGABATCH == 600


def test_rows_of_a_step_are_sorted_so_that_microbatches_waste_little_padding() -> None:
    lengths = torch.tensor(lengths_of(24))
    for rows in epoch_steps(lengths, 8, 0, 0, False):
        assert lengths[rows].tolist() == sorted(lengths[rows].tolist(), reverse=True)


def test_the_loader_tells_its_sampler_the_epoch() -> None:
    order = RowOrder([1, 1, 1, 1], 2, 2, seed=0)
    loader = EpochLoader(PickedRows(["a", "b", "c", "d"]), batch_sampler=order, collate_fn=list)
    loader.set_epoch(3)
    assert order.epoch == 3
    assert Counter(text for batch in loader for text, counts in batch if counts) == Counter("abcd")


@given(n=row_counts, size=st.integers(1, 7), world=worlds)
def test_evaluation_visits_every_row_once(n: int, size: int, world: int) -> None:
    parts = [i for rank in range(world) for batch in eval_batches(lengths_of(n), size, rank, world) for i in batch]
    assert sorted(parts) == list(range(n))
