"""The key-value cache of the decode engine: one slot per row, no copying from step to step.

Every layer holds one buffer [slots, kv_heads, columns, head_dim]. The rows of a step own slots 0 .. rows-1, and all of them END at
the same column, the cursor, where the step writes their current token; a row of n tokens owns the n columns before it:

    column         0 1 2 3 4 5 6 7 | 8 = cursor
    slot 0         . . . a a a a a | a            a: tokens of a long row
    slot 1         . . . . . . b b | b            b: tokens of a row that came later
    attended             <-------------->         up to the longest row; `.` is stale and masked

A step therefore writes one column and reads one slice, whatever the lengths; a finished row's slot is filled by copying another
row's columns; and a step looks to the model like an ordinary left-padded batch, so its own masks (causal, sliding window) and every
attention implementation work unchanged. When the cursor reaches the end of the buffer the columns in use move to its start.

On a GPU the slice is a little wider than the longest row, so that it has one of few widths: `multiple` columns more are kept before
the first one. What is in them is masked, like everything that is stale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

SPARE_COLUMNS = 64
"""Steps between two moves of the columns to the start of the buffer: a move then costs under 2 % of the steps it serves."""


SHRINK = 4
SMALL_CELLS = 16_384
"""Buffers of more slots times columns than this shrink when they are SHRINK times as large as what is in use needs."""


@dataclass
class Geometry:
    """What all layers share. slots, columns: the size of the buffers. rows, width: what the current step attends to.
    column: i64[1], the cursor as a tensor, in a static step; else None."""

    slots: int = 0
    columns: int = 0
    cursor: int = 0
    rows: int = 0
    width: int = 1
    column: Tensor | None = None


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, [slots, kv_heads, columns, head_dim] each."""

    def __init__(self, geometry: Geometry, **kwargs: Any) -> None:
        super().__init__()
        self._geometry = geometry

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = self._buffer(key_states), self._buffer(value_states)
        self.is_initialized = True

    def _buffer(self, like: Tensor) -> Tensor:
        # Zeros, not empty: a masked column has weight 0, and 0 times a NaN left in raw memory would still be NaN.
        return like.new_zeros(self._geometry.slots, like.shape[1], self._geometry.columns, like.shape[3])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self._buffers()
        g = self._geometry
        if g.column is not None:
            keys[: g.rows].index_copy_(2, g.column, key_states)
            values[: g.rows].index_copy_(2, g.column, value_states)
            return keys[: g.rows, :, : g.width], values[: g.rows, :, : g.width]
        end = g.cursor + 1
        keys[: g.rows, :, g.cursor : end] = key_states
        values[: g.rows, :, g.cursor : end] = value_states
        return keys[: g.rows, :, end - g.width : end], values[: g.rows, :, end - g.width : end]

    def _buffers(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self._geometry.width - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._geometry.width - 1 + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def relocate(self, rows: int, source: slice, target: slice) -> None:
        """Bring columns `source` of the first rows to columns `target`, in new buffers if the geometry has grown."""
        if not self.is_initialized:
            return
        for name in ("keys", "values"):
            old = getattr(self, name)
            grown = old.shape[0] != self._geometry.slots or old.shape[2] != self._geometry.columns
            new = self._buffer(old) if grown else old
            kept = old[:rows, :, source]
            new[:rows, :, target] = kept if grown else kept.clone()  # within one buffer the two ranges may overlap
            setattr(self, name, new)

    def copy(self, source: int, target: int, tokens: int) -> None:
        columns = self._columns(tokens)
        for buffer in self._buffers():
            buffer[target, :, columns] = buffer[source, :, columns]

    def insert(self, slot: int, prefilled: Any, row: int, tokens: int) -> None:
        """prefilled: a layer with keys and values [rows, kv_heads, columns, head_dim]."""
        states = prefilled.keys[row, :, -tokens:], prefilled.values[row, :, -tokens:]
        if not self.is_initialized:
            self.lazy_initialization(*(state[None] for state in states))
        for buffer, state in zip(self._buffers(), states):
            buffer[slot, :, self._columns(tokens)] = state

    def _columns(self, tokens: int) -> slice:
        """Those of a row with so many tokens."""
        return slice(self._geometry.cursor - tokens, self._geometry.cursor)

    def clear(self, slot: int) -> None:
        for buffer in self._buffers():
            buffer[slot] = 0

    # What layers with a state do besides (state_cache.py).

    def begin_step(self) -> None: ...
    def end_step(self) -> None: ...
    def start(self, slot: int) -> None: ...


class SlotCache(Cache):
    """The layers' buffers and their common geometry, of at most `max_slots` rows of `max_tokens` tokens. Buffers double when rows
    or columns run out, and shrink when no more than a quarter of them is in use; whole: they are made at their full size at once,
    where what will come is known, and stay.

    spare: columns beyond those of `max_tokens`, for as many steps between two moves; none where no row follows another.
    multiple: a step's slice is as wide as one of it.  make: the layers, where not all have keys and values alone.
    max_cells: slots times columns that doubling keeps to; it may change."""

    layers: list[SlotLayer]  # type: ignore[assignment]

    def __init__(
        self,
        max_slots: int,
        max_tokens: int,
        make: Callable[[Geometry], list[SlotLayer]] | None = None,
        multiple: int = 1,
        whole: bool = False,
        max_cells: int | None = None,
        spare: int = SPARE_COLUMNS,
    ) -> None:
        self._geometry, self.max_cells = Geometry(), max_cells
        self._multiple, self._whole = multiple, whole
        self._column: Tensor | None = None
        self._max_slots, self._max_columns = max_slots, _round_up(max_tokens + multiple - 1 + spare)
        if make is None:
            Cache.__init__(self, layer_class_to_replicate=partial(SlotLayer, self._geometry))  # type: ignore[arg-type]
        else:
            Cache.__init__(self, layers=make(self._geometry))  # type: ignore[arg-type]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._geometry.width - 1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._geometry.width - 1 + query_length, 0

    @property
    def shape(self) -> tuple[int, int]:
        """(slots, columns) of the buffers."""
        return self._geometry.slots, self._geometry.columns

    @property
    def width(self) -> int:
        """Columns that the current step attends to."""
        return self._geometry.width

    @property
    def cells(self) -> int:
        """Slots times columns of the buffers."""
        return self._geometry.slots * self._geometry.columns

    def cells_for(self, rows: int, longest: int) -> int:
        """Of buffers as `reserve` makes them for so many rows and tokens, at least."""
        return rows * _round_up(longest + self._multiple - 1 + SPARE_COLUMNS)

    def reserve(self, rows: int, longest: int, incoming: int = 0, tight: bool = False) -> None:
        """Make room for `rows` rows and for `max(longest, incoming)` columns before the cursor and one at it, with what `multiple`
        takes before them.

        rows: slots in use after this call.   longest: tokens of the longest row held, whose columns are kept.
        incoming: tokens of the longest row about to be inserted.   tight: make buffers anew that are no larger than needed.
        """
        g = self._geometry
        before = max(longest, incoming) + self._multiple - 1
        least = _round_up(before + SPARE_COLUMNS)
        wasteful = not self._whole and g.slots * g.columns > max(SHRINK * rows * least, SMALL_CELLS)
        wasteful |= tight
        if rows <= g.slots and before <= g.cursor < g.columns and not wasteful:
            return
        source = slice(g.cursor - longest, g.cursor)
        held = min(rows, g.slots)
        slots = rows if wasteful else g.slots
        columns = least if wasteful else g.columns
        if rows > slots:
            slots = self._max_slots if self._whole else min(max(rows, 2 * slots), self._max_slots)
        if before + SPARE_COLUMNS > columns:
            most = self._max_columns
            columns = most if self._whole else min(max(least, _round_up(2 * columns)), most)
        if self.max_cells is not None and slots * columns > self.max_cells:
            columns = max(min(columns, self.max_cells // slots), min(least, self._max_columns))
            slots = max(rows, min(slots, self.max_cells // columns))
        g.slots, g.columns, g.cursor = slots, columns, before
        for layer in self.layers:
            layer.relocate(held, source, slice(before - longest, before))

    def begin_step(self, rows: int, longest: int) -> None:
        """The next forward is one token for each of the first `rows` slots; the longest row holds `longest` tokens so far."""
        self.reserve(rows, longest)
        g = self._geometry
        g.rows, g.width, g.column = rows, _round_up(longest + 1, self._multiple), None
        for layer in self.layers:
            layer.begin_step()

    def begin_static_step(self, rows: int, longest: int) -> Tensor:
        """`begin_step` for shapes that last: the step attends to the columns from the first on, and writes to the one that the
        tensor says, which is returned; i64[1]. `rows` may be more than there are: slots behind them hold nothing."""
        self.reserve(rows, longest)
        g = self._geometry
        if self._column is None:
            self._column = torch.zeros(1, dtype=torch.int64, device=self.layers[0].keys.device)  # type: ignore[union-attr]
        g.rows, g.width, g.column = rows, min(_round_up(g.cursor + 1, self._multiple), g.columns), self._column
        return self._column.fill_(g.cursor)

    @property
    def max_slots(self) -> int:
        return self._max_slots

    @property
    def address(self) -> int:
        """Of the buffers: another one when they have been made anew."""
        return self.layers[0].keys.data_ptr()  # type: ignore[union-attr]

    def end_step(self) -> None:
        self._geometry.cursor += 1
        for layer in self.layers:
            layer.end_step()

    def insert(self, slot: int, prefilled: Cache, row: int, tokens: int) -> None:
        """Copy the last `tokens` columns of a LEFT padded, prefilled row, and its states, into a slot; `reserve` must have made
        room."""
        if self.layer_class_to_replicate is not None:
            while len(self.layers) < len(prefilled.layers):
                self.layers.append(SlotLayer(self._geometry))
        for layer, done in zip(self.layers, prefilled.layers):
            layer.insert(slot, done, row, tokens)

    def start(self, slot: int) -> None:
        """Take a row that holds nothing yet into a slot."""
        for layer in self.layers:
            layer.start(slot)

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy the `tokens` columns and the states of a row into another slot."""
        for layer in self.layers:
            layer.copy(source, target, tokens)

    def clear(self, slots: Sequence[int]) -> None:
        """Overwrite slots with zeros, when what they hold is not finite and would leak through a mask (0 * NaN = NaN)."""
        for layer in self.layers:
            for slot in slots:
                layer.clear(slot)


def _round_up(columns: int, multiple: int = 32) -> int:
    return -(-columns // multiple) * multiple
