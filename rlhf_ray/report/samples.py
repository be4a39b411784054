"""Replies as the run wrote them: by step, or in an evaluation by prompt with the policies side by side."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rlhf_ray.report.html import Html, tag
from rlhf_ray.report.numbers import shown
from rlhf_ray.report.sheet import NOTE, sheet

MOST_STEPS = 25
MOST_PER_STEP = 8
MOST_PROMPTS = 40
CHARACTERS = 3000
NOT_FIGURES = ("step", "id", "row", "index")

Sample = dict[str, Any]
Shorten = Callable[[str], str]


def samples_section(samples: Sequence[Sample]) -> Html | None:
    """None if there are no samples."""
    usable = [s for s in samples if isinstance(s.get("reply"), str)]
    if not usable:
        return None
    shorten, notes = _without_template({str(s.get("prompt", "")) for s in usable})
    blocks = (
        _by_prompt(usable, shorten, notes) if any("policy" in s for s in usable) else _by_step(usable, shorten, notes)
    )
    return tag("div", tag("p", " ".join(notes), class_="note") if notes else None, blocks, class_="samples")


def _by_step(samples: Sequence[Sample], shorten: Shorten, notes: list[str]) -> Html:
    steps: dict[Any, list[Sample]] = {}
    for sample in samples:
        step = sample.get("step", 0)
        steps.setdefault(step if isinstance(step, (int, float, str)) else str(step), []).append(sample)
    kept = _spread(list(steps), MOST_STEPS)
    if len(kept) < len(steps):
        notes.append(f"{len(kept)} of {len(steps)} steps are shown; samples.jsonl has all of them.")
    blocks = [
        tag(
            "details",
            tag("summary", f"Step {step}", tag("small", _average(steps[step]))),
            tag("div", [_card(s, shorten) for s in steps[step][:MOST_PER_STEP]], class_="cards"),
            class_="step",
            data_step=step,
            open=step in (kept[0], kept[-1]),
        )
        for step in kept
    ]
    return tag("div", blocks, class_="steps")


def _by_prompt(samples: Sequence[Sample], shorten: Shorten, notes: list[str]) -> Html:
    prompts: dict[str, list[Sample]] = {}
    for sample in samples:
        prompts.setdefault(str(sample.get("prompt", "")), []).append(sample)
    kept = list(prompts)[:MOST_PROMPTS]
    if len(kept) < len(prompts):
        notes.append(f"{len(kept)} of {len(prompts)} prompts are shown; samples.jsonl has all of them.")
    if any(len(prompts[prompt]) > 1 for prompt in kept):
        notes.append(NOTE)
    return sheet(
        {prompt: prompts[prompt] for prompt in kept},
        lambda sample, reply: _card(sample, None, reply),
        lambda prompt: _one_line(shorten(prompt)),
    )


def _card(sample: Mapping[str, Any], shorten: Shorten | None, reply: Html | None = None) -> Html:
    """reply: as markup; default: its text, cut where it is very long."""
    figures = [
        tag("span", f"{name} ", tag("b", shown(value)))
        for name, value in sample.items()
        if name not in NOT_FIGURES and isinstance(value, (int, float)) and not isinstance(value, bool)
    ]
    if sample.get("finished") is False:
        figures.append(tag("span", "cut off", class_="cut"))
    policy = tag("h5", sample["policy"]) if sample.get("policy") else None
    prompt = tag("pre", _cut(shorten(str(sample.get("prompt", "")))), class_="prompt") if shorten else None
    plain = _cut(sample["reply"].strip())
    content = reply if reply is not None and len(sample["reply"]) <= CHARACTERS else plain
    return tag(
        "article",
        policy,
        prompt,
        tag("pre", content if plain else tag("em", "empty reply"), class_="reply"),
        tag("p", figures, class_="figures"),
    )


_LINE_OR_MARKER = re.compile(r"\n|</?\|?\w+\|?>")
"""A line's end, or a template's marker such as <|im_end|>, <end_of_turn>, </s>."""


def _without_template(prompts: Iterable[str]) -> tuple[Shorten, list[str]]:
    """A function that drops the whole lines and markers with which all prompts start and end, and a note that says what is
    dropped."""
    all_prompts = list(prompts)
    if len(all_prompts) < 2:
        return str.strip, []
    start = _shared_start(all_prompts)
    start = start[: start.rfind("\n") + 1]
    end = _shared_start([p[len(start) :][::-1] for p in all_prompts])[::-1]
    begins = _LINE_OR_MARKER.search(end)
    end = end[begins.start() :] if begins else ""
    template = _one_line(f"{start}[…]{end}", 300)
    notes = [f"All prompts share this template, not repeated here: “{template}”"] if start or end else []
    return lambda prompt: prompt[len(start) : len(prompt) - len(end)].strip(), notes


def _shared_start(texts: Sequence[str]) -> str:
    first, final = min(texts), max(texts)
    same = next((i for i, (a, b) in enumerate(zip(first, final)) if a != b), min(len(first), len(final)))
    return first[:same]


def _average(samples: Sequence[Sample]) -> str:
    rewards = [s["reward"] for s in samples if isinstance(s.get("reward"), (int, float))]
    return f" mean reward {shown(sum(rewards) / len(rewards))} over {len(rewards)} replies" if rewards else ""


def _spread(items: list[Any], most: int) -> list[Any]:
    """At most `most` items, evenly spread, the first and last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _cut(text: str) -> str:
    return text if len(text) <= CHARACTERS else text[:CHARACTERS] + f" … ({len(text) - CHARACTERS:,} more characters)"


def _one_line(text: str, most: int = 110) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[:most] + " …"
