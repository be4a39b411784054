"""The slot buffer against a plain list of columns per row, over random admissions, steps, moves and growth."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicCache

from rlhf_ray.sampler.kv_cache import SlotCache

HEADS, KEY_DIM, VALUE_DIM, LAYERS, SLOTS = 2, 3, 5, 2, 4  # keys and values may differ in width


def states(rows: int, tokens: int, generator: torch.Generator) -> list[tuple[torch.Tensor, torch.Tensor]]:
    shapes = (rows, HEADS, tokens, KEY_DIM), (rows, HEADS, tokens, VALUE_DIM)
    return [tuple(torch.randn(s, generator=generator) for s in shapes) for _ in range(LAYERS)]  # type: ignore[misc]


def prefilled(new: list[tuple[torch.Tensor, torch.Tensor]]) -> DynamicCache:
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(new):
        cache.update(keys, values, layer)
    return cache


class Model:
    """rows[i] = [(keys, values) of each layer], columns in order."""

    def __init__(self, max_tokens: int, multiple: int = 1, whole: bool = False) -> None:
        self.cache = SlotCache(SLOTS, max_tokens, multiple=multiple, whole=whole)
        self.multiple = multiple
        self.rows: list[list[list[torch.Tensor]]] = []
        self.generator = torch.Generator().manual_seed(0)

    def longest(self) -> int:
        return max((row[0][0].shape[1] for row in self.rows), default=0)

    def admit(self, tokens: int) -> None:
        new = states(2, tokens + 2, self.generator)  # the second row of a cache that is two columns wider
        self.cache.reserve(len(self.rows) + 1, self.longest(), tokens)
        self.cache.insert(len(self.rows), prefilled(new), 1, tokens)
        self.rows.append([[part[1, :, 2:] for part in layer] for layer in new])

    def step(self) -> None:
        new = states(len(self.rows), 1, self.generator)
        longest = self.longest()
        self.cache.begin_step(len(self.rows), longest)
        width = -(-(longest + 1) // self.multiple) * self.multiple
        assert self.cache.width == width
        for layer, (keys, values) in enumerate(new):
            seen = self.cache.update(keys, values, layer)
            assert self.cache.get_seq_length(layer) == width - 1
            assert self.cache.get_mask_sizes(1, layer) == (width, 0)
            for i, row in enumerate(self.rows):
                row[layer] = [torch.cat([old, fresh[i]], 1) for old, fresh in zip(row[layer], (keys, values))]
                for got, expected in zip(seen, row[layer]):
                    assert got.shape[2] == width and got.shape[0] == len(self.rows)
                    assert torch.equal(got[i, :, width - expected.shape[1] :], expected)
                    assert got.isfinite().all()
        self.cache.end_step()

    def leave(self, slot: int) -> None:
        last = self.rows.pop()
        if slot < len(self.rows):
            self.cache.move(len(self.rows), slot, last[0][0].shape[1])
            self.rows[slot] = last


ACTIONS = st.lists(st.one_of(st.tuples(st.just("admit"), st.integers(1, 90)), st.tuples(st.just("step"), st.integers(1, 70)),
                             st.tuples(st.just("leave"), st.integers(0, SLOTS - 1))), max_size=12)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(ACTIONS, st.sampled_from([1, 8, 64]), st.booleans())
def test_every_step_sees_exactly_the_columns_of_its_rows(actions, multiple, whole):
    """In widths of a multiple, with stale columns before them."""
    model = Model(max_tokens=1000, multiple=multiple, whole=whole)
    model.admit(5)
    for action, number in actions:
        if action == "admit" and len(model.rows) < SLOTS:
            model.admit(number)
        elif action == "leave" and number < len(model.rows) > 1:
            model.leave(number)
        elif action == "step":
            for _ in range(number):
                model.step()
    model.step()


def test_buffers_grow_by_doubling_up_to_their_bound_and_then_only_shift():
    model = Model(max_tokens=200)
    model.admit(10)
    shapes = []
    for _ in range(189):
        model.step()
        if not shapes or shapes[-1] != model.cache.shape:
            shapes.append(model.cache.shape)
    assert shapes == [(1, 96), (1, 192), (1, 288)]  # 200 tokens and 64 spare columns, rounded up to 32


def test_where_all_is_known_buffers_are_made_once():
    """A buffer that doubles is twice in memory while it is copied, and ends larger than what is used."""
    model = Model(max_tokens=200, whole=True)
    model.admit(10), model.step(), model.admit(150)
    buffers = [layer.keys for layer in model.cache.layers]
    for _ in range(50):
        model.step()
    assert model.cache.shape == (SLOTS, 288) and all(layer.keys is b for layer, b in zip(model.cache.layers, buffers))


def test_columns_move_to_the_start_when_the_cursor_reaches_the_end():
    model = Model(max_tokens=100)  # 192 columns at most
    model.admit(30), model.admit(5)
    for _ in range(60):
        model.step()
    model.leave(0)
    for round_ in range(3):
        for _ in range(30):
            model.step()
        model.admit(5 + round_)
        model.leave(0)
    assert model.cache.shape == (2, 192)


def test_cleared_slots_hold_zeros():
    model = Model(max_tokens=50)
    model.admit(4), model.admit(4)
    for layer in model.cache.layers:
        layer.keys[1] = layer.values[1] = float("nan")
    model.cache.clear([1])
    assert all(
        layer.keys.isfinite().all() and not layer.keys[1].any() and layer.keys[0].any() for layer in model.cache.layers
    )
