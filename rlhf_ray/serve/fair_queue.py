"""Rows that wait for a place, taken by turns: over API keys, within a key over adapters, within those over requests.

Start-time fair queueing (Goyal et al. 1996) at each of these levels, with tokens as the cost, as in Sheng et al., "Fairness in
Serving Large Language Models" (OSDI 2024, arXiv:2401.00588): who has been given the fewest tokens is next, and who comes later
starts level with the others and not ahead of them.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Generic, TypeVar

T = TypeVar("T")
Flow = tuple[str, ...]
"""Whose a row is, from the outermost level to the innermost: (key, version of an adapter, request)."""


@dataclass(eq=False)
class _Node:
    """given: tokens that its rows have been given, on its level's clock.  clock: of the level below: where newcomers start."""

    given: float = 0.0
    clock: float = 0.0
    below: dict[str, _Node] = field(default_factory=dict)
    tickets: deque[int] = field(default_factory=deque)


class FairQueue(Generic[T]):
    """Not thread-safe. All flows have equally many levels."""

    def __init__(self) -> None:
        self._root = _Node()
        self._items: dict[int, tuple[Flow, int, T]] = {}

    def push(self, ticket: int, flow: Flow, tokens: int, item: T) -> None:
        """tokens: that the row may cost."""
        self._items[ticket] = flow, tokens, item
        node = self._root
        for name in flow:
            node.below.setdefault(name, _Node(given=node.clock))
            node = node.below[name]
        node.tickets.append(ticket)

    def pop(self) -> tuple[int, T]:
        """The next row. IndexError if none waits."""
        if not self._items:
            raise IndexError("no row waits")
        node, path = self._root, [self._root]
        while node.below:
            node = min(node.below.values(), key=lambda child: child.given)  # equals: who came first
            path.append(node)
        ticket = node.tickets.popleft()
        flow, tokens, item = self._items.pop(ticket)
        for parent, child in pairwise(path):
            parent.clock = child.given
            child.given += tokens
        self._prune(flow)
        return ticket, item

    def remove(self, ticket: int) -> bool:
        """False if the row does not wait here (any more)."""
        if ticket not in self._items:
            return False
        flow, _, _ = self._items.pop(ticket)
        node = self._root
        for name in flow:
            node = node.below[name]
        node.tickets.remove(ticket)
        self._prune(flow)
        return True

    def waiting(self, level: int) -> Counter[str]:
        """Rows that wait, by the names of a level."""
        return Counter(flow[level] for flow, _, _ in list(self._items.values()))

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[int]:
        return iter(self._items)

    def clear(self) -> None:
        self._root, self._items = _Node(), {}

    def _prune(self, flow: Flow) -> None:
        """Forget who has no row left, so that the queue is as large as what waits in it."""
        path = [self._root]
        for name in flow:
            path.append(path[-1].below[name])
        for parent, name, node in zip(path[-2::-1], flow[::-1], path[:0:-1]):
            if not node.below and not node.tickets:
                del parent.below[name]
