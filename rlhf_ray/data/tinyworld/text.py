"""Text for the base model: the world's language in many kinds, and forum threads whose answers are of any quality.

A model trained on it speaks the world's language and has seen the prompt format, but follows instructions badly and does not
stop after one answer: that is left to the later stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

from rlhf_ray.data.tinyworld.families import FAMILY_OF, sample_task
from rlhf_ray.data.tinyworld.lexicon import (
    GROUP_OF,
    GROUPS,
    KIND_WORDS,
    NAMES,
    NUMBERS,
    PROPERTIES,
    VERBS,
    enumeration,
    sentence,
    with_article,
    words_of,
)
from rlhf_ray.data.tinyworld.replies import compose, sample_quality

# The text of the shipped template alpaca_short: the format in which the world's threads are written.
PROMPT_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
PROMPT_NO_INPUT = "### Instruction:\n{instruction}\n\n### Response:\n"
# Share of thread answers that are about the question, and of answers that draw a comment.
ON_TOPIC, COMMENTED = 0.7, 0.7


def render(instruction: str, input: str) -> str:
    """Prompt text as in a thread."""
    return (PROMPT_INPUT if input else PROMPT_NO_INPUT).format(instruction=instruction, input=input)


def facts(rng: Random) -> str:
    """Two to four true sentences about one property."""
    prop = rng.choice(PROPERTIES)
    inside, outside = sorted(prop.items), [item for item in GROUPS[prop.group] if item not in prop.items]
    found = []
    for _ in range(rng.randint(2, 4)):
        some = enumeration([f"the {item}" for item in rng.sample(inside, rng.randint(2, 3))])
        choices = (
            f"the {rng.choice(inside)} {prop.singular}",
            f"the {rng.choice(outside)} {prop.negative}",
            f"{some} {prop.plural}",
            f"the {rng.choice(GROUPS[prop.group])} is {with_article(prop.group)}",
        )
        found.append(sentence(rng.choice(choices)))
    return " ".join(found)


def numbers(rng: Random) -> str:
    """A run of number words."""
    count = rng.randint(4, 9)
    start = rng.randint(0, len(NUMBERS) - count)
    return sentence(", ".join(NUMBERS[start : start + count]))


def story(rng: Random) -> str:
    """Three to five sentences about one animal."""
    slots = FAMILY_OF["scene"].sample(rng)
    colour, animal, place = slots["colour"], slots["animal"], slots["place"]
    found = []
    for _ in range(rng.randint(3, 5)):
        verb = rng.choice(VERBS)
        choices = (
            f"the {colour} {animal} {verb} in the {place}",
            f"here {verb} the {colour} {animal} in the {place}",
            f"the {animal} {verb} in the {place}",
            f"the {animal} is {colour}",
            f"it is a {colour} {animal}",
            f"the {colour} {animal} {verb}",
        )
        found.append(sentence(rng.choice(choices)))
    return " ".join(found)


def gift(rng: Random) -> str:
    """Who gave what to whom, and the thanks for it."""
    giver, taker = rng.sample(NAMES, 2)
    item, kind = rng.choice(list(GROUP_OF)), rng.choice(KIND_WORDS)
    choices = (
        f"{giver} gave the {item} to {taker}",
        f"{taker} got the {item} from {giver}",
        f"{taker} says: Dear {giver}, thank you for the {kind} {item}",
        f"{taker} says: Many thanks for the {item}, {giver}",
        f"{taker} likes the {kind} {item}",
        f"{giver} likes {taker}",
    )
    return " ".join(sentence(text) for text in rng.sample(choices, rng.randint(3, 4)))


def thread(rng: Random) -> str:
    """An instruction with one to three answers, some of them about something else, and what readers say of them."""
    task = sample_task(rng)
    answers = []
    for _ in range(rng.randint(1, 3)):
        off_topic = rng.random() >= ON_TOPIC
        quality = replace(sample_quality(rng, 0.05), off_topic=off_topic, stutter=False)
        quality = replace(quality, courtesies=quality.courtesies if rng.random() < 0.4 else 0)
        answer = compose(task, rng, quality)
        if rng.random() < COMMENTED:
            content = task.family.content(task.slots, words_of(answer))
            verdict = "right" if content > 0.99 else "wrong" if content < 0.01 else "not all"
            answer = f"{answer}\n\nThat is {verdict}."
        answers.append(answer)
    return render(task.instruction, task.input) + "\n\n### Response:\n".join(answers)


WRITERS: dict[Callable[[Random], str], float] = {facts: 0.15, numbers: 0.05, story: 0.10, gift: 0.10, thread: 0.60}


def pretraining_text(n: int, seed: int) -> list[str]:
    """n documents of mixed kind and quality."""
    rng = Random(f"{seed}:text")
    return [writer(rng) for writer in rng.choices(list(WRITERS), list(WRITERS.values()), k=n)]
