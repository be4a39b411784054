"""Training rows of several files in given shares (`data.weights`)."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from rlhf_ray.data.records import Row
from rlhf_ray.data.streamed import joined, picked
from rlhf_ray.errors import DataError
from rlhf_ray.maths.rng import derived_seed


def mixture(
    files: Sequence[tuple[str, Sequence[Row]]], weights: Sequence[float], seed: int, max_rows: int | None = None
) -> tuple[Sequence[Row], str]:
    """The most rows, none of them twice, of which file i is the share weights[i] / sum(weights), and a line for the log.

    files: (name, its training rows) each.   seed: chooses the rows of a file of which not all are taken; they stay in file order.
    max_rows: at most so many in all.   Raises DataError if a file has no row."""
    total = sum(weights)
    shares = [weight / total for weight in weights]
    DataError.raise_all(
        problem
        for name, rows in files
        if not rows
        for problem in DataError.at(name, "no row to mix (data.weights)").problems
    )
    most = min(len(rows) / share for (_, rows), share in zip(files, shares))
    most = most if max_rows is None else min(most, max_rows)
    found: list[Sequence[Row]] = []
    told = []
    for (name, rows), share in zip(files, shares):
        count = int(most * share + 1e-9)
        hashes = array("q", (derived_seed(seed, "mixture", row.where) for row in rows))
        is_taken = bytearray(len(rows))
        for i in sorted(range(len(rows)), key=hashes.__getitem__)[:count]:
            is_taken[i] = 1
        found.append(picked(rows, is_taken))
        told.append(f"{count:,} of {len(rows):,} rows of {name}")
    return joined(found), f"mixed: {', '.join(told)} ({sum(map(len, found)):,} in all)"
