"""Which rows train and which are held out: one rule by the hash of the prompt, the same in every stage.

A prompt is held out or not whatever file, row order, format or seed it comes with, so no stage trains on what another one
evaluates on, and rows that share a prompt never stand on both sides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rlhf_ray.data.prompts import Prompt
from rlhf_ray.data.records import Row

Half = Literal["reward", "ppo"]


def prompt_hash(prompt: Prompt) -> int:
    """A 64-bit number: the first 8 bytes, big end first, of BLAKE2b over the prompt's canonical UTF-8 text."""
    digest = hashlib.blake2b(prompt.canonical().encode("utf-8"), digest_size=8).digest()
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


def overlap(evaluated: Sequence[Row], trained: Iterable[Row]) -> Overlap:
    """The rows of `evaluated` whose prompt is also in `trained`, compared by hash."""
    known = {prompt_hash(row.key) for row in trained}
    shared = [row for row in evaluated if prompt_hash(row.key) in known]
    return Overlap(len(shared), shared[0].where if shared else "", len(evaluated))
