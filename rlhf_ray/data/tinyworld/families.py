"""The six kinds of instruction of the tiny world: how each is worded, answered at three levels of quality, and judged."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Literal

from rlhf_ray.data.tinyworld.lexicon import (
    COLOURS,
    GROUP_OF,
    GROUPS,
    KIND_WORDS,
    NAMES,
    NUMBERS,
    PLACES,
    PROPERTIES,
    VERBS,
    Property,
    enumeration,
    sentence,
    with_article,
)

Slots = Mapping[str, str]
Level = Literal["good", "partial", "wrong"]
BY_PLURAL: dict[str, Property] = {p.plural: p for p in PROPERTIES}
ITEMS = tuple(GROUP_OF)


@dataclass(frozen=True)
class Wording:
    """An instruction and its input with slots like {item}; `fixed` holds slots that this wording implies."""

    instruction: str
    input: str = ""
    fixed: tuple[tuple[str, str], ...] = ()

    def render(self, slots: Slots) -> tuple[str, str]:
        return self.instruction.format_map(slots), self.input.format_map(slots)

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches "instruction newline input" and captures the slots."""
        text = re.escape(f"{self.instruction}\n{self.input}")
        return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>[A-Za-z, ]+?)", text))


class Family:
    """One kind of instruction. Subclasses say how slots are drawn, how a reply is worded and how its content is judged."""

    name: str
    wordings: tuple[Wording, ...]

    def sample(self, rng: Random) -> dict[str, str]:
        """Draw the slots of one task."""
        raise NotImplementedError

    def valid(self, slots: Slots) -> bool:
        """Whether slots read from a text belong to this world."""
        raise NotImplementedError

    def body(self, slots: Slots, rng: Random, level: Level) -> str:
        """One sentence of reply: good, partial (something is missing) or wrong (something is false or about something else)."""
        raise NotImplementedError

    def content(self, slots: Slots, words: Sequence[str]) -> float:
        """How well the words (lower case) of a reply do what was asked, 0 to 1."""
        raise NotImplementedError

    def parse(self, instruction: str, input: str) -> dict[str, str] | None:
        for wording in self.wordings:
            match = wording.pattern.fullmatch(f"{instruction}\n{input}")
            if match:
                slots = {**match.groupdict(), **dict(wording.fixed)}
                if self.valid(slots):
                    return slots
        return None


def _clip(value: float) -> float:
    return min(max(value, 0.0), 1.0)


def _the(items: Sequence[str]) -> str:
    return enumeration([f"the {item}" for item in items])


def _mentioned(words: Sequence[str], vocabulary: Sequence[str]) -> list[str]:
    """Members of `vocabulary` among `words`, each once, in the order of their first mention."""
    return [word for word in dict.fromkeys(words) if word in vocabulary]


class Name(Family):
    """Name two animals that can fly, but not the owl."""

    name = "name"
    wordings = (
        Wording("Name {count} {group}s that {plural}, but not the {item}."),
        Wording("Please list {count} {group}s that {plural}, without the {item}."),
        Wording("Which {count} {group}s {plural}? Leave out the {item}."),
        Wording("Give me {count} {group}s that {plural}. The {item} does not count."),
        Wording("I know that the {item} is one of the {group}s that {plural}. Name {count} more."),
        Wording("Find {count} {group}s that {plural}. I have the {item} already."),
    )

    def sample(self, rng: Random) -> dict[str, str]:
        prop = rng.choice(PROPERTIES)
        most = min(3, len(prop.items) - 1)
        count = NUMBERS[rng.randint(2, most) - 1]
        return {"count": count, "group": prop.group, "plural": prop.plural, "item": rng.choice(sorted(prop.items))}

    def valid(self, slots: Slots) -> bool:
        prop = BY_PLURAL.get(slots["plural"])
        return (
            prop is not None
            and prop.group == slots["group"]
            and slots["item"] in prop.items
            and slots["count"] in NUMBERS
        )

    def _allowed(self, slots: Slots) -> list[str]:
        return sorted(BY_PLURAL[slots["plural"]].items - {slots["item"]})

    def body(self, slots: Slots, rng: Random, level: Level) -> str:
        prop, count = BY_PLURAL[slots["plural"]], NUMBERS.index(slots["count"]) + 1
        chosen = rng.sample(self._allowed(slots), count)
        if level == "partial":
            chosen = chosen[:-1]
        if level == "wrong":
            others = [item for item in GROUPS[prop.group] if item not in prop.items] + [slots["item"]]
            chosen = rng.sample(others, max(1, count - 1)) + chosen[: 1 if count > 2 else 0]
        verb = prop.singular if len(chosen) == 1 else prop.plural
        return sentence(rng.choice((f"{_the(chosen)} {verb}", f"I would name {_the(chosen)}")))

    def content(self, slots: Slots, words: Sequence[str]) -> float:
        allowed, count = self._allowed(slots), NUMBERS.index(slots["count"]) + 1
        named = _mentioned(words, ITEMS)
        right = sum(item in allowed for item in named)
        wrong = len(named) - right + max(0, right - count)
        return _clip((min(right, count) - wrong) / count)


class Odd(Family):
    """Find the odd one out. Input: oak, pine, soup, elm"""

    name = "odd"
    wordings = tuple(
        Wording(text, "{words}")
        for text in (
            "Which word does not belong?",
            "Find the odd one out.",
            "One of these words is different. Which one is it?",
            "Three of these words belong together. Which one does not?",
        )
    )

    def sample(self, rng: Random) -> dict[str, str]:
        group, other = rng.sample(sorted(GROUPS), 2)
        words = rng.sample(GROUPS[group], 3) + [rng.choice(GROUPS[other])]
        rng.shuffle(words)
        return {"words": ", ".join(words)}

    def valid(self, slots: Slots) -> bool:
        groups = [GROUP_OF.get(word, "") for word in slots["words"].split(", ")]
        return "" not in groups and sorted(groups.count(group) for group in set(groups)) == [1, len(groups) - 1]

    def _odd(self, slots: Slots) -> tuple[str, list[str]]:
        words = slots["words"].split(", ")
        groups = [GROUP_OF[word] for word in words]
        odd = next(word for word, group in zip(words, groups) if groups.count(group) == 1)
        return odd, [word for word in words if word != odd]

    def body(self, slots: Slots, rng: Random, level: Level) -> str:
        odd, others = self._odd(slots)
        if level == "partial":
            return sentence(f"the odd one out is the {odd}")
        if level == "wrong":
            odd = rng.choice(others)
        reason = f"because it is {with_article(GROUP_OF[odd])}"
        return sentence(rng.choice((f"the {odd} does not belong, {reason}", f"it is the {odd}, {reason}")))

    def content(self, slots: Slots, words: Sequence[str]) -> float:
        odd, _ = self._odd(slots)
        named = _mentioned(words, ITEMS)
        wrong = sum(item != odd for item in named)
        return _clip(0.7 * (odd in named) + 0.3 * (odd in named and GROUP_OF[odd] in words) - 0.7 * wrong)


class Count(Family):
    """Which three numbers come next? Input: four, five"""

    name = "count"
    wordings = (
        Wording("Which {count} numbers come next?", "{words}"),
        Wording("Go on counting with {count} more numbers.", "{words}"),
        Wording("Continue with the next {count} numbers.", "{words}"),
        Wording("I have counted this far. Say {count} more numbers.", "{words}"),
        Wording("What are the {count} numbers after these?", "{words}"),
    )

    def sample(self, rng: Random) -> dict[str, str]:
        given, count = rng.randint(2, 5), rng.randint(2, 3)
        start = rng.randint(0, len(NUMBERS) - given - count)
        return {"count": NUMBERS[count - 1], "words": ", ".join(NUMBERS[start : start + given])}

    def valid(self, slots: Slots) -> bool:
        if slots["count"] not in NUMBERS or any(word not in NUMBERS for word in slots["words"].split(", ")):
            return False
        return len(self._expected(slots)) == NUMBERS.index(slots["count"]) + 1

    def _expected(self, slots: Slots) -> tuple[str, ...]:
        first = NUMBERS.index(slots["words"].split(", ")[-1]) + 1
        return NUMBERS[first : first + NUMBERS.index(slots["count"]) + 1]

    def body(self, slots: Slots, rng: Random, level: Level) -> str:
        expected = list(self._expected(slots))
        if level == "partial":
            expected.pop()
        if level == "wrong":
            start = rng.randrange(len(NUMBERS) - len(expected))
            expected = list(NUMBERS[start : start + len(expected)])
        listed = enumeration(expected)
        if len(expected) == 1:
            return sentence(rng.choice((f"the next number is {listed}", f"after that comes {listed}")))
        return sentence(rng.choice((f"the next numbers are {listed}", f"after that come {listed}")))

    def content(self, slots: Slots, words: Sequence[str]) -> float:
        expected = self._expected(slots)
        named = [word for word in words if word in NUMBERS]
        right = sum(a == b for a, b in zip(named, expected))
        return _clip((right - max(0, len(named) - len(expected))) / len(expected))


class Scene(Family):
    """Describe a brown fox in the barn."""

    name = "scene"
    wordings = (
        Wording("Write a sentence about a {colour} {animal} in the {place}."),
        Wording("Describe a {colour} {animal} in the {place}."),
        Wording("Tell me what a {colour} {animal} does in the {place}."),
    )

    def sample(self, rng: Random) -> dict[str, str]:
        return {"colour": rng.choice(COLOURS), "animal": rng.choice(GROUPS["animal"]), "place": rng.choice(PLACES)}

    def valid(self, slots: Slots) -> bool:
        return slots["colour"] in COLOURS and slots["animal"] in GROUPS["animal"] and slots["place"] in PLACES

    def body(self, slots: Slots, rng: Random, level: Level) -> str:
        colour, animal, place = f"{slots['colour']} ", slots["animal"], f" in the {slots['place']}"
        if level == "partial":
            colour, place = rng.choice((("", place), (colour, ""), ("", "")))
        if level == "wrong":
            animal = rng.choice([a for a in GROUPS["animal"] if a != animal])
            place = f" in the {rng.choice(PLACES)}"
        verb = rng.choice(VERBS)
        return sentence(rng.choice((f"the {colour}{animal} {verb}{place}", f"here {verb} the {colour}{animal}{place}")))

    def content(self, slots: Slots, words: Sequence[str]) -> float:
        asked = (slots["colour"], slots["animal"], slots["place"])
        others = [w for w in _mentioned(words, (*ITEMS, *COLOURS, *PLACES)) if w not in asked]
        return _clip((sum(word in words for word in asked) - len(others)) / 3)


class Thanks(Family):
    """Thank Anna for the bread."""

    name = "thanks"
    wordings = (
        Wording("Thank {name} for the {gift}."),
        Wording("Write a note to {name} and give thanks for the {gift}."),
        Wording("Help me thank {name}, who gave me the {gift}."),
    )

    def sample(self, rng: Random) -> dict[str, str]:
        return {"name": rng.choice(NAMES), "gift": rng.choice(ITEMS)}

    def valid(self, slots: Slots) -> bool:
        return slots["name"] in NAMES and slots["gift"] in ITEMS

    def body(self, slots: Slots, rng: Random, level: Level) -> str:
        name, gift, kind = slots["name"], slots["gift"], rng.choice(KIND_WORDS)
        if level == "partial":
            return sentence(f"thank you for the {gift}")
        if level == "wrong":
            name = rng.choice([n for n in NAMES if n != name])
            gift = rng.choice([g for g in ITEMS if g != gift])
        choices = (f"Dear {name}, thank you for the {kind} {gift}", f"Many thanks for the {kind} {gift}, {name}")
        return sentence(rng.choice(choices))

    def content(self, slots: Slots, words: Sequence[str]) -> float:
        asked = (slots["name"].lower(), slots["gift"])
        names = [name.lower() for name in NAMES]
        others = [w for w in _mentioned(words, (*ITEMS, *names)) if w not in asked]
        thanked = "thank" in words or "thanks" in words
        return _clip((sum(word in words for word in asked) + thanked - len(others)) / 3)


class Check(Family):
    """Can the owl fly?"""

    name = "check"
    wordings = tuple(
        Wording(f"{lead}{prop.question}", fixed=(("plural", prop.plural),))
        for prop in PROPERTIES
        for lead in ("", "Please answer this. ", "Tell me, yes or no. ", "I have a question. ", "Do you know this? ")
    )

    def sample(self, rng: Random) -> dict[str, str]:
        prop = rng.choice(PROPERTIES)
        pool = sorted(prop.items) if rng.random() < 0.5 else [i for i in GROUPS[prop.group] if i not in prop.items]
        return {"plural": prop.plural, "item": rng.choice(pool)}

    def valid(self, slots: Slots) -> bool:
        return slots["item"] in GROUPS[BY_PLURAL[slots["plural"]].group]

    def body(self, slots: Slots, rng: Random, level: Level) -> str:
        prop, item = BY_PLURAL[slots["plural"]], slots["item"]
        truth = (item in prop.items) != (level == "wrong")
        if level == "partial":
            return "Yes." if truth else "No."
        claim = prop.singular if truth else prop.negative
        return sentence(f"{'yes' if truth else 'no'}, the {item} {claim}")

    def content(self, slots: Slots, words: Sequence[str]) -> float:
        prop, item = BY_PLURAL[slots["plural"]], slots["item"]
        truth = item in prop.items
        said = {word for word in words if word in ("yes", "no")}
        claim = f" {' '.join(words)} "
        reason = f" {item} {prop.singular if truth else prop.negative} "
        others = sum(word != item for word in _mentioned(words, ITEMS))
        return _clip(0.6 * (said == {"yes" if truth else "no"}) + 0.4 * (reason in claim) - 0.4 * others)


FAMILIES: tuple[Family, ...] = (Name(), Odd(), Count(), Scene(), Thanks(), Check())
FAMILY_OF: dict[str, Family] = {family.name: family for family in FAMILIES}


@dataclass(frozen=True)
class TinyTask:
    """One instruction of the world with the slots it was made from."""

    family: Family
    slots: Slots
    instruction: str
    input: str


def sample_task(rng: Random, family: Family | None = None) -> TinyTask:
    """Draw a family if none is given, its slots and one of its wordings."""
    family = family or rng.choice(FAMILIES)
    slots = family.sample(rng)
    fitting = [w for w in family.wordings if all(slots.get(name) == value for name, value in w.fixed)]
    instruction, input = rng.choice(fitting).render(slots)
    return TinyTask(family, slots, instruction, input)


def parse_task(instruction: str, input: str) -> TinyTask | None:
    """The task that these texts state, or None if they are not of this world."""
    for family in FAMILIES:
        slots = family.parse(instruction, input)
        if slots is not None:
            return TinyTask(family, slots, instruction, input)
    return None
