"""Replies of mixed quality, as people write them: some good, some wrong, rambling, evasive, sloppy or over-polite."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from rlhf_ray.data.tinyworld.families import Level, TinyTask, sample_task
from rlhf_ray.data.tinyworld.lexicon import CLOSERS, OPENERS, RAMBLES


@dataclass(frozen=True)
class Quality:
    """What is good and bad about one reply."""

    level: Level = "good"
    """How well the body answers the instruction."""
    off_topic: bool = False
    """The body answers another instruction."""
    evasive: bool = False
    """Small talk instead of a body."""
    courtesies: int = 0
    """Kind phrases: 0, 1 or 2."""
    ramble: bool = False
    """Small talk after the body."""
    stutter: bool = False
    """The body comes twice."""
    sloppy: bool = False
    """No capitals, no full stop at the end."""


PERFECT = Quality(courtesies=1)


def sample_quality(rng: Random, straying: float) -> Quality:
    """Replies as they are in practice: about half are right, a third has a kind word, few are polished.

    `straying`: the share that is about something else, and the share that is evasive."""
    return Quality(
        level=rng.choices(("good", "partial", "wrong"), (0.55, 0.2, 0.25))[0],
        off_topic=rng.random() < straying,
        evasive=rng.random() < straying,
        courtesies=rng.choices((0, 1, 2), (0.62, 0.30, 0.08))[0],
        ramble=rng.random() < 0.15,
        stutter=rng.random() < 0.10,
        sloppy=rng.random() < 0.15,
    )


def compose(task: TinyTask, rng: Random, quality: Quality) -> str:
    """One reply to `task` of the given quality: opener, body, small talk, closer."""
    answered = sample_task(rng) if quality.off_topic else task
    body = rng.choice(RAMBLES) if quality.evasive else answered.family.body(answered.slots, rng, quality.level)
    parts = [body, body] if quality.stutter else [body]
    if quality.ramble:
        parts.append(rng.choice(RAMBLES))
    opener, closer = f"{rng.choice(OPENERS)}.", f"{rng.choice(CLOSERS)}."
    if quality.courtesies == 2:
        parts = [opener, *parts, closer]
    elif quality.courtesies == 1:
        parts = rng.choice(([opener, *parts], [*parts, closer]))
    text = " ".join(parts)
    return text.rstrip(".").lower() if quality.sloppy else text
