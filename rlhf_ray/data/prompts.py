"""What a policy is asked, whatever the file format it came from.

A prompt is a text (an instruction, or a raw prompt) with an optional input, or a list of messages. The same request written in
different formats is the same prompt: `canonical` maps it to one string; the held-out rule hashes its last `question`.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

SPEAKERS = {"system": "System", "user": "Human", "assistant": "Assistant", "tool": "Tool"}
ROLES = tuple(SPEAKERS)
ASSISTANT_MARK = "\n\nAssistant:"
_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is one of ROLES.

    extra: what else the chat template is given of it, as JSON: reasoning_content, tool_calls, tool_call_id, name; "" if nothing.
    is_learnt: false where the data say that the turn is not to be learnt (`weight: 0`)."""

    role: str
    content: str
    extra: str = ""
    is_learnt: bool = True

    def fields(self) -> dict[str, Any]:
        """As chat templates read it."""
        return {"role": self.role, "content": self.content, **(json.loads(self.extra) if self.extra else {})}


@dataclass(frozen=True)
class Prompt:
    """`text` with an optional `input` (instruction formats), or `messages`; exactly one of text and messages is used.

    tools: JSON schemas of functions that the assistant may call, as a JSON list; "" if there are none.   template_kwargs: further
    variables that the row gives to the chat template, as a JSON object.

    A prompt with neither is empty: it stands before a bare text that is learnt as it is (format `text`).
    """

    text: str = ""
    input: str = ""
    messages: tuple[Message, ...] = ()
    tools: str = ""
    template_kwargs: str = ""

    @property
    def is_blank(self) -> bool:
        """Nothing but white space is asked."""
        return not (self.text.strip() or self.input.strip() or any(m.content.strip() for m in self.messages))

    def as_column(self) -> str | list[dict[str, Any]]:
        """As `prompt` of a row of format `preference`: messages where it is a conversation, else a text."""
        return [message.fields() for message in self.messages] if self.messages else self.plain()

    def plain(self) -> str:
        """The prompt as one text: instruction, blank line, input; or a transcript that ends where the assistant speaks next."""
        if self.messages:
            return transcript(self.messages)
        return f"{self.text}\n\n{self.input}" if self.input else self.text

    def as_messages(self) -> tuple[Message, ...]:
        """The prompt as a conversation: a text becomes one user turn."""
        return self.messages or (Message("user", self.plain()),)

    def canonical(self) -> str:
        """The string that stands for this request in every format; equal strings mean equal prompts.

        Instruction and input are joined by a blank line, a conversation of one user turn is its content, longer ones are
        transcripts. Unicode is in form NFC, and runs of white space count as one space.
        """
        messages = self.messages or parse_transcript(self.plain())
        if len(messages) == 1 and messages[0].role == "user":
            text = messages[0].content
        else:
            text = transcript(messages) if messages else self.plain()
        return in_one_line(text)

    def exact(self) -> str:
        """As `canonical`, with white space inside a turn and with tool calls, in which tasks may differ."""
        turns = self.messages or parse_transcript(self.plain()) or self.as_messages()
        return repr([(turn.role, unicodedata.normalize("NFC", turn.content.strip()), turn.extra) for turn in turns])

    def question(self) -> str:
        """What is asked at last: the content of the last user turn, in the form of `canonical`. The held-out rule hashes it, so
        that a question does not stand on both sides because a system text or an earlier turn differs."""
        turns = self.messages or parse_transcript(self.plain())
        asked = [turn.content for turn in turns if turn.role == "user"]
        return in_one_line(asked[-1]) if asked else self.canonical()


def in_one_line(text: str) -> str:
    """Unicode in form NFC, runs of white space as one space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def transcript(messages: Iterable[Message]) -> str:
    """Messages as plain text in the form of Anthropic's hh-rlhf data, ending where the assistant's reply begins.

    >>> transcript([Message("user", "Name a bird.")])
    'Human: Name a bird.\\n\\nAssistant:'
    """
    turns = [f"{SPEAKERS[m.role]}: {m.content}" for m in messages]
    return "\n\n".join(turns) + ASSISTANT_MARK


def parse_transcript(text: str) -> tuple[Message, ...]:
    """The turns before a final "\\n\\nAssistant:", or () where `text` is not such a transcript."""
    head = text.rstrip()
    if not head.endswith(ASSISTANT_MARK):
        return ()
    head = head.removesuffix(ASSISTANT_MARK)
    pieces = _TURN.split(head)
    if len(pieces) < 3 or pieces[0].strip():
        return ()
    roles = ["user" if speaker == "Human" else "assistant" for speaker in pieces[1::2]]
    return tuple(Message(role, content.strip()) for role, content in zip(roles, pieces[2::2]))
