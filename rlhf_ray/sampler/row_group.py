"""Rows that take a step together, in the slots of one cache; and which rows those are, where the cache has a budget.

All rows of a cache take as many of its columns as the longest one. Beside one long row, many short ones would take far more memory
than they have tokens, and wait for it. So a row that would leave more than half of a large cache unused gets a cache of its own,
where others of its length join it: a group. Groups take their steps in turns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rlhf_ray.sampler.kv_cache import SlotCache
from rlhf_ray.sampler.rows import Batch, DecodeRow, live

FILLED = 0.5
"""Least share of a group's cells that its rows may come to use."""
SMALL_SHARE = 4
"""A group of no more than budget / 4 cells may be filled worse: each further group costs a forward for every token."""
MOST_GROUPS = 4
SLACK = 1.25
"""A cache that has so many times the cells that its rows need is made smaller, where others need the room."""


@dataclass(eq=False)
class RowGroup:
    """number: among the groups that there are.   rows: by slot.   coming: rows that are to join it, in the order of the queue.
    batch: the rows as tensors, until one comes or goes."""

    cache: SlotCache
    number: int = 0
    rows: list[DecodeRow] = field(default_factory=list)
    coming: list[DecodeRow] = field(default_factory=list)
    batch: Batch | None = None

    @property
    def size(self) -> GroupSize:
        """With the rows that are to join it."""
        return GroupSize.of([*live(self.rows), *self.coming])

    @property
    def stage(self) -> str:
        """Under which the model's forward for its rows is kept (`AdapterRouter.forward`): another group must not replace it."""
        return f"rows {self.number}"

    def join(self, rows: Sequence[DecodeRow]) -> None:
        """Give free slots to these rows, whose prompts have been read; then close the gaps that are left with the last rows."""
        self.coming = [row for row in self.coming if row not in rows]
        gaps = [slot for slot, row in enumerate(self.rows) if row.end is not None]
        if not gaps and not rows:
            return
        self.batch = None
        placed = [row for row in rows if row.slot is not None]
        longest = max((row.held for row in (*live(self.rows), *placed)), default=0)
        behind = max(len(rows) - len(gaps), 0)
        self.cache.reserve(len(self.rows) + behind, longest, max((row.held for row in rows), default=0))
        slots = gaps[: len(rows)] + list(range(len(self.rows), len(self.rows) + behind))
        self.rows.extend(rows[len(rows) - behind :])
        for slot, row in zip(slots, rows):
            self.rows[slot] = row
            if row.slot is not None:
                assert row.slot == slot
                row.slot = None
            elif row.prefix is None:
                self.cache.start(slot)
            else:
                self.cache.insert(slot, *row.prefix, row.held)
                row.prefix = None
        self.close_gaps()

    def place(self, read: Sequence[DecodeRow], max_rows: int) -> None:
        """Put prompts of rows that begin together where they will be decoded, as soon as they are read: what they take together is
        not held twice."""
        coming = self.coming[:max_rows]
        longest = max((row.held for row in coming if row.slot is not None), default=0)
        self.cache.reserve(len(coming), longest, max(row.held for row in coming))
        now = {row.id for row in read}
        for slot, row in enumerate(coming):
            if row.id in now and row.prefix is not None:
                self.cache.insert(slot, *row.prefix, row.held)
                row.prefix, row.slot = None, slot

    def least_cells(self, joining: Sequence[DecodeRow]) -> int:
        """That its cache has with these rows, no larger than needed."""
        rows = [*self.rows, *joining]
        return self.cache.cells_for(len(rows), max((row.held for row in rows), default=0))

    def shrink(self, joining: Sequence[DecodeRow]) -> None:
        """Its cache to `least_cells`. Its rows have no gaps."""
        there = [*self.rows, *(row for row in joining if row.slot is not None)]
        longest = max((row.held for row in there), default=0)
        incoming = max((row.held for row in joining), default=0)
        self.cache.reserve(len(self.rows) + len(joining), longest, incoming, tight=True)

    def forget_ended(self) -> None:
        """Rows that were to join it and were cancelled."""
        self.coming = live(self.coming)
        for slot, row in enumerate(self.coming):
            if row.slot is not None and row.slot != slot:  # one before it is gone
                self.cache.move(row.slot, slot, row.held)
                row.slot = slot

    def close_gaps(self) -> None:
        """Rows that are over leave; the last rows take their slots."""
        slot = 0
        while slot < len(self.rows):
            if self.rows[slot].end is None:
                slot += 1
                continue
            self.batch = None
            if self.rows[-1].end is not None:
                self.rows.pop()
            else:
                self.cache.move(len(self.rows) - 1, slot, self.rows[-1].held)
                self.rows[slot] = self.rows.pop()


@dataclass(frozen=True)
class GroupSize:
    """rows: their number.   longest, tokens: what the longest one, and all together, may come to hold."""

    rows: int = 0
    longest: int = 0
    tokens: int = 0

    @classmethod
    def of(cls, rows: Iterable[DecodeRow]) -> GroupSize:
        lengths = [row.most for row in rows]
        return cls(len(lengths), max(lengths, default=0), sum(lengths))

    def __add__(self, tokens: int) -> GroupSize:
        """With one more row, of so many tokens."""
        return GroupSize(self.rows + 1, max(self.longest, tokens), self.tokens + tokens)

    def cells(self, max_rows: int) -> int:
        """Of its cache: rows beyond max_rows are there to follow others."""
        return min(self.rows, max_rows) * self.longest


def keep_to_budget(
    groups: Sequence[RowGroup], joining: Sequence[Sequence[DecodeRow]], max_rows: int, budget: int
) -> None:
    """See that the caches do not grow beyond the budget together, of groups without gaps that these rows are about to join.

    Where one group is larger than its rows need and others may come to need the room, it shrinks; but not for little, since buffers
    are copied then: so together they may have SLACK times the budget, and the spare columns of their rows."""
    claims = [group.size.cells(max_rows) for group in groups]

    def taken() -> list[int]:
        return [max(claim, group.cache.cells) for claim, group in zip(claims, groups)]

    by_excess = sorted(zip(groups, joining), key=lambda pair: pair[0].least_cells(pair[1]) - pair[0].cache.cells)
    for group, rows in by_excess if len(groups) > 1 else ():
        if sum(taken()) <= budget:
            break
        if group.cache.cells > SLACK * group.least_cells(rows):
            group.shrink(rows)
    cells = taken()
    for group, own in zip(groups, cells):
        group.cache.max_cells = max(budget - sum(cells) + own, 0)


def group_to_join(groups: Sequence[GroupSize], tokens: int, max_rows: int, budget: int | None) -> int | None:
    """The index of the group that a row of so many tokens joins, len(groups) for one of its own, None if it has to wait.

    budget: cells, slots times columns, of all groups together. The only row always has room.

    >>> many = GroupSize(20, 100, 2000)
    >>> [group_to_join([many], tokens, 64, 8000) for tokens in (100, 200, 5000, 7000)]
    [0, 0, 1, None]
    """
    if budget is None or not any(group.rows for group in groups):
        return 0
    sizes = [group.cells(max_rows) for group in groups]
    joined = [(group + tokens).cells(max_rows) for group in groups]
    room = budget - sum(sizes)
    filled = (
        group.tokens + tokens >= FILLED * cells or cells <= budget / SMALL_SHARE for group, cells in zip(groups, joined)
    )
    fits = [i for i, good in enumerate(filled) if good and joined[i] - sizes[i] <= room]
    if fits:
        return max(fits, key=lambda i: (groups[i].rows, -i))  # the largest, so that the others come to an end
    return len(groups) if len(groups) < MOST_GROUPS and tokens <= room else None
