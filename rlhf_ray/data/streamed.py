"""Rows that are read anew each time they are gone through, for files that are larger than memory: what is kept of a row is a byte.

`picked` and `joined` do to such rows what a comprehension and a sum do to tuples, so that reading, splitting and mixing are written
once for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, compress, islice
from typing import Generic, TypeVar, overload

T = TypeVar("T")


@dataclass(frozen=True)
class Part(Generic[T]):
    """The rows of one source.   wanted: a byte for each row that the source holds, 1 for those that are meant.   read: goes through
    these, given `wanted`."""

    wanted: bytes
    read: Callable[[bytes], Iterator[T]]


class StreamedRows(Sequence[T]):
    """Rows of several sources, in order. To be iterated: an index reads on from the first row."""

    def __init__(self, parts: Iterable[Part[T]]) -> None:
        self.parts = tuple(parts)
        self._length = sum(part.wanted.count(1) for part in self.parts)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[T]:
        return chain.from_iterable(part.read(part.wanted) for part in self.parts)

    @overload
    def __getitem__(self, at: int) -> T: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[T, ...]: ...
    def __getitem__(self, at: int | slice) -> T | tuple[T, ...]:
        if isinstance(at, slice):
            return tuple(islice(self, *at.indices(len(self))))
        return next(islice(self, range(len(self))[at], None))

    def by_part(self) -> list[StreamedRows[T]]:
        """The rows of each source."""
        return [StreamedRows([part]) for part in self.parts]

    def picked(self, flags: Iterable[object]) -> StreamedRows[T]:
        """See `picked`."""
        rest = iter(flags)
        return StreamedRows(
            replace(part, wanted=bytes(bool(meant and next(rest)) for meant in part.wanted)) for part in self.parts
        )


def picked(rows: Sequence[T], flags: Iterable[object]) -> Sequence[T]:
    """The rows whose flag is true; one flag for each row."""
    return rows.picked(flags) if isinstance(rows, StreamedRows) else tuple(compress(rows, flags))


def in_slices(rows: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    """`size` rows after the other."""
    left = iter(rows)
    return iter(lambda: tuple(islice(left, size)), ())


def joined(parts: Sequence[Sequence[T]]) -> Sequence[T]:
    """The rows of all parts, one after the other: all of them streamed, or none."""
    streamed = [part for rows in parts if isinstance(rows, StreamedRows) for part in rows.parts]
    return StreamedRows(streamed) if streamed else tuple(chain.from_iterable(parts))
