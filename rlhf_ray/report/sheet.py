"""The comparison sheet: replies of several policies to the same prompts side by side, differences marked, ready for a blind vote.

The vote is the script's matter (script.js): a page without a server can only offer what was voted as a file, whose rows are those
that the service stores (format `preference`: prompt, chosen, rejected).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

from rlhf_ray.report.html import Html, join, tag

OPEN = 3
"""Prompts whose replies are shown unfolded."""
MOST_WORDS = 600
"""A longer reply is not compared: the time grows with the product of both lengths."""
NOTE = "Marked: words that are not in the first policy's reply at that place."


def sheet(
    prompts: Mapping[str, Sequence[Mapping[str, Any]]],
    card: Callable[[Mapping[str, Any], Any], Html],
    short: Callable[[str], str],
) -> Html:
    """A block per prompt. prompts: prompt -> samples {policy, prompt, reply, asked, ...}, the same policies in the same order.

    asked: the prompt without its template as JSON text, a string or a list of messages; where it is missing, there is no vote.
    card: makes the card of a sample, with its reply as markup.  short: the prompt in a line."""
    blocks = []
    for i, (prompt, samples) in enumerate(prompts.items()):
        ballot = _ballot(samples)
        blocks.append(
            tag(
                "details",
                tag("summary", short(prompt)),
                tag("div", [card(s, marked(s["reply"], samples[0]["reply"])) for s in samples], class_="cards row"),
                class_="step ballot" if ballot else "step",
                open=i < OPEN,
                data_ballot=ballot,
            )
        )
    return tag("div", blocks, class_="sheet")


def marked(reply: str, against: str) -> Html:
    """`reply` with the words marked that differ from those of `against`, in order (the longest common runs of words stay plain)."""
    mine, theirs = _words(reply), _words(against)
    if reply == against or max(len(mine), len(theirs)) > MOST_WORDS:
        return join(reply)
    matcher = SequenceMatcher(None, [w.strip() for w in theirs], [w.strip() for w in mine], autojunk=False)
    parts = []
    for kind, _, _, start, end in matcher.get_opcodes():
        text = "".join(mine[start:end])
        parts.append(text if kind == "equal" or not text else tag("mark", text))
    return join(parts)


def _words(text: str) -> list[str]:
    """Words, each with the white space after it; white space before the first is a word of its own."""
    return re.findall(r"\S+\s*|^\s+", text)


def _ballot(samples: Sequence[Mapping[str, Any]]) -> str | None:
    """What a vote on this prompt is made of, as JSON in ASCII: whatever replies hold, it comes back as it was."""
    try:
        asked = json.loads(str(samples[0].get("asked")))
    except ValueError:
        return None
    replies = [{"model": str(s.get("policy", "")), "text": s["reply"]} for s in samples]
    return json.dumps({"prompt": asked, "replies": replies})
