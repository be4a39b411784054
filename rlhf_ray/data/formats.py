"""Row formats: which fields a row has, and how they become a prompt and its answers.

| format            | fields                                                             | gives      |
|-------------------|--------------------------------------------------------------------|------------|
| alpaca            | instruction, input ("" or null: none), output                      | completion |
| comparison        | user_input, completion_a (better), completion_b                    | pair       |
| alpaca_farm       | instruction, input, output_1, output_2, preference (1, 2; 0: draw) | pair       |
| ranked            | instruction, input, output: [better, worse]                        | pair       |
| preference        | prompt, chosen, rejected: texts or message lists (TRL)             | pair       |
| preference        | instruction, input; or system, question; and chosen, rejected      | pair       |
| hh                | chosen, rejected: whole transcripts (Anthropic hh-rlhf)            | pair       |
| prompt_completion | prompt, completion: texts or message lists (TRL)                   | completion |
| messages          | messages: [{role, content}], the assistant last                    | completion |
| sharegpt          | conversations: [{from, value}], the assistant last                 | completion |
| sharegpt          | conversations, and chosen, rejected: {from, value}                 | pair       |
| text              | text: learnt as it is; as a prompt: continued                      | completion |
| prompt            | prompt, or instruction and input, or user_input                    |            |

Every format gives prompts; a pair also gives its better reply as a completion. Further fields are kept, not read. A prompt of
`messages` or `sharegpt` is what precedes the assistant's last turn; its earlier turns are answers too (Parsed.is_conversation).

Beside conversations `tools` and `chat_template_kwargs` are read, for the chat template, and `system`, if the conversation does not
begin with a system text of its own. SFT learns no rows with `label: false` and no messages with `weight: 0`. Fields that nothing
reads are told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from rlhf_ray.data.fields import (
    Fields,
    continued,
    given_json,
    given_tools,
    is_list,
    last_response,
    messages,
    texts,
    type_name,
    unread_keys,
)
from rlhf_ray.data.lines import BadRow
from rlhf_ray.data.prompts import ASSISTANT_MARK, Message, Prompt, parse_transcript

RowKind = Literal["sft", "preference", "prompt"]


class Dropped(Exception):
    """A well-formed row that its format itself leaves out: a draw, or a pair without a difference."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Pair(NamedTuple):
    """Texts, or messages."""

    chosen: str | Message
    rejected: str | Message


class Parsed(NamedTuple):
    """A row as a stage needs it; answers that the kind does not ask for are None. is_conversation: for SFT, what the assistant says
    in the prompt is an answer as well.   replies: answers by name that are more than a text, with reasoning and tool calls."""

    prompt: Prompt
    completion: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    is_conversation: bool = False
    margin: float | None = None
    replies: Mapping[str, Message] = {}


@dataclass(frozen=True)
class Format:
    """How to read one format. `fields` must be there, for pairs `pair_fields` too; `asks` are those that a bare prompt needs."""

    name: str
    fields: tuple[str, ...]
    asks: tuple[str, ...]
    prompt: Callable[[Fields], Prompt]
    completion: Callable[[Fields], str | Message] | None = None
    pair: Callable[[Fields], Pair] | None = None
    pair_fields: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    fits: Callable[[Fields], bool] = lambda row: True
    is_conversation: Callable[[Fields], bool] = lambda row: False

    def gives(self, kind: RowKind) -> bool:
        return kind == "prompt" or self.pair is not None or (kind == "sft" and self.completion is not None)

    def fields_of(self, kind: RowKind) -> tuple[str, ...]:
        """Fields that rows of this kind have."""
        return self.fields + self.pair_fields if kind == "preference" else self.fields

    def matches(self, row: Fields, kind: RowKind) -> bool:
        return all(name in row for name in self.fields_of(kind)) and self.fits(row)

    def extra(self, row: Fields) -> dict[str, object]:
        """Fields that the format does not read: beside a prompt, the other names of one are none."""
        optional = ("prompt",) if "prompt" in row and "prompt" in self.optional else self.optional
        return {name: value for name, value in row.items() if name not in self.fields and name not in optional}

    def unread(self, row: Fields, kind: RowKind, prompt: Prompt) -> list[str]:
        """Fields, and keys of messages, that nothing reads. A reward function may read any column beside a prompt.

        prompt: the row's; what is for the chat template is read beside messages only."""
        beside = READ_BESIDE[kind] + (FOR_TEMPLATES if prompt.messages else ())
        beside += ("label",) if kind == "sft" and says_what_is_learnt(row.get("label")) else ()
        messages = [
            name
            for name in ("messages", "conversations", "prompt", "completion", *self.pair_fields)
            if is_list(row.get(name))
        ]
        inner = [key for name in messages for key in unread_keys(row, name)]
        extra = [name for name in self.extra(row) if name not in beside]
        extra += (
            ["system"] if "system" not in extra and "system" in self.optional and _loses_system(row, prompt) else []
        )
        return inner if kind == "prompt" else extra + inner

    def parse(self, row: Fields, kind: RowKind) -> Parsed:
        """The row's prompt and the answers that `kind` asks for.

        Raises BadRow for a malformed row, Dropped for a row that the format leaves out.
        """
        needed = self.asks if kind == "prompt" else self.fields_of(kind)
        missing = [f"missing field '{name}'" for name in needed if name not in row]
        if missing:
            raise BadRow(missing[0], "; ".join(missing))
        if kind == "sft" and _lower(row.get("label")) in _BAD:
            raise Dropped("label: false, a reply that is not to be learnt")
        if self.name == "text" and kind == "sft":
            (text,) = _told(completion=self._completion(row))[0].values()
            return Parsed(Prompt(), completion=text)
        prompt = _with_tools(self.prompt(row), row)
        if prompt.is_blank:
            raise BadRow("empty prompt")
        if kind == "sft":
            is_conversation, reply = self.is_conversation(row), self._completion(row)
            if isinstance(reply, Message) and not reply.is_learnt:
                prompt, reply = _up_to_the_last_learnt(prompt, is_conversation)
            texts_of, replies = _told(completion=reply)
            return Parsed(prompt, texts_of["completion"], is_conversation=is_conversation, replies=replies)
        if kind == "preference":
            chosen, rejected = self._pair(row)
            texts_of, replies = _told(chosen=chosen, rejected=rejected)
            return Parsed(prompt, None, texts_of["chosen"], texts_of["rejected"], margin=_margin(row), replies=replies)
        return Parsed(prompt)

    def _completion(self, row: Fields) -> str | Message:
        if self.completion is not None:
            reply = self.completion(row)
        else:
            reply = self.pair(row).chosen if self.pair is not None else ""
        if not _says_something(reply):
            raise BadRow("empty completion", fix=_SKIP)
        return reply

    def _pair(self, row: Fields) -> Pair:
        if self.pair is None:
            raise BadRow(f"format '{self.name}' has no pairs")
        pair = self.pair(row)
        if _compared(pair.chosen) == _compared(pair.rejected):
            raise BadRow("identical completions", fix=_SKIP)
        return pair


_SKIP = "data.on_bad_row: skip leaves such rows out and counts them"


_GOOD, _BAD = ("true",), ("false",)
"""`label` of a reply in KTO's data: a boolean, or the word in a file that has none; 0 and 1 may be classes."""
READ_BESIDE: dict[RowKind, tuple[str, ...]] = {"sft": (), "preference": ("margin", "group"), "prompt": ()}
"""Columns of any format that are read where they are there; and `label`, for SFT, where it says that a reply is good or bad."""
FOR_TEMPLATES = ("tools", "chat_template_kwargs")
"""Columns that are read beside conversations."""


def _lower(label: object) -> str:
    return str(label).strip().lower() if isinstance(label, (bool, str)) else ""


def says_what_is_learnt(label: object) -> bool:
    """Whether a `label` says that a reply is good, or bad, or is not there."""
    is_empty = label is None or (isinstance(label, str) and not label.strip())
    return is_empty or _lower(label) in _GOOD + _BAD


def may_say_what_is_learnt(label: object) -> bool:
    """Whether a `label` is 0 or 1, which may mean bad and good, or be a class like any other number."""
    return not isinstance(label, bool) and (label in (0, 1) or str(label).strip() in ("0", "1", "0.0", "1.0"))


def _says_something(reply: str | Message) -> bool:
    return bool(reply.content.strip() or reply.extra if isinstance(reply, Message) else reply.strip())


def _compared(reply: str | Message) -> tuple[str, str]:
    return (reply.content.strip(), reply.extra) if isinstance(reply, Message) else (reply.strip(), "")


def _told(**named: str | Message) -> tuple[dict[str, str], dict[str, Message]]:
    """The texts of answers, and the messages of those that are more than a text."""
    replies = {name: reply for name, reply in named.items() if isinstance(reply, Message) and reply.extra}
    return {n: reply.content if isinstance(reply, Message) else reply for n, reply in named.items()}, replies


def _with_tools(prompt: Prompt, row: Fields) -> Prompt:
    """With what the row gives to the chat template beside its messages."""
    if not prompt.messages:
        return prompt
    tools, kwargs = given_tools(row), given_json(row, "chat_template_kwargs", dict)
    return replace(prompt, tools=tools, template_kwargs=kwargs) if tools or kwargs else prompt


def _up_to_the_last_learnt(prompt: Prompt, is_conversation: bool) -> tuple[Prompt, Message]:
    """A conversation whose last answer is not to be learnt, up to the last one that is."""
    turns = prompt.messages if is_conversation else ()
    last = max((i for i, turn in enumerate(turns) if turn.role == "assistant" and turn.is_learnt), default=0)
    if last == 0:
        raise Dropped("no answer that is to be learnt (weight: 0)")
    return replace(prompt, messages=turns[:last]), turns[last]


def detect(row: Fields, kind: RowKind) -> Format | None:
    """The first format, in the order of FORMATS, that the row has all fields of and that gives this kind."""
    return next((f for f in FORMATS.values() if f.gives(kind) and f.matches(row, kind)), None)


def _margin(row: Fields) -> float | None:
    """By how much the better reply is better, where the data say so (arXiv:2307.09288)."""
    value = row.get("margin")
    if value is None or (isinstance(value, str) and not value.strip()):  # CSV has no numbers, and no null
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise BadRow("'margin' is not a number", f"'margin': expected a finite number, got {value!r:.60}")
    return number


# Prompts


def _user_input(row: Fields) -> Prompt:
    return Prompt(texts(row, "user_input")[0])


def _instruction(row: Fields) -> Prompt:
    (text,) = texts(row, "instruction")
    given = texts(row, "input")[0] if row.get("input") is not None else ""
    return Prompt(text, given if given.strip() else "")


def _prompt_field(row: Fields) -> Prompt:
    return Prompt(messages=messages(row, "prompt")) if is_list(row["prompt"]) else Prompt(texts(row, "prompt")[0])


def _has_prompt(row: Fields) -> bool:
    return any(name in row for name in ("prompt", "instruction", "user_input"))


def _any_prompt(row: Fields) -> Prompt:
    if not _has_prompt(row):
        raise BadRow("missing field 'prompt'", "missing field 'prompt' (or 'instruction', or 'user_input')")
    if "prompt" in row:
        return _prompt_field(row)
    return _instruction(row) if "instruction" in row else _user_input(row)


def _before_last_response(turns: tuple[Message, ...]) -> Prompt:
    return Prompt(messages=turns[:-1] if turns and turns[-1].role == "assistant" else turns)


def _conversation(row: Fields, name: str, sharegpt: bool = False) -> tuple[Message, ...]:
    """The messages of a field, behind the row's `system` text if they have none themselves, which comes first in LLaMA-Factory."""
    turns = messages(row, name, sharegpt)
    system = row.get("system")
    if not isinstance(system, str) or not system.strip() or (turns and turns[0].role == "system"):
        return turns  # what is no text is listed among what nothing reads
    return (Message("system", system), *turns)


def _loses_system(row: Fields, prompt: Prompt) -> bool:
    """Whether a row has a `system` text that is not what its prompt begins with."""
    system = str(row.get("system") or "").strip()
    return system not in ("", *(turn.content.strip() for turn in prompt.messages[:1] if turn.role == "system"))


def _has_pair(row: Fields) -> bool:
    return row.get("chosen") is not None


def _sharegpt_prompt(row: Fields) -> Prompt:
    """All of the conversation where two replies to it follow, else what precedes its last reply."""
    if not _has_pair(row):
        return _before_last_response(_conversation(row, "conversations", sharegpt=True))
    inner = messages(row, "chosen", sharegpt=True)[:-1]
    if inner and inner[0].role == "system":  # the whole conversation again, with a system text of its own
        return Prompt(messages=continued(messages(row, "conversations", sharegpt=True), inner))
    return Prompt(messages=continued(_conversation(row, "conversations", sharegpt=True), inner))


def _preference_prompt(row: Fields) -> Prompt:
    """The prompt field, and the turns of chosen before its last one, which may begin with the prompt."""
    inner = messages(row, "chosen")[:-1] if is_list(row.get("chosen")) else ()
    if inner and not row.get("prompt") and not _has_question(row):
        return Prompt(messages=inner)
    prompt = _any_prompt(row) if _has_prompt(row) or "question" not in row else _asked(row)
    return Prompt(messages=continued(prompt.as_messages(), inner)) if inner else prompt


def _has_question(row: Fields) -> bool:
    """Whether a pair without a prompt field has its prompt under another name, and not in transcripts."""
    is_transcript = isinstance(row.get("chosen"), str) and ASSISTANT_MARK in row["chosen"]
    return not is_transcript and any(name in row for name in ("instruction", "user_input", "question"))


def _asked(row: Fields) -> Prompt:
    """The question, after the system text if there is one (Intel/orca_dpo_pairs)."""
    (question,) = texts(row, "question")
    system = texts(row, "system")[0] if row.get("system") is not None else ""
    if not system.strip():
        return Prompt(question)
    return Prompt(messages=(Message("system", system), Message("user", question)))


def _hh_prompt(row: Fields) -> Prompt:
    head, _ = _cut_transcript("chosen", texts(row, "chosen")[0])
    turns = parse_transcript(head + ASSISTANT_MARK)
    if not turns:
        raise BadRow("'chosen': the transcript does not begin with 'Human:'")
    return Prompt(messages=turns)


# Answers


def _completion_field(row: Fields) -> str | Message:
    if not is_list(row["completion"]):
        return texts(row, "completion")[0]
    turns = messages(row, "completion")
    if len(turns) != 1:
        raise BadRow("'completion': expected one message", f"'completion': expected one message, got {len(turns)}")
    return last_response(turns, "completion")


def _farm_pair(row: Fields) -> Pair:
    preference = row["preference"]
    # CSV has no numbers, so digits count as well; True and 1.0 equal 1, but they are no labels.
    if preference not in (0, 1, 2, "0", "1", "2") or isinstance(preference, (bool, float)):
        wanted = "'preference': expected 1, 2, or 0 for a draw"
        raise BadRow(wanted, f"{wanted}, got {preference!r}")
    first, second = texts(row, "output_1", "output_2")
    if int(preference) == 0:
        raise Dropped("draw")
    return Pair(first, second) if int(preference) == 1 else Pair(second, first)


def _ranked_pair(row: Fields) -> Pair:
    outputs = row["output"]
    if not isinstance(outputs, list) or len(outputs) != 2:
        wanted = "'output': expected [better, worse]"
        raise BadRow(wanted, f"{wanted}, got {f'{len(outputs)} items' if is_list(outputs) else type_name(outputs)}")
    named = {f"output[{i}]": text for i, text in enumerate(outputs)}
    return Pair(*texts(named, *named))


def _preference_pair(row: Fields) -> Pair:
    if not (is_list(row["chosen"]) or is_list(row["rejected"])):
        return Pair(*texts(row, "chosen", "rejected"))
    return _pair_of_messages(row)


def _pair_of_messages(row: Fields, sharegpt: bool = False) -> Pair:
    chosen, rejected = messages(row, "chosen", sharegpt), messages(row, "rejected", sharegpt)
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("'chosen' and 'rejected' differ before the last message")
    return Pair(last_response(chosen, "chosen"), last_response(rejected, "rejected"))


def _cut_transcript(name: str, text: str) -> tuple[str, str]:
    head, mark, response = text.rpartition(ASSISTANT_MARK)
    if not mark:
        raise BadRow(f"'{name}': no '\\n\\nAssistant:' in the transcript")
    return head, response.strip()


def _hh_pair(row: Fields) -> Pair:
    """Split at the LAST assistant turn; what stands before it must agree."""
    chosen, rejected = texts(row, "chosen", "rejected")
    (head, better), (other, worse) = _cut_transcript("chosen", chosen), _cut_transcript("rejected", rejected)
    if head != other:
        raise Dropped("transcripts that differ before the last reply")
    if better == worse:
        raise Dropped("identical completions")
    return Pair(better, worse)


def _sharegpt_completion(row: Fields) -> Message:
    if _has_pair(row):
        return last_response(messages(row, "chosen", sharegpt=True), "chosen")
    return last_response(messages(row, "conversations", sharegpt=True), "conversations")


# The table. Order matters to `detect`: more specific formats come first.

_ALL = (
    Format(
        name="comparison",
        fields=("user_input", "completion_a", "completion_b"),
        asks=("user_input",),
        prompt=_user_input,
        pair=lambda row: Pair(*texts(row, "completion_a", "completion_b")),
    ),
    Format(
        name="alpaca_farm",
        fields=("instruction", "output_1", "output_2", "preference"),
        asks=("instruction",),
        prompt=_instruction,
        pair=_farm_pair,
        optional=("input",),
    ),
    Format(
        name="sharegpt",
        fields=("conversations",),
        asks=("conversations",),
        prompt=_sharegpt_prompt,
        completion=_sharegpt_completion,
        pair=lambda row: _pair_of_messages(row, sharegpt=True),
        pair_fields=("chosen", "rejected"),
        optional=("chosen", "rejected", "system"),
        is_conversation=lambda row: not _has_pair(row),
    ),
    Format(
        name="preference",
        fields=("chosen", "rejected"),
        asks=(),
        prompt=_preference_prompt,
        pair=_preference_pair,
        optional=("prompt", "instruction", "input", "user_input", "system", "question"),
        fits=lambda row: "prompt" in row or is_list(row["chosen"]) or _has_question(row),
    ),
    Format(
        name="hh",
        fields=("chosen", "rejected"),
        asks=("chosen",),
        prompt=_hh_prompt,
        pair=_hh_pair,
        fits=lambda row: isinstance(row["chosen"], str) and ASSISTANT_MARK in row["chosen"],
    ),
    Format(
        name="messages",
        fields=("messages",),
        asks=("messages",),
        prompt=lambda row: _before_last_response(_conversation(row, "messages")),
        completion=lambda row: last_response(messages(row, "messages"), "messages"),
        optional=("system",),
        is_conversation=lambda row: True,
    ),
    Format(
        name="prompt_completion",
        fields=("prompt", "completion"),
        asks=("prompt",),
        prompt=_prompt_field,
        completion=_completion_field,
    ),
    Format(
        name="ranked",
        fields=("instruction", "output"),
        asks=("instruction",),
        prompt=_instruction,
        pair=_ranked_pair,
        optional=("input",),
        fits=lambda row: isinstance(row["output"], list),
    ),
    Format(
        name="alpaca",
        fields=("instruction", "output"),
        asks=("instruction",),
        prompt=_instruction,
        completion=lambda row: texts(row, "output")[0],
        optional=("input",),
    ),
    Format(
        name="text",
        fields=("text",),
        asks=("text",),
        prompt=lambda row: Prompt(texts(row, "text")[0]),
        completion=lambda row: texts(row, "text")[0],
        fits=lambda row: not _has_prompt(row),
    ),
    Format(
        name="prompt",
        fields=(),
        asks=(),
        prompt=_any_prompt,
        optional=("prompt", "instruction", "input", "user_input"),
        fits=_has_prompt,
    ),
)
FORMATS: dict[str, Format] = {f.name: f for f in _ALL}
