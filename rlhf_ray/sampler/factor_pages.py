"""Factors of the adapters of a batch, in one buffer for each group of layers of one shape.

A buffer is cut into pages, of which an adapter takes as many as its rank needs, wherever they are (as S-LoRA's unified paging,
arXiv:2311.03285): an adapter that comes brings a copy for each group and not one for each layer, and what it finds there already
costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from rlhf_ray.models.adapter_pool import LayerGroup, PackedAdapter

KEPT = 4
SMALL = 64 << 20
PATIENCE = 64
"""Buffers of more bytes than SMALL are at most KEPT times as large as the adapters of the batch, or of one of the last PATIENCE."""
RESERVED = 512 << 20
"""Bytes of buffers of which unused entries are never read: a process is given the memory that it writes, so that the rest is free,
and a batch that grows finds its place at once (zeroing 100 MiB anew, and copying all rows again, took 60 ms of a step)."""

Key = tuple[str, int]
"""An adapter's name, and which of its copies."""


class FactorPages:
    """For each group of layers a down [layers, entries, in] and an up [layers, entries, out] (scaled), in pages of `unit` entries.

    Adapters that come take the first pages that no other one in the batch has, in ascending order, so that the pages in use are
    the first ones. unused_are_read: all entries are numbers at any time."""

    def __init__(
        self,
        groups: Sequence[LayerGroup],
        get: Callable[[str], PackedAdapter],
        unit: int,
        unused_are_read: bool = True,
    ) -> None:
        self._groups, self._get, self.unit, self._unused_are_read = groups, get, unit, unused_are_read
        self._page_bytes = 4 * unit * sum(len(group.names) * group.width for group in groups)
        self.buffers: list[tuple[Tensor, Tensor]] = []
        self._owners: list[Key | None] = []  # by page: whose factors are there, of this batch or of one before
        self._pages: dict[Key, list[int]] = {}
        self._top = self._wasteful = 0  # pages that were ever written; batches one after the other that need far fewer

    def of(self, keys: Sequence[Key], others: Iterable[Key] = ()) -> dict[Key, list[int]]:
        """The pages of each. others: which stay where they are, if they are there."""
        packed = {key: self._get(key[0]) for key in keys}
        counts = {key: -(-one.r // self.unit) for key, one in packed.items()}
        stay = {key: self._pages[key] for key in others if key in self._pages}
        needed = sum((counts | {key: len(own) for key, own in stay.items()}).values())
        is_wasteful = self._top > KEPT * needed and self._top * self._page_bytes > SMALL
        self._wasteful = self._wasteful + 1 if is_wasteful else 0
        if needed > len(self._owners) or self._wasteful > PATIENCE:
            self._allocate(needed, next(iter(packed.values())))
            stay = {}  # in the buffers before, for whoever still uses those
        held = {page for own in (*stay.values(), *(self._pages.get(key, ()) for key in keys)) for page in own}
        free = (page for page in range(len(self._owners)) if page not in held)
        for key in packed:
            if key not in self._pages:
                self._take(key, list(islice(free, counts[key])))
                self._fill(packed[key], self._pages[key])
        return {key: self._pages[key] for key in keys}

    def clear(self, pages: Iterable[int]) -> None:
        """Set them to 0, where they are not."""
        for page in pages:
            if self._owners[page] is not None:
                self._take(None, [page])
                self._zero(page * self.unit, (page + 1) * self.unit)

    def _allocate(self, needed: int, like: PackedAdapter) -> None:
        some = next(factors for factors in like.factors if factors is not None).down
        pages, new = needed + needed // 2, some.new_zeros
        if not self._unused_are_read:
            pages, new = max(pages, RESERVED // self._page_bytes), some.new_empty
        shapes = [(len(g.names), pages * self.unit, g) for g in self._groups]
        self.buffers = [(new(n, k, g.n_in), new(n, k, g.n_out)) for n, k, g in shapes]
        self._owners, self._pages, self._top = [None] * pages, {}, 0

    def _take(self, key: Key | None, pages: list[int]) -> None:
        for page in pages:
            before = self._owners[page]
            if before is not None and page in self._pages.get(before, ()):
                del self._pages[before]  # what is in its other pages is of no use
            self._owners[page] = key
        if key is not None:
            self._pages[key] = pages
            self._top = max(self._top, 1 + max(pages, default=-1))

    def _zero(self, first: int, end: int) -> None:
        for down, up in self.buffers:
            down[:, first:end] = 0
            up[:, first:end] = 0

    def _fill(self, adapter: PackedAdapter, pages: Sequence[int]) -> None:
        done, unit = 0, self.unit
        for first, end in _runs(pages):
            own = slice(done, min(done + (end - first) * unit, adapter.r))
            there = slice(first * unit, first * unit + own.stop - own.start)
            is_whole = there.stop == end * unit
            for (down, up), factors in zip(self.buffers, adapter.factors):
                if factors is None or factors.which is not None or not is_whole:
                    down[:, first * unit : end * unit] = 0
                    up[:, first * unit : end * unit] = 0
                if factors is not None and factors.which is None:
                    down[:, there] = factors.down[:, own]
                    torch.mul(factors.up[:, own], adapter.scale, out=up[:, there])
                elif factors is not None:
                    which = list(factors.which or ())
                    down[which, there] = factors.down[:, own]
                    up[which, there] = factors.up[:, own] * adapter.scale
            done = own.stop


def _runs(pages: Sequence[int]) -> Iterator[tuple[int, int]]:
    """
    >>> list(_runs([3, 4, 5, 9]))
    [(3, 6), (9, 10)]
    """
    first = 0
    for i in range(1, len(pages) + 1):
        if i == len(pages) or pages[i] != pages[i - 1] + 1:
            yield pages[first], pages[i - 1] + 1
            first = i
