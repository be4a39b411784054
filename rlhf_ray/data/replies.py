"""What a reply looks like behind its prompt, as the chat template writes it: with its reasoning and tool calls, or as plain text.

A template whose generation prompt opens a thought ("<think>") leaves it to the reply to close it: a reply without a thought closes
it at once, else the answer would be learnt as if it were still thinking.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_ray.data.encode import own_end_of_turn
from rlhf_ray.data.prompts import Message, Prompt
from rlhf_ray.data.templates import ChatTemplate, PromptMismatch, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OPENED = re.compile(r"<(\w+)>\s*$")
_THOUGHTS = ("think", "thinking", "thought", "reasoning")
"""Tags of thoughts, for templates that never write a whole one. Any other tag may be the marker of the assistant's turn."""
_ASKED = Message("user", "Which number comes after three?")
_ANSWER, _REASON = "The number after three is four.", "Three and one are four."
SHOWN = 60


@dataclass(frozen=True)
class Reply:
    """text: what follows the prompt, up to the end of the turn.  is_rendered: the template wrote some of it, so its markers are
    tokens.  note: what was done to it, and differs: how the conversation is written as a whole, where that is another text."""

    text: str
    is_rendered: bool = False
    note: str = ""
    differs: str = ""


class ReplyWriter:
    """For one template and tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
        self.template = template
        end = own_end_of_turn(tokenizer, template)
        self._end = "" if end is None else str(tokenizer.convert_ids_to_tokens(end))
        self._closings: dict[str, str | None] = {}

    def write(self, prompt: Prompt, text: str, message: Message | None = None) -> Reply:
        """The reply `text` to `prompt`.   message: the same with its reasoning and tool calls, if it has any.

        Raises PromptMismatch if the template cannot write these."""
        if not isinstance(self.template, ChatTemplate) or prompt.is_blank:
            if message is not None and "tool_calls" in message.fields():
                raise PromptMismatch(f"template '{self.template.name}' writes no tool calls", "template: chat")
            left_out = f"learnt without reasoning_content, which template '{self.template.name}' does not write"
            return Reply(text, note=left_out if message is not None and reasoning_of(message) else "")
        asked = self.template.render(prompt)
        found = _OPENED.search(asked)
        closing = self._closing(found[1]) if found is not None else None
        reply = self._structured(asked, prompt, message, closing) if message is not None else None
        if reply is None:
            reply = Reply(text) if found is None or closing is None else self._plain(text, found[1], closing)
        whole = self.template.render_whole((*prompt.as_messages(), message or Message("assistant", text)), prompt)
        apart = asked + reply.text + self._end
        if whole.rstrip().startswith(apart.rstrip()):
            return reply
        at = next((i for i, (a, b) in enumerate(zip(apart, whole)) if a != b), min(len(apart), len(whole)))
        start = max(at - SHOWN // 2, 0)
        shown = f"learnt {apart[start : at + SHOWN]!r}, whole {whole[start : at + SHOWN]!r}"
        return Reply(reply.text, reply.is_rendered, reply.note, shown)

    def _plain(self, text: str, tag: str, closing: str) -> Reply:
        """A reply of text alone to a prompt that has opened a thought."""
        if f"</{tag}>" in text:  # the data write the thought into the reply: without what the prompt has opened
            head = re.match(rf"\s*<{tag}>\s*", text)
            return Reply(text[head.end() :] if head else text, is_rendered=True)
        note = f"no reasoning: the thought that the template opens (<{tag}>) is closed at once"
        return Reply(closing + text, is_rendered=True, note=note)

    def _structured(self, asked: str, prompt: Prompt, message: Message, closing: str | None) -> Reply | None:
        """A reply with reasoning or tool calls, as the template writes it; None for one that says nothing but its text.

        closing: of the thought that the prompt has opened, if it has."""
        reasoning, calls = reasoning_of(message), message.fields().get("tool_calls", [])
        if not reasoning and not calls:
            return None
        assert isinstance(self.template, ChatTemplate)
        whole = self.template.render_whole((*prompt.as_messages(), message), prompt)
        if whole.startswith(asked):
            text = whole[len(asked) :]
            at = text.rfind(self._end) if self._end else -1  # the last one: what is said may spell it as well
            text = text[:at] if at >= 0 else text if self._end else text.rstrip()
        elif closing is not None and reasoning and not calls:
            text = reasoning.strip() + closing + message.content
        else:
            raise PromptMismatch("the template writes the prompt otherwise once a reply with tool calls follows")
        if missing := [call["function"]["name"] for call in calls if call["function"]["name"] not in text]:
            raise PromptMismatch(f"the chat template does not write tool calls ({missing[0]})", "another chat template")
        if reasoning and reasoning.strip() not in text:
            note = "learnt without reasoning_content, which the chat template does not write"
            return Reply(text, is_rendered=True, note=note)
        return Reply(text, is_rendered=True)

    def _closing(self, tag: str) -> str | None:
        """What the template writes between a thought and the answer, learnt from a conversation that has both; None if the tag is
        no thought's."""
        if tag not in self._closings:
            self._closings[tag] = f"\n</{tag}>\n\n" if tag in _THOUGHTS else None
            assert isinstance(self.template, ChatTemplate)
            thought = Message("assistant", _ANSWER, f'{{"reasoning_content": "{_REASON}"}}')
            _, _, after = self.template.render_whole((_ASKED, thought)).partition(_REASON)
            between, found, _ = after.partition(_ANSWER)
            if found and f"</{tag}>" in between:
                self._closings[tag] = between
        return self._closings[tag]


def reasoning_of(message: Message) -> str:
    """What a turn says that it thought, under any of the names that chat templates read; "" if nothing."""
    fields = message.fields()
    return str(fields.get("reasoning_content") or fields.get("reasoning") or fields.get("thinking") or "")
