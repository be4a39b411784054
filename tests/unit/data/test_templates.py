"""Prompt templates: texts, digests, files of the user, chat, and conversations."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.data.prompts import Message, Prompt
from rlhf_ray.data.templates import SHIPPED, InstructionTemplate, PromptMismatch, load_template, template_from_manifest
from rlhf_ray.errors import ArtifactError, ConfigError

# name -> (bytes, first 16 hex digits of the SHA-256) of prompt_input and of prompt_no_input, as the ancestors have them
DIGESTS = {
    "alpaca": ((225, "f1b8970aa9b05de4"), (153, "7768da83ee0feb38")),
    "alpaca_legacy": ((224, "28811e9850d9511b"), (152, "35101bc36d10997c")),
    "alpaca_short": ((66, "e213cba2d1089f79"), (46, "c42ad62d113edc9a")),
    "vigogne": ((257, "631ae5fdf000555d"), (169, "82e0a57e9c7c2e56")),
}
USER = Message("user", "Name a bird.")


def _shipped(name: str) -> InstructionTemplate:
    found = load_template(name)
    assert isinstance(found, InstructionTemplate)
    return found


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_texts_have_the_published_digests(name: str) -> None:
    template = _shipped(name)
    for text, (size, digest) in zip((template.prompt_input, template.prompt_no_input), DIGESTS[name], strict=True):
        assert len(text.encode("utf-8")) == size
        assert hashlib.sha256(text.encode("utf-8")).hexdigest()[:16] == digest


def test_rendering() -> None:
    template = load_template("alpaca_short")
    assert template.render(Prompt("Which?", "a b")) == "### Instruction:\nWhich?\n\n### Input:\na b\n\n### Response:\n"
    assert template.render(Prompt("Name a bird.")) == "### Instruction:\nName a bird.\n\n### Response:\n"
    assert template.render(Prompt(messages=(USER,))) == template.render(Prompt("Name a bird."))
    assert template.render(Prompt()) == ""  # what stands before a bare text


def test_slots_in_the_data_stay_as_they_are() -> None:
    text = load_template("alpaca_short").render(Prompt("Explain {input} and {0} {{x}}", "{instruction}"))
    assert text == "### Instruction:\nExplain {input} and {0} {{x}}\n\n### Input:\n{instruction}\n\n### Response:\n"


def test_none_takes_prompts_as_they_are() -> None:
    template = load_template("none")
    assert template.render(Prompt(" Once upon ")) == " Once upon "
    assert template.render(Prompt("Which?", "a b")) == "Which?\n\na b"
    talk = (USER, Message("assistant", "Wren."), Message("user", "Another?"))
    expected = "Human: Name a bird.\n\nAssistant: Wren.\n\nHuman: Another?\n\nAssistant:"
    assert template.render(Prompt(messages=talk)) == expected


@pytest.mark.parametrize("messages", [(Message("system", "Be brief."), USER), (USER, Message("assistant", "x"), USER)])
def test_instruction_templates_refuse_longer_conversations(messages: tuple[Message, ...]) -> None:
    with pytest.raises(PromptMismatch, match="template 'alpaca' takes one user message, got ") as caught:
        load_template("alpaca").render(Prompt(messages=messages))
    assert caught.value.fix == "template: chat, or none (a transcript)"


def test_extract_response() -> None:
    template = load_template("alpaca")
    text = template.render(Prompt("Name a bird.")) + "Wren. \n"
    assert template.extract_response(text) == "Wren."
    assert template.extract_response("x### Response:a### Response:b") == "a### Response:b"  # after the FIRST marker
    with pytest.raises(ValueError, match="no response marker '### Response:' in the text"):
        template.extract_response("Wren.")
    with pytest.raises(ValueError, match="template 'none' has no response marker"):
        load_template("none").extract_response("Wren.")


def test_sha256_is_over_what_is_rendered(write: Callable[..., str]) -> None:
    """Seeds F34: the digest that travels with artefacts. Seed 1's file of the same texts is the same template."""
    template = _shipped("alpaca_legacy")
    theirs = {"prompt_inputs": template.prompt_input, "prompt_noinputs": template.prompt_no_input}
    found = load_template(write(json.dumps(theirs), "v0_inputs_noinputs.json"))
    assert found.name == "v0_inputs_noinputs"
    assert found.sha256 == template.sha256
    assert found.response_split == "### Response:"
    ours = {
        "description": "x",
        "prompt_input": template.prompt_input,
        "prompt_no_input": template.prompt_no_input + " ",
    }
    other = load_template(write(json.dumps({**ours, "response_split": "### Response:"}), "mine.json"))
    assert other.sha256 != template.sha256
    assert len({load_template(name).sha256 for name in (*SHIPPED, "none")}) == 5
    expected = {
        "kind": "instruction",
        "prompt_input": template.prompt_input,
        "prompt_no_input": template.prompt_no_input,
    }
    assert template.sha256 == hashlib.sha256(json.dumps(expected).encode()).hexdigest()


GOOD = {"prompt_input": "{instruction} {input} ->", "prompt_no_input": "{instruction} ->", "response_split": "->"}
FAULTS: list[tuple[Any, str]] = [
    ("{", "mine.json: template is not valid JSON"),
    ([1], "mine.json: template: expected an object of strings"),
    ({**GOOD, "response_split": 3}, "mine.json: template: expected an object of strings"),
    (
        {**GOOD, "prompt": "x"},
        "mine.json: template: wrong keys; expected description, prompt_input, prompt_no_input, response",
    ),
    ({"prompt_input": "x"}, "mine.json: template: wrong keys"),
    (
        {**GOOD, "prompt_input": "{instruction} ->"},
        "mine.json: template: the text with input needs {instruction} and {input}",
    ),
    (
        {**GOOD, "prompt_no_input": "{instruction} {input} ->"},
        "mine.json: template: the text without input needs {instruction}",
    ),
    ({**GOOD, "response_split": "=>"}, "mine.json: template: response_split '=>' does not stand in both texts"),
    ({**GOOD, "response_split": ""}, "mine.json: template: response_split '' does not stand in both texts"),
]


@pytest.mark.parametrize(("content", "message"), FAULTS, ids=[m for _, m in FAULTS])
def test_malformed_files(write: Callable[..., str], content: Any, message: str) -> None:
    name = write(content if isinstance(content, str) else json.dumps(content), "mine.json")
    with pytest.raises(ConfigError) as caught:
        load_template(name)
    assert caught.value.lines()[0].startswith(f"error: {message}")
    assert caught.value.exit_code == 2


def test_description_is_optional(write: Callable[..., str]) -> None:
    assert load_template(write(json.dumps(GOOD), "mine.json")).render(Prompt("a", "b")) == "a b ->"


def test_unknown_names_and_missing_files(folder: Path) -> None:
    os.mkfifo(folder / "pipe.json")
    with pytest.raises(ConfigError, match=r"template: cannot read pipe.json: it is not a regular file"):
        load_template("pipe.json")
    with pytest.raises(ConfigError, match=r"template: unknown template 'alpacca'.*did you mean 'alpaca'\?"):
        load_template("alpacca")
    with pytest.raises(ConfigError, match=r"template: cannot read nowhere.json: "):
        load_template("nowhere.json")


def test_chat_uses_the_tokenizers_template(chat_tokenizer: Any, tokenizer: Any) -> None:
    template = load_template("chat", chat_tokenizer)
    assert template.render(Prompt("Which?", "a b")) == "<|user|>Which?\n\na b</s><|assistant|>"
    talk = (USER, Message("assistant", "Wren."), Message("user", "Another?"))
    assert (
        template.render(Prompt(messages=talk))
        == "<|user|>Name a bird.</s><|assistant|>Wren.</s><|user|>Another?</s><|assistant|>"
    )
    assert template.render(Prompt()) == ""
    expected = json.dumps({"chat_template": chat_tokenizer.chat_template, "kind": "chat"})
    assert template.sha256 == hashlib.sha256(expected.encode()).hexdigest()
    with pytest.raises(ConfigError, match="template: the tokenizer has no chat template") as caught:
        load_template("chat", tokenizer)
    assert caught.value.exit_code == 2
    with pytest.raises(ConfigError, match="template: the tokenizer has no chat template"):
        load_template("chat")


def test_a_chat_template_that_refuses_a_conversation(load_byte_tokenizer: Callable[..., Any]) -> None:
    tokenizer = load_byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(PromptMismatch, match="the chat template refuses this conversation: roles must alternate"):
        load_template("chat", tokenizer).render(Prompt("x"))


# ---------------------------------------------------------------- from a manifest


@pytest.mark.parametrize("name", [*SHIPPED, "none"])
def test_a_template_is_made_again_from_its_manifest(name: str) -> None:
    template = load_template(name)
    again = template_from_manifest(json.loads(json.dumps(template.manifest())), "manifest.json")
    for prompt in (Prompt("Name a bird."), Prompt("Translate.", "wren")):
        assert again.render(prompt) == template.render(prompt)
    assert (again.name, again.sha256) == (template.name, template.sha256)


def test_a_chat_template_is_the_tokenizers_and_has_to_be_the_recorded_one(chat_tokenizer: Any, tokenizer: Any) -> None:
    record = load_template("chat", chat_tokenizer).manifest()
    assert template_from_manifest(record, "manifest.json", chat_tokenizer).render(Prompt("Hi")).startswith("<|user|>Hi")
    with pytest.raises(ArtifactError, match="expected a tokenizer with a chat template; got kind 'chat'"):
        template_from_manifest(record, "manifest.json", tokenizer)
    forged = {**record, "content": {"kind": "chat", "chat_template": "{{ 7 }}"}, "sha256": "0" * 64}
    with pytest.raises(ArtifactError, match="differs from the prompt template that was recorded"):
        template_from_manifest(forged, "manifest.json", chat_tokenizer)


NOW = "2026-01-31T09:05:07"
DATED = [
    "{{ strftime_now('%d %b %Y') }}|{{ messages[0].content }}",
    "\n  {% if strftime_now is defined %}{% set d = strftime_now('%A, %-d %B %Y %H:%M:%S %% %%d %j') %}{% endif %}{{ d }}",
    "  {%- set x = 1 %}\n{{ messages[0].content }} {{ strftime_now('%c') }}",
    "{% macro today() %}{{ strftime_now('%Y-%m-%d') }}{% endmacro %}{{ today() }}",
]


@pytest.mark.parametrize("chat_template", DATED)
def test_a_template_that_says_the_date_says_the_one_it_was_given(
    load_byte_tokenizer: Callable[..., Any], chat_template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers renders it at that moment, on whatever day; the hash is that of the template, without the date."""
    from transformers.utils import chat_template_utils

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.fromisoformat(NOW)

    tokenizer = load_byte_tokenizer()
    tokenizer.chat_template = chat_template
    pinned = load_template("chat", tokenizer, NOW)
    said = pinned.render(Prompt("hi"))
    assert load_template("chat", tokenizer).render(Prompt("hi")) != said
    again = template_from_manifest(json.loads(json.dumps(pinned.manifest())), "manifest.json", tokenizer)
    assert (again.date, again.sha256, again.render(Prompt("hi"))) == (NOW, pinned.sha256, said)
    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    unpinned = load_template("chat", tokenizer)
    assert (unpinned.render(Prompt("hi")), unpinned.sha256) == (said, pinned.sha256)
    assert unpinned.date is None and "date" not in unpinned.manifest()


def test_a_template_without_a_date_has_none(chat_tokenizer: Any) -> None:
    template = load_template("chat", chat_tokenizer, NOW)
    assert template.manifest() == load_template("chat", chat_tokenizer).manifest() and template.date is None


@pytest.mark.parametrize(
    "change",
    [
        {"content": None},
        {"content": {"kind": "jinja"}},
        {"sha256": "0" * 64},
        {
            "content": {
                "kind": "instruction",
                "prompt_input": "{instruction} {input}",
                "prompt_no_input": "{instruction}",
            }
        },
    ],
)
def test_a_record_that_does_not_hold(change: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match=r"manifest\.json: "):
        template_from_manifest({**load_template("alpaca").manifest(), **change}, "manifest.json")
