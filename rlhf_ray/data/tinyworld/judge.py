"""The true reward of the tiny world: a plain function of the instruction and the reply, so that over-optimisation can be seen.

A learned reward model only approximates it. Pushing one part to the extreme lowers the whole: more than one courtesy, more
words than wanted and repeated words all cost."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from random import Random
from typing import Any

from rlhf_ray.data.tinyworld.families import TinyTask, parse_task, sample_task
from rlhf_ray.data.tinyworld.lexicon import (
    COLOURS,
    COURTESIES,
    FUNCTION_WORDS,
    GROUP_OF,
    NAMES,
    NUMBERS,
    PLACES,
    RAMBLES,
    words_of,
)
from rlhf_ray.data.tinyworld.replies import PERFECT, compose
from rlhf_ray.errors import DataError

WEIGHTS = {"content": 0.4, "courtesy": 0.25, "length": 0.15, "form": 0.2}
SHORTEST, LEAST, MOST, LONGEST = 2, 8, 14, 26
"""Words: full marks for length from LEAST to MOST, none up to SHORTEST and from LONGEST on, straight lines between."""


@dataclass(frozen=True)
class Judgement:
    """The parts of the true reward, each 0 to 1; `repetition` is the share of content words that were said before."""

    content: float
    courtesy: float
    length: float
    form: float
    repetition: float

    @property
    def total(self) -> float:
        """(0.4 content + 0.25 courtesy + 0.15 length + 0.2 form) x (1 - repetition)."""
        return sum(weight * getattr(self, part) for part, weight in WEIGHTS.items()) * (1.0 - self.repetition)


def courtesy(response: str) -> float:
    """1 for exactly one kind phrase, 0 for none, and 0 again for two or more: more is flattery."""
    text = response.lower()
    return 1.0 if sum(text.count(phrase.lower()) for phrase in COURTESIES) == 1 else 0.0


def length(words: Sequence[str]) -> float:
    """1 inside the wanted number of words, falling to 0 on both sides."""
    count = len(words)
    return min(max(min((count - SHORTEST) / (LEAST - SHORTEST), (LONGEST - count) / (LONGEST - MOST)), 0.0), 1.0)


def repetition(words: Sequence[str]) -> float:
    """Share of content words that are repeats of an earlier one; 0 if there is no content word."""
    content = [word for word in words if word not in FUNCTION_WORDS]
    return 1.0 - len(set(content)) / len(content) if content else 0.0


_CLASSES = {
    **dict.fromkeys(GROUP_OF, "<item>"),
    **dict.fromkeys(COLOURS, "<colour>"),
    **dict.fromkeys(PLACES, "<place>"),
    **dict.fromkeys(NUMBERS, "<number>"),
    **{name.lower(): "<name>" for name in NAMES},
}


def _steps(response: str) -> list[tuple[str, str]]:
    """Neighbouring words inside each sentence, words of one kind taken as one."""
    pairs = []
    for part in re.split(r"[.!?]", response):
        words = [_CLASSES.get(word, word) for word in words_of(part)]
        pairs += list(zip(["", *words], words))
    return pairs


@lru_cache(maxsize=1)
def _usual_steps() -> frozenset[tuple[str, str]]:
    """Word neighbours of the world's own good sentences."""
    rng = Random("neighbours")
    kinds = (PERFECT, replace(PERFECT, level="partial"))
    texts = [compose(sample_task(rng), rng, quality) for quality in kinds for _ in range(3000)]
    return frozenset(pair for text in (*texts, *RAMBLES, *(f"{c}." for c in COURTESIES)) for pair in _steps(text))


def form(response: str) -> float:
    """A third each: a capital at the start, a full stop or its like at the end, the share of words that follow usually."""
    text, pairs = response.strip(), _steps(response)
    if not pairs:
        return 0.0
    usual = sum(pair in _usual_steps() for pair in pairs) / len(pairs)
    return (text[:1].isupper() + text.endswith((".", "!", "?")) + usual) / 3


@lru_cache(maxsize=1 << 14)
def _task(instruction: str, input: str) -> TinyTask | None:
    return parse_task(instruction, input)


def judge(row: Mapping[str, Any], response: str) -> Judgement:
    """The parts of the true reward of `response` to a row with `instruction` and (optional) `input`.

    Raises DataError if the instruction is not one of this world: nothing is known about such a reply."""
    instruction, input = row["instruction"], row.get("input") or ""
    task = _task(instruction, input)
    if task is None:
        raise DataError.at(
            "tinyworld", "the instruction is not of the tiny world", got=f"{instruction!r}, input {input!r}"
        )
    words = words_of(response)
    return Judgement(
        task.family.content(task.slots, words), courtesy(response), length(words), form(response), repetition(words)
    )


def true_reward(row: Mapping[str, Any], response: str) -> float:
    """True reward of a reply, from 0 to 1: `Judgement.total`."""
    return judge(row, response).total


def score(prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
    """The true reward as a Python reward with TRL's signature.

    Reads the columns `instruction` and `input`; without them, finds the instruction in the text of the prompt, whatever
    template it was put in. Raises DataError if a prompt holds no instruction of this world."""
    if "instruction" in columns:
        inputs = columns.get("input") or [""] * len(completions)
        rows = [{"instruction": i, "input": x} for i, x in zip(columns["instruction"], inputs, strict=True)]
    else:
        rows = [_read_prompt(prompt) for prompt in prompts]
    return [true_reward(row, response) for row, response in zip(rows, completions, strict=True)]


def _read_prompt(prompt: str) -> dict[str, str]:
    """The instruction and input that stand on lines of their own in a prompt."""
    lines = [line for line in prompt.splitlines() if line]
    for at, instruction in enumerate(lines):
        for input in (*lines[at + 1 :], ""):
            if _task(instruction, input) is not None:
                return {"instruction": instruction, "input": input}
    raise DataError.at("tinyworld", "no instruction of the tiny world in the prompt", got=repr(prompt))
