"""The words of the tiny world and what is true about them. Everything else in this package is derived from these tables."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Property:
    """Something that is true of `items` and of no other member of their group.

    `plural`, `singular` and `negative` follow a subject ("can fly", "can fly", "cannot fly"); `question` has a slot {item}.
    """

    group: str
    plural: str
    singular: str
    negative: str
    question: str
    items: frozenset[str]


def _can(group: str, verb: str, items: str) -> Property:
    does = f"can {verb}"
    return Property(group, does, does, f"cannot {verb}", f"Can the {{item}} {verb}?", frozenset(items.split()))


def _does(group: str, verb: str, rest: str, items: str) -> Property:
    members = frozenset(items.split())
    if verb == "are":
        return Property(group, f"are {rest}", f"is {rest}", f"is not {rest}", f"Is the {{item}} {rest}?", members)
    third = "has" if verb == "have" else f"{verb}s"
    question = f"Does the {{item}} {verb} {rest}?"
    return Property(group, f"{verb} {rest}", f"{third} {rest}", f"does not {verb} {rest}", question, members)


GROUPS: dict[str, tuple[str, ...]] = {
    "animal": ("owl", "crow", "bee", "duck", "frog", "seal", "cow", "hen", "goat", "fox", "wolf", "bear"),
    "food": ("apple", "pear", "plum", "honey", "jam", "cake", "bread", "soup", "stew", "tea"),
    "tool": ("knife", "saw", "axe", "spoon", "pot", "pan", "rake", "spade"),
    "plant": ("oak", "pine", "elm", "rose", "tulip", "lily", "fern", "moss"),
}
GROUP_OF: dict[str, str] = {item: group for group, items in GROUPS.items() for item in items}

PROPERTIES: tuple[Property, ...] = (
    _can("animal", "fly", "owl crow bee duck"),
    _can("animal", "swim", "duck frog seal bear"),
    _does("animal", "live", "on a farm", "duck cow hen goat"),
    _does("animal", "live", "in the forest", "owl fox wolf bear"),
    _does("food", "grow", "on a tree", "apple pear plum"),
    _does("food", "taste", "sweet", "apple pear plum honey jam cake"),
    _does("food", "are", "served hot", "soup stew tea"),
    _can("tool", "cut wood", "knife saw axe"),
    _does("tool", "belong", "in the kitchen", "knife spoon pot pan"),
    _does("plant", "grow", "very tall", "oak pine elm"),
    _does("plant", "have", "bright flowers", "rose tulip lily"),
)

NUMBERS = (
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
)
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Greta", "Hugo")
COLOURS = ("red", "blue", "green", "brown", "black", "white", "grey", "yellow")
PLACES = ("garden", "village", "meadow", "barn", "park", "house", "river", "field")
VERBS = ("sleeps", "waits", "runs", "sings", "rests", "plays")
KIND_WORDS = ("fresh", "lovely", "new", "fine")

COURTESIES = ("Of course", "With pleasure", "I hope this helps", "Have a nice day", "All the best")
OPENERS, CLOSERS = COURTESIES[:2], COURTESIES[2:]
RAMBLES = (
    "The weather is nice today.",
    "I like to talk about many things.",
    "There is always more to say.",
    "It was a long week for all of us.",
)
# Words that any sentence may use again.
FUNCTION_WORDS = frozenset(
    [
        "a",
        "an",
        "and",
        "the",
        "in",
        "is",
        "it",
        "of",
        "for",
        "to",
        "not",
        "that",
        "this",
        "you",
        "i",
        "my",
        "are",
        "on",
        "do",
        "does",
        "can",
    ]
)


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def enumeration(words: Sequence[str]) -> str:
    """["a", "b", "c"] -> "a, b and c"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def sentence(text: str) -> str:
    """Capital first letter, full stop at the end."""
    return f"{text[0].upper()}{text[1:]}."


def words_of(text: str) -> list[str]:
    """The words of a text in lower case."""
    return re.findall(r"[a-z]+", text.lower())
