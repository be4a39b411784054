"""Which tokens of a conversation the assistant said, so that SFT can learn every turn of it. The template alone tells.

Where the chat template marks the assistant's text ({% generation %}), its marks count. Else a turn starts where the prompt that
asks for it ends: what the template makes of the messages before it, which has to be the beginning of what it makes of all of them,
in text and in tokens. A template that rewrites earlier turns once more follow (drops the thinking in them, say) shows no such turn.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from rlhf_ray.data.encode import encode_prompts, own_end_of_turn
from rlhf_ray.data.prompts import Prompt
from rlhf_ray.data.templates import ChatTemplate, PromptMismatch, Template
from rlhf_ray.errors import DataError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_FIX = "train_on_turns: last"
Span = tuple[int, int]
"""First token, and the one after the last."""


class _Turn(NamedTuple):
    """The assistant's message `number` (from 1) of a row.  before: the prompt that asks for it."""

    row: int
    number: int
    before: Prompt
    said: str


def earlier_turns(prompt: Prompt) -> list[int]:
    """Indices of the messages in which the assistant has answered already; an empty one, one that nothing precedes, and one that is
    not to be learnt, is none."""
    return [
        i
        for i, message in enumerate(prompt.messages)
        if message.role == "assistant"
        and message.is_learnt
        and (message.content.strip() or message.extra)
        and not Prompt(messages=prompt.messages[:i]).is_blank
    ]


def assistant_spans(
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    prompts: Sequence[Prompt],
    ids: Sequence[list[int]],
    labels: Sequence[str],
    *,
    with_end: bool,
    parse: bool = False,
) -> list[list[Span]]:
    """The tokens that the assistant said in each prompt, turn by turn.

    ids: of the prompts, from `encode_prompts`.   labels: `file:line` of each.   with_end: a span includes the template's own end of
    turn, which is learnt with it.   parse: as given to `encode_prompts`.   Raises DataError that tells of every prompt whose
    template does not show its turns."""
    end = own_end_of_turn(tokenizer, template)
    found: list[list[Span]] = [[] for _ in prompts]
    turns: list[_Turn] = []
    problems: list[Problem] = []
    for row, (prompt, tokens, label) in enumerate(zip(prompts, ids, labels, strict=True)):
        try:
            marked = _marked(template, prompt, tokens) if all(m.is_learnt for m in prompt.messages) else None
            if marked is None:
                turns += _turns(template, row, prompt, "" if end is None else str(tokenizer.decode([end])))
            else:
                found[row] = marked
        except PromptMismatch as error:
            problems.append(Problem(label, str(error), fix=_FIX))
    DataError.raise_all(problems)
    starts = encode_prompts(
        tokenizer, template, [turn.before for turn in turns], [labels[turn.row] for turn in turns], parse
    )
    for turn, start in zip(turns, starts):
        tokens, stop = ids[turn.row], _stop(tokenizer, ids[turn.row], len(start), turn.said, end)
        if tokens[: len(start)] == start and stop is not None:
            found[turn.row].append((len(start), stop))
        else:
            said = (
                f"the assistant's message {turn.number} shares a token with the text around it, so it cannot be learnt"
            )
            problems.append(Problem(labels[turn.row], said, fix=_FIX))
    DataError.raise_all(problems)
    return [[_to_its_end(row, span, end, with_end) for span in spans] for row, spans in zip(ids, found)]


def _marked(template: Template, prompt: Prompt, ids: list[int]) -> list[Span] | None:
    """The spans that the chat template marks; None where it marks nothing, or its marks do not fit these tokens, in which text
    that spells a control token is text."""
    if not isinstance(template, ChatTemplate) or not _MARKS.search(template.content()["chat_template"]):
        return None
    tokens, mask = template.encode_marked(prompt)
    if (
        tokens != ids or mask[-1]
    ):  # the last token asks for the next reply: the end of a mark was not found in the tokens
        return None
    spans, at = [], 0
    for is_said, run in groupby(mask):
        length = len(list(run))
        if is_said:
            spans.append((at, at + length))
        at += length
    return spans


def _turns(template: Template, row: int, prompt: Prompt, end: str) -> Iterable[_Turn]:
    """Raises PromptMismatch if what precedes a turn is no beginning of the whole, or the turn is not in it as it was written.

    end: what the template writes after a turn, if it has an end of its own."""
    whole = template.render(prompt)
    found = []
    for i in earlier_turns(prompt):
        before, said = replace(prompt, messages=prompt.messages[:i]), prompt.messages[i].content.strip()
        asked = template.render(before)
        rest = whole[len(asked) :] if whole.startswith(asked) else ""
        at = rest.find(said)
        if at < 0 or (end and end in rest[:at]):
            raise PromptMismatch(
                f"the template writes the assistant's message {i + 1} otherwise once more follow, so it cannot be learnt with them"
            )
        found.append(_Turn(row, i + 1, before, said))
    return found


def _stop(tokenizer: PreTrainedTokenizerBase, ids: list[int], start: int, said: str, end: int | None) -> int | None:
    """Where a turn that starts at token `start` stops: at `end`, or where the tokens spell what was said. None if neither comes."""
    if end is not None:
        return ids.index(end, start) if end in ids[start:] else None

    def text(stop: int) -> str:
        return str(tokenizer.decode(ids[start:stop], clean_up_tokenization_spaces=False)).strip()

    stops = range(start, len(ids) + 1)
    at = bisect_left(stops, len(said), key=lambda stop: len(text(stop)))
    return stops[at] if at < len(stops) and text(stops[at]) == said else None


def _to_its_end(ids: list[int], span: Span, end: int | None, with_end: bool) -> Span:
    """The span without what the template writes after the end of turn, and with the end itself only if it is learnt."""
    if end is None:
        return span
    start, stop = span
    stop = next((i for i in range(start, stop) if ids[i] == end), stop)
    return start, stop + (with_end and ids[stop : stop + 1] == [end])
