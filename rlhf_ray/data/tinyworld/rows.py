"""Rows of the world's data files. Equal n and seed give equal rows; prompts are distinct, two pairs to a prompt in preferences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle
from random import Random
from typing import Any

from rlhf_ray.data.tinyworld.families import FAMILIES, TinyTask, sample_task
from rlhf_ray.data.tinyworld.judge import true_reward
from rlhf_ray.data.tinyworld.replies import Quality, compose, sample_quality
from rlhf_ray.errors import ConfigError

SMALLEST_MARGIN = 0.05
"""Pairs closer than this in true reward are not shown to the annotator."""
STRAYING = 0.15
"""Share of replies in pairs that are about something else, and again that are evasive: a reward model has to see such replies,
or a policy will find them."""
CONTRASTED = 0.5
"""Share of pairs that differ in how well they answer, and in nothing else."""
PAIRS_PER_PROMPT = 2
MOST_ROWS = 20_000
TRIES = 10
"""Draws of a new task before the next family has its turn."""


def sft_rows(n: int, seed: int) -> list[dict[str, Any]]:
    """Demonstrations {instruction, input, output} of mixed quality."""
    rng = Random(f"{seed}:sft")
    return [{**_prompt(task), "output": compose(task, rng, sample_quality(rng, 0.05))} for task in _distinct(n, rng)]


def prompt_rows(n: int, seed: int) -> list[dict[str, Any]]:
    """Instructions {instruction, input} without a reply."""
    return [_prompt(task) for task in _distinct(n, Random(f"{seed}:prompts"))]


def preference_rows(n: int, seed: int, label_noise: float) -> list[dict[str, Any]]:
    """Pairs {instruction, input, output_1, output_2, preference}: 1 or 2, the one with the higher true reward, except that the
    share `label_noise` (0 to 1, drawn row by row) has the other. Each prompt has PAIRS_PER_PROMPT pairs in a row."""
    rng = Random(f"{seed}:preferences")
    rows: list[dict[str, Any]] = []
    tasks = [task for task in _distinct(-(-n // PAIRS_PER_PROMPT), rng) for _ in range(PAIRS_PER_PROMPT)]
    for task in tasks[:n]:
        prompt = _prompt(task)
        first, second, margin = _pair(task, prompt, rng)
        preference = 1 if (margin > 0) != (rng.random() < label_noise) else 2
        rows.append({**prompt, "output_1": first, "output_2": second, "preference": preference})
    return rows


def _prompt(task: TinyTask) -> dict[str, Any]:
    return {"instruction": task.instruction, "input": task.input}


def _pair(task: TinyTask, prompt: dict[str, Any], rng: Random) -> tuple[str, str, float]:
    """Two replies and the true reward of the first less that of the second."""
    while True:
        one, two = (sample_quality(rng, STRAYING) for _ in range(2))
        if rng.random() < CONTRASTED:
            two = _answering_as(one, two)
        first, second = compose(task, rng, one), compose(task, rng, two)
        margin = true_reward(prompt, first) - true_reward(prompt, second)
        if abs(margin) >= SMALLEST_MARGIN:
            return first, second, margin


def _answering_as(style: Quality, answer: Quality) -> Quality:
    return replace(style, level=answer.level, off_topic=answer.off_topic, evasive=answer.evasive)


def _distinct(n: int, rng: Random) -> Iterator[TinyTask]:
    """n tasks whose instruction and input differ, of each family in turn as long as it has new ones.

    ConfigError beyond what the small world holds."""
    if n > MOST_ROWS:
        raise ConfigError.at(
            "tinyworld", "more prompts than the tiny world has to offer", f"at most {MOST_ROWS}", str(n)
        )
    seen: set[tuple[str, str]] = set()
    families = cycle(FAMILIES)
    while len(seen) < n:
        family = next(families)
        for _ in range(TRIES):
            task = sample_task(rng, family)
            key = (task.instruction, task.input)
            if key not in seen:
                seen.add(key)
                yield task
                break
