"""Which rows train and which are held out: one rule by the hash of the prompt, the same in every stage.

A prompt is held out or not whatever file, row order, format or seed it comes with, so no stage trains on what another one
evaluates on, and rows that share a prompt never stand on both sides.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rlhf_ray.data.prompts import Prompt
from rlhf_ray.data.records import Row
from rlhf_ray.data.streamed import StreamedRows, in_slices, picked

Half = Literal["reward", "ppo"]
_AT_ONCE = 100_000
"""Streamed rows whose questions are in memory together."""


def prompt_hash(prompt: Prompt) -> int:
    """A 64-bit number: the first 8 bytes, big end first, of BLAKE2b over the prompt's last question in UTF-8."""
    digest = hashlib.blake2b(prompt.question().encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def is_held_out(hashed: int, held_out_fraction: float) -> bool:
    """Whether a prompt with this hash is held out: hash / 2^64 < held_out_fraction."""
    return hashed < int(held_out_fraction * 2.0**64)


def half_of(hashed: int) -> Half:
    """Which stage trains on a prompt when stages are disjoint. The lowest bit decides; the held-out rule reads the highest."""
    return "ppo" if hashed & 1 else "reward"


def confirms(hashed: int) -> bool:
    """Whether a held-out prompt confirms what the others choose. The second-lowest bit decides, which no other rule reads."""
    return bool(hashed & 2)


@dataclass(frozen=True)
class Split:
    """Rows in file order. `other_half` counts rows left to the other stage."""

    train: Sequence[Row]
    held_out: Sequence[Row]
    other_half: int = 0


def split(rows: Sequence[Row], held_out_fraction: float, disjoint_stage: Half | None = None) -> Split:
    """Cut rows into training and held-out rows.

    With `disjoint_stage` only that stage's half of the prompts trains; the held-out rows are the same for all stages.
    """
    trains, is_held = bytearray(), bytearray()
    for row in rows:
        hashed = prompt_hash(row.key)
        is_held.append(is_held_out(hashed, held_out_fraction))
        trains.append(not is_held[-1] and (disjoint_stage is None or half_of(hashed) == disjoint_stage))
    other_half = len(trains) - sum(trains) - sum(is_held)
    return Split(picked(rows, trains), picked(rows, is_held), other_half)


@dataclass(frozen=True)
class Overlap:
    """How many of some rows ask what other rows ask, and where the first of them stands."""

    count: int
    first: str = ""
    total: int = 0

    def warning(self) -> str:
        """A line for the log, or "" where nothing overlaps."""
        if not self.count:
            return ""
        return (
            f"{self.count:,} of {self.total:,} evaluation prompts are also training prompts (first {self.first}):"
            " their scores will be too good"
        )


class Questions:
    """What some rows ask, to be looked up. Bare texts (format `text`) ask nothing: they continue whatever they begin with.

    Prompts are compared by hash; a prompt and a bare text match where the text begins with the prompt."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._hashes: set[int] = set()
        self._prompts: set[int] = set()  # hashes as well: there may be more prompts than memory
        self._texts: list[str] = []
        lengths: set[int] = set()
        for row in rows:
            self._hashes.add(prompt_hash(row.key))
            text = row.key.canonical()
            if row.prompt.is_blank:
                self._texts.append(text)
            else:
                self._prompts.add(hash(text))
                lengths.add(len(text))
        self._texts.sort()
        self._lengths = sorted(lengths - {0})

    def __contains__(self, row: Row) -> bool:
        if prompt_hash(row.key) in self._hashes:
            return True
        text = row.key.canonical()
        if row.prompt.is_blank:
            return any(hash(text[:length]) in self._prompts for length in self._lengths if length < len(text))
        at = bisect.bisect_left(self._texts, text)
        return bool(text) and at < len(self._texts) and self._texts[at].startswith(text)


def overlap(evaluated: Sequence[Row], trained: Iterable[Row]) -> Overlap:
    """The rows of `evaluated` whose prompt is also in `trained`, or opens a text that is."""
    parts: Iterable[Iterable[Row]] = [trained]
    if isinstance(trained, StreamedRows) and not isinstance(evaluated, StreamedRows):
        parts = in_slices(trained, _AT_ONCE)  # what they ask may be larger than memory
    shared, first = bytearray(len(evaluated)), (len(evaluated), "")
    for part in parts:
        known = Questions(part)
        for i, row in enumerate(evaluated):
            if not shared[i] and row in known:
                shared[i], first = 1, min(first, (i, row.where))
    return Overlap(sum(shared), first[1], len(evaluated))
