"""Tokenised rows as bytes instead of Python objects, of which each token would take some 40: in memory, or in a file.

The file has no name. So it is gone when the process ends, however that ends, and nothing that an earlier start has written can be
read for what the data say now.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.data.records import Row
from rlhf_ray.data.streamed import in_slices
from rlhf_ray.data.tokenise import Tokenised
from rlhf_ray.errors import DataError, Problem

SLICE = 2048
"""Rows that are tokenised together: all that is in memory of a row that is streamed."""
_BUFFER = 1 << 20
T = TypeVar("T")


class StoredRows(Sequence[T]):
    """TokenisedRows or TokenisedPairs, made again from their bytes each time one is asked for; a slice copies nothing.

    data: u8[.], row after row.   starts, ends: i64[N] of each row in it.   lengths: i32[N] tokens of each row, of the longer reply
    of a pair."""

    def __init__(
        self,
        kind: Callable[..., T],
        data: NDArray[np.uint8],
        starts: NDArray[np.int64],
        ends: NDArray[np.int64],
        lengths: NDArray[np.int32],
    ) -> None:
        self._kind, self._data, self._starts, self._ends, self.lengths = kind, data, starts, ends, lengths

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, at: int) -> T: ...
    @overload
    def __getitem__(self, at: slice) -> StoredRows[T]: ...
    def __getitem__(self, at: int | slice) -> T | StoredRows[T]:
        if isinstance(at, slice):
            return StoredRows(self._kind, self._data, self._starts[at], self._ends[at], self.lengths[at])
        return _unpacked(self._kind, self._data[self._starts[at] : self._ends[at]].tobytes())


def _packed(row: Any) -> tuple[bytes, int]:
    """A row's bytes and its tokens. Its first two fields are lists of token ids or labels, the others are JSON."""
    first, second, *others = (getattr(row, field.name) for field in fields(row))
    numbers = array("i", (len(first), len(second), *first, *second))
    return numbers.tobytes() + json.dumps(others).encode("ascii"), max(len(first), len(second))


def _unpacked(kind: Callable[..., T], packed: bytes) -> T:
    first, second = np.frombuffer(packed, np.intc, 2).tolist()
    numbers = np.frombuffer(packed, np.intc, 2 + first + second).tolist()
    return kind(numbers[2 : 2 + first], numbers[2 + first :], *json.loads(packed[4 * len(numbers) :]))


def stored(rows: Iterable[T], folder: Path | None = None) -> StoredRows[T]:
    """folder: where the file of the bytes is to lie; None keeps them in memory. Raises OSError where there is no room for it."""
    kind: type[Any] = tuple
    ends, lengths, kept = array("q", [0]), array("i"), bytearray()
    with ExitStack() as stack:
        file = None if folder is None else stack.enter_context(TemporaryFile(buffering=_BUFFER, dir=folder))
        write: Callable[[bytes], object] = kept.extend if file is None else file.write
        for row in rows:
            packed, length = _packed(row)
            write(packed)
            ends.append(ends[-1] + len(packed))
            lengths.append(length)
            kind = type(row)
        if file is None or not lengths:
            data = np.asarray(memoryview(kept))
        else:
            file.flush()
            data = np.memmap(file, np.uint8, "r").view(np.ndarray)  # which keeps the file after it is closed
    edges = np.asarray(memoryview(ends))
    return StoredRows(kind, data, edges[:-1], edges[1:], np.asarray(memoryview(lengths)))


def tokenised(
    rows: Iterable[Row], tokenise: Callable[[Sequence[Row]], Tokenised[T]], folder: Path | None = None
) -> tuple[StoredRows[T], Tokenised[T]]:
    """What `tokenise` makes of `rows`, slice by slice, and an account of all slices, without examples.   folder: see `stored`.

    Raises DataError that tells the problems of all rows."""
    account = Tokenised[T]()
    problems: dict[Problem, None] = {}

    def examples() -> Iterator[T]:
        for part in in_slices(rows, SLICE):
            try:
                done = tokenise(part)
            except DataError as error:
                problems.update(dict.fromkeys(error.problems))
                continue
            account.count(done)
            if not problems:
                yield from done.examples

    found = stored(examples(), folder)
    DataError.raise_all(problems)
    return found, account
