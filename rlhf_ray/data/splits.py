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

Half = Literal["reward", "ppo"]


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

    train: tuple[Row, ...]
    held_out: tuple[Row, ...]
    other_half: int = 0


def split(rows: Iterable[Row], held_out_fraction: float, disjoint_stage: Half | None = None) -> Split:
    """Cut rows into training and held-out rows.

    With `disjoint_stage` only that stage's half of the prompts trains; the held-out rows are the same for all stages.
    """
    train: list[Row] = []
    held_out: list[Row] = []
    other_half = 0
    for row in rows:
        hashed = prompt_hash(row.key)
        if is_held_out(hashed, held_out_fraction):
            held_out.append(row)
        elif disjoint_stage is None or half_of(hashed) == disjoint_stage:
            train.append(row)
        else:
            other_half += 1
    return Split(tuple(train), tuple(held_out), other_half)


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
        self._prompts: set[str] = set()
        self._texts: list[str] = []
        for row in rows:
            self._hashes.add(prompt_hash(row.key))
            if row.prompt.is_blank:
                self._texts.append(row.key.canonical())
            else:
                self._prompts.add(row.prompt.canonical())
        self._texts.sort()
        self._lengths = sorted({len(prompt) for prompt in self._prompts if prompt})

    def __contains__(self, row: Row) -> bool:
        if prompt_hash(row.key) in self._hashes:
            return True
        text = row.key.canonical()
        if row.prompt.is_blank:
            return any(text[:length] in self._prompts for length in self._lengths if length < len(text))
        at = bisect.bisect_left(self._texts, text)
        return bool(text) and at < len(self._texts) and self._texts[at].startswith(text)


def overlap(evaluated: Sequence[Row], trained: Iterable[Row]) -> Overlap:
    """The rows of `evaluated` whose prompt is also in `trained`, or opens a text that is."""
    known = Questions(trained)
    shared = [row for row in evaluated if row in known]
    return Overlap(len(shared), shared[0].where if shared else "", len(evaluated))
