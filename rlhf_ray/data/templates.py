"""Prompt templates: how a prompt becomes the text that a model reads. One template serves SFT, reward, PPO and serving.

- instruction templates: two texts, with and without input. Shipped: alpaca, alpaca_legacy, alpaca_short, vigogne; or a JSON file
  of the user, {description, prompt_input, prompt_no_input, response_split} or AlpacaFarm's {prompt_inputs, prompt_noinputs};
- none: the prompt as it is (instruction and input with a blank line between);
- chat: the tokenizer's chat template; a text counts as one user turn. Where it says the date (strftime_now), the date is the run's.

A conversation under `none` becomes a transcript, "Human: ...\\n\\nAssistant:", as in hh-rlhf. Instruction templates take a
conversation only if it is one user turn.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import string
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_ray.data.prompts import Message, Prompt
from rlhf_ray.errors import ArtifactError, ConfigError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf_ray.config import JobFields

SHIPPED = ("alpaca", "alpaca_legacy", "alpaca_short", "vigogne")
_SLOT = re.compile(r"\{(instruction|input)\}")
_SEED_2_KEYS = ("description", "prompt_input", "prompt_no_input", "response_split")
_SEED_1_KEYS = ("prompt_inputs", "prompt_noinputs")


RESERVED = (
    frozenset(
        (
            "conversation",
            "messages",
            "tools",
            "chat_template",
            "add_generation_prompt",
            "continue_final_message",
            "tokenize",
            "padding",
        )
    )
    | frozenset(
        (
            "truncation",
            "max_length",
            "return_tensors",
            "return_dict",
            "return_assistant_tokens_mask",
            "tokenizer_kwargs",
        )
    )
    | {"sanitize_control_tokens"}
)
"""Names in `chat_template_kwargs` that would change how, and not what, transformers renders."""


class PromptMismatch(ValueError):
    """This template cannot render this prompt; `fix` says what could."""

    def __init__(self, message: str, fix: str = "") -> None:
        super().__init__(message, fix)
        self.fix = fix

    def __str__(self) -> str:
        return str(self.args[0])


_OTHER = "template: chat, with a tokenizer whose chat template does; without that, drop the field"


def _unwritten(prompt: Prompt, text: str) -> str | None:
    """The first function that `prompt` offers or calls and `text` does not name: it would be learnt as if it were not there."""
    offered = json.loads(prompt.tools) if prompt.tools else []
    calls = [call for m in prompt.messages if m.extra for call in m.fields().get("tool_calls", [])]
    named = [(tool.get("function") or tool).get("name") for tool in (*offered, *calls) if isinstance(tool, dict)]
    return next((str(name) for name in named if name and str(name) not in text), None)


class Template(ABC):
    """Renders prompts. `sha256` is over what it renders, not over its name or description."""

    name: str
    response_split: str | None = None
    date: str | None = None
    """What it takes for now, in ISO form, if it says the date; None: the clock."""

    @abstractmethod
    def content(self) -> dict[str, str]:
        """What `sha256` covers."""

    @cached_property
    def sha256(self) -> str:
        """Hex digest over the JSON of `content`, keys sorted; travels with every artefact (F34)."""
        text = json.dumps(self.content(), sort_keys=True)
        return hashlib.sha256(text.encode("ascii")).hexdigest()

    def manifest(self) -> dict[str, Any]:
        """Its entry in a manifest; `template_from_manifest` makes the template again from it."""
        date = {} if self.date is None else {"date": self.date}
        return {"name": self.name, "sha256": self.sha256, "content": self.content(), **date}

    def render(self, prompt: Prompt) -> str:
        """The text before the reply. An empty prompt, which stands before a bare text, renders as "".

        Raises PromptMismatch.
        """
        if prompt.is_blank:
            return ""
        text = self._render(prompt)
        if (name := _unwritten(prompt, text)) is not None:
            raise PromptMismatch(f"template '{self.name}' does not write tools or tool calls ({name})", _OTHER)
        return text

    @abstractmethod
    def _render(self, prompt: Prompt) -> str: ...

    def extract_response(self, text: str) -> str:
        """The reply in a text of prompt and reply: what follows the first response marker, stripped.

        Raises ValueError where the template has no marker, or the text does not hold it.
        """
        if self.response_split is None:
            raise ValueError(f"template {self.name!r} has no response marker")
        _, mark, response = text.partition(self.response_split)
        if not mark:
            raise ValueError(f"no response marker {self.response_split!r} in the text")
        return response.strip()


class InstructionTemplate(Template):
    """Two texts with the slots {instruction} and {input}; a prompt with an input takes the first."""

    def __init__(self, name: str, prompt_input: str, prompt_no_input: str, response_split: str | None) -> None:
        self.name = name
        self.prompt_input, self.prompt_no_input, self.response_split = prompt_input, prompt_no_input, response_split

    def content(self) -> dict[str, str]:
        return {"kind": "instruction", "prompt_input": self.prompt_input, "prompt_no_input": self.prompt_no_input}

    def _render(self, prompt: Prompt) -> str:
        values = {"instruction": prompt.text, "input": prompt.input}
        if prompt.messages:
            if len(prompt.messages) > 1 or prompt.messages[0].role != "user":
                roles = ", ".join(m.role for m in prompt.messages)
                raise PromptMismatch(
                    f"template '{self.name}' takes one user message, got {roles}",
                    "template: chat, or none (a transcript)",
                )
            values["instruction"] = prompt.messages[0].content
        text = self.prompt_input if prompt.input else self.prompt_no_input
        return _SLOT.sub(lambda slot: values[slot[1]], text)


class PlainTemplate(Template):
    """The prompt as it is."""

    name = "none"

    def content(self) -> dict[str, str]:
        return {"kind": "none"}

    def _render(self, prompt: Prompt) -> str:
        return prompt.plain()


class ChatTemplate(Template):
    """The tokenizer's chat template, up to where the assistant's reply begins."""

    name = "chat"

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, date: str | None = None, kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """date: what the template takes for now (ISO form), should it ask; None: the clock.   kwargs: further variables for it."""
        self.tokenizer, self.kwargs = tokenizer, dict(kwargs or {})
        self._dated: dict[str, Any] = {}
        if date is not None and "strftime_now" in str(tokenizer.chat_template):
            self.date = date
            self._dated = {"chat_template": _clock(datetime.fromisoformat(date)) + self.content()["chat_template"]}

    def content(self) -> dict[str, str]:
        given = {"kwargs": json.dumps(self.kwargs, sort_keys=True)} if self.kwargs else {}
        return {"kind": "chat", "chat_template": self.tokenizer.get_chat_template(), **given}

    def _render(self, prompt: Prompt) -> str:
        return str(self._apply(prompt, tokenize=False))

    def encode_safely(self, prompt: Prompt) -> list[int]:
        """Token ids in which only the template's own markers are control tokens. Raises PromptMismatch."""
        return list(self._apply(prompt, tokenize=True, sanitize_control_tokens=True, return_dict=False))

    def encode_marked(self, prompt: Prompt) -> tuple[list[int], list[bool]]:
        """Token ids, control tokens in messages included, and which of them the template marks as the assistant's
        ({% generation %}). Raises PromptMismatch."""
        found = self._apply(prompt, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return list(found["input_ids"]), [bool(said) for said in found["assistant_masks"]]

    def render_whole(self, messages: Sequence[Message], like: Prompt | None = None) -> str:
        """The text of a whole conversation, with nothing after its last turn for a reply to begin.   like: has the tools and
        variables of the row.   Raises PromptMismatch."""
        whole = replace(like or Prompt(), text="", input="", messages=tuple(messages))
        return str(self._apply(whole, tokenize=False, add_generation_prompt=False))

    def _apply(self, prompt: Prompt, *, add_generation_prompt: bool = True, **options: Any) -> Any:
        from jinja2 import TemplateError

        turns = [message.fields() for message in prompt.as_messages()]
        given = {**self.kwargs, **(json.loads(prompt.template_kwargs) if prompt.template_kwargs else {})}
        if reserved := given.keys() & RESERVED:
            raise PromptMismatch(f"chat_template_kwargs: {', '.join(sorted(reserved))} cannot be given to a template")
        try:
            return self.tokenizer.apply_chat_template(
                turns,
                tools=json.loads(prompt.tools) if prompt.tools else None,
                add_generation_prompt=add_generation_prompt,
                **{**given, **self._dated},
                **options,
            )
        except (TemplateError, ValueError, TypeError, ArithmeticError, LookupError, RecursionError) as error:
            raise PromptMismatch(f"the chat template refuses this conversation: {error}") from error


def _clock(now: datetime) -> str:
    """Jinja that defines `strftime_now` as a clock that stands at `now`; transformers takes no such function from callers."""
    codes = [f"%{flag}{letter}" for letter in string.ascii_letters for flag in ("-", "")]
    told = {code: text for code in codes if "%" not in (text := now.strftime(code))}
    return (
        "{% macro strftime_now(format) %}{% set said = namespace(text=format | replace('%%', '\\x00')) %}"
        f"{{% for code, text in {json.dumps(told)}.items() %}}{{% set said.text = said.text | replace(code, text) %}}{{% endfor %}}"
        "{{ said.text | replace('\\x00', '%') }}{% endmacro %}\n"
    )


def unused_chat_template(config: JobFields, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A line where the model has a chat template, and the job, which starts from no run, uses the default without saying so."""
    if "template" in config.model_fields_set or getattr(config, "sft", None) or tokenizer.chat_template is None:
        return []
    name = config.template
    return [
        f"template: the model has a chat template, the default is {name}: set template=chat, or template={name} to keep it"
    ]


def load_template(
    name_or_path: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    date: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> Template:
    """A shipped template by name, `none`, `chat` (needs the tokenizer), or a JSON file by path.   date, kwargs: see `ChatTemplate`.

    Raises ConfigError: unknown name, malformed file, or a tokenizer without a chat template.
    """
    if name_or_path == "none":
        return PlainTemplate()
    if name_or_path == "chat":
        if tokenizer is None or tokenizer.chat_template is None:
            raise ConfigError.at(
                "template",
                "the tokenizer has no chat template",
                fix=f"one of {', '.join((*SHIPPED, 'none'))}, or a JSON file",
            )
        return ChatTemplate(tokenizer, date, kwargs)
    if name_or_path in SHIPPED:
        text = (files("rlhf_ray.data") / "templates" / f"{name_or_path}.json").read_text(encoding="utf-8")
        return _from_json(name_or_path, name_or_path, text)
    path = Path(name_or_path).expanduser()
    if path.suffix != ".json" and not path.exists():
        close = difflib.get_close_matches(name_or_path, (*SHIPPED, "none", "chat"), n=1)
        raise ConfigError.at(
            "template",
            f"unknown template '{name_or_path}'",
            expected=f"{', '.join(SHIPPED)}, none, chat, or a JSON file",
            fix=f"did you mean '{close[0]}'?" if close else "",
        )
    if path.exists() and not path.is_file():
        raise ConfigError.at("template", f"cannot read {name_or_path}: it is not a regular file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError.at("template", f"cannot read {name_or_path}: {error}") from error
    return _from_json(path.stem, name_or_path, text)


def template_from_manifest(
    record: Mapping[str, Any], where: str, tokenizer: PreTrainedTokenizerBase | None = None
) -> Template:
    """The template whose `manifest` entry is `record`, though its file be gone.

    A chat template is the tokenizer's own, and has to be the recorded one: code of a template (Jinja) is never taken from a
    manifest.   where: the manifest.   Raises ArtifactError if the entry is incomplete or its hash is not that of its text."""
    content = record.get("content")
    kind = content.get("kind") if isinstance(content, Mapping) else None
    template: Template
    if kind == "instruction" and isinstance(content, Mapping):
        with_input, without = str(content.get("prompt_input")), str(content.get("prompt_no_input"))
        template = InstructionTemplate(str(record.get("name")), with_input, without, None)
    elif kind == "none":
        template = PlainTemplate()
    elif kind == "chat" and tokenizer is not None and tokenizer.chat_template is not None:
        date = record.get("date")
        kwargs = json.loads(str(content.get("kwargs", "{}"))) if isinstance(content, Mapping) else {}
        template = ChatTemplate(tokenizer, date if isinstance(date, str) else None, kwargs)
    else:
        expected = "a tokenizer with a chat template" if kind == "chat" else "instruction, none or chat"
        raise ArtifactError.at(where, "the prompt template cannot be made again", expected, f"kind {kind!r}")
    if template.sha256 != record.get("sha256"):
        raise ArtifactError.at(
            where,
            "differs from the prompt template that was recorded",
            f"sha256 {record.get('sha256')}",
            template.sha256,
        )
    return template


def _from_json(name: str, where: str, text: str) -> InstructionTemplate:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError.at(where, f"template is not valid JSON: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ConfigError.at(where, "template: expected an object of strings")
    if set(found) == set(_SEED_1_KEYS):
        with_input, without, mark = found["prompt_inputs"], found["prompt_noinputs"], None
        last_line = without.rstrip().rpartition("\n")[2]
        mark = last_line if last_line and "{" not in last_line and last_line in with_input else None
    elif set(found) | {"description"} == set(_SEED_2_KEYS):
        with_input, without, mark = found["prompt_input"], found["prompt_no_input"], found["response_split"]
    else:
        keys = f"{', '.join(_SEED_2_KEYS)}; or {', '.join(_SEED_1_KEYS)}"
        raise ConfigError.at(where, "template: wrong keys", expected=keys, got=", ".join(found))
    ConfigError.raise_all(_faults(where, with_input, without, mark))
    return InstructionTemplate(name, with_input, without, mark)


def _faults(where: str, with_input: str, without: str, mark: str | None) -> list[Problem]:
    faults = []
    if sorted(set(_SLOT.findall(with_input))) != ["input", "instruction"]:
        faults.append(Problem(where, "template: the text with input needs {instruction} and {input}"))
    if set(_SLOT.findall(without)) != {"instruction"}:
        faults.append(Problem(where, "template: the text without input needs {instruction} and no {input}"))
    if mark is not None and not (mark and mark in with_input and mark in without):
        faults.append(Problem(where, f"template: response_split {mark!r} does not stand in both texts"))
    return faults
