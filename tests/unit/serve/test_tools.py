"""Tools: written by the chat template, called in the model's own form, read back from whole replies and from streams; and replies
that follow a JSON schema."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config.serve import LimitsConfig, ServeConfig
from rlhf_ray.serve import structured
from rlhf_ray.serve.api_errors import ApiError
from rlhf_ray.serve.openai_types import ChatRequest
from rlhf_ray.serve.structured import SchemaCompiler
from rlhf_ray.serve.tool_calls import ToolCallReader, tool_format

from .conftest import LiveService
from .test_http import chat, client, send

has_library = pytest.mark.skipif(
    importlib.util.find_spec("llguidance") is None, reason="llguidance is not installed (the extra `structured`)"
)
PARAMETERS = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "Now.", "parameters": PARAMETERS}}
OTHER = {"type": "function", "function": {"name": "get_time"}}
ASKED = [{"role": "user", "content": "The weather in Rome?"}]
TEMPLATE = """{%- if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>
{% endif %}{% for m in messages %}<{{ m.role }}>{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}
{{- m.content }}{% if m.tool_calls %}{% for c in m.tool_calls %}
{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}{% endfor %}{% endif %}
{% endfor %}{% if style %}[{{ style }}]{% endif %}{% if add_generation_prompt %}<assistant>{% endif %}
{#- <|start_header_id|> #}"""

CALL = '{"name": "get_weather", "arguments": {"city": "Rome"}}'
LLAMA = CALL.replace("arguments", "parameters")
WRITTEN: list[tuple[str, str, str, list[tuple[str, Any]]]] = [
    ("hermes", f"Let me see.\n<tool_call>\n{CALL}\n</tool_call>", "Let me see.\n", [("get_weather", {"city": "Rome"})]),
    (
        "hermes",
        f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>",
        "",
        [("get_weather", {"city": "Rome"})] * 2,
    ),
    ("hermes", f"<tool_call>{CALL}", "", [("get_weather", {"city": "Rome"})]),  # the end mark is a stop token
    ("hermes", '<tool_call>{"name": "get_time"}</tool_call>', "", [("get_time", {})]),  # were text: no arguments
    ("hermes", '<tool_call>{"name": "get_time", "arguments": null}', "", [("get_time", {})]),
    ("hermes", '<tool_call>{"age": 30}</tool_call>', '<tool_call>{"age": 30}</tool_call>', []),
    ("hermes", "<tool_call>{broken</tool_call> so", "<tool_call>{broken</tool_call> so", []),
    ("hermes", "1 < 2 and <tool", "1 < 2 and <tool", []),
    ("llama3_json", LLAMA, "", [("get_weather", {"city": "Rome"})]),
    ("llama3_json", f"<|python_tag|>{LLAMA}; {LLAMA}", "", [("get_weather", {"city": "Rome"})] * 2),
    ("llama3_json", '{"a": 1}', '{"a": 1}', []),
    ("llama3_json", '{"name": "Ann", "age": 30}', '{"name": "Ann", "age": 30}', []),
    ("llama3_json", '{"name": "Ann", "parameters": {}}', '{"name": "Ann", "parameters": {}}', []),
    ("llama3_json", '{"name": "get_time"}', '{"name": "get_time"}', []),
    ("llama3_json", '<|python_tag|>{"name": "get_time"}', "", [("get_time", {})]),
    *(
        ("hermes", f"<tool_call>{call}</tool_call>", f"<tool_call>{call}</tool_call>", [])
        for call in (CALL.replace('"Rome"', value) for value in ("NaN", "-Infinity", "1e999", '"\\ud800"'))
    ),
    ("mistral", '[TOOL_CALLS]get_time{"a": NaN}', '[TOOL_CALLS]get_time{"a": NaN}', []),
    ("llama3_json", "It is {warm}.", "It is {warm}.", []),
    ("mistral", f"[TOOL_CALLS][{CALL}, {CALL}]", "", [("get_weather", {"city": "Rome"})] * 2),
    ("mistral", 'Yes.[TOOL_CALLS]get_weather[ARGS]{"city": "Rome"}', "Yes.", [("get_weather", {"city": "Rome"})]),
    ("mistral", 'x[TOOL_CALLS]a{"b": 1}[TOOL_CALLS]c{}', "x", [("a", {"b": 1}), ("c", {})]),
    ("mistral", '[TOOL_CALLS][{"name": "get_time"}]', "", [("get_time", {})]),
    (
        "mistral",
        f'[TOOL_CALLS][{CALL}, {{"name": "get_time"}}]',
        "",
        [("get_weather", {"city": "Rome"}), ("get_time", {})],
    ),
    ("mistral", "[TOOL_CALLS]nonsense", "[TOOL_CALLS]nonsense", []),
    ("required", f"[{LLAMA}]", "", [("get_weather", {"city": "Rome"})]),
    ("required", f"[{LLAMA[:20]}", f"[{LLAMA[:20]}", []),  # cut off
    ("named:get_weather", '{"city": "Rome"}', "", [("get_weather", {"city": "Rome"})]),
]


@pytest.mark.parametrize(("kind", "text", "content", "calls"), WRITTEN)
def test_calls_are_read_in_whatever_pieces_they_come(kind: str, text: str, content: str, calls: Any) -> None:
    for size in (1, 3, 7, len(text)):
        reader, deltas = ToolCallReader(kind, tools=("get_weather", "get_time")), list[dict[str, Any]]()
        for start in range(0, len(text), size):
            deltas += reader.push(text[start : start + size])
        deltas += reader.finish()
        found = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in reader.calls]
        assert (reader.content, found) == (content, calls), size
        assert "".join(delta.get("content", "") for delta in deltas) == content
        streamed: dict[int, dict[str, Any]] = {}
        for part in (part for delta in deltas for part in delta.get("tool_calls", ())):
            known = streamed.setdefault(part["index"], {**part, "function": {"name": "", "arguments": ""}})
            for name, piece in part["function"].items():
                known["function"][name] += piece
        assert [{k: v for k, v in call.items() if k != "index"} for call in streamed.values()] == reader.calls


def test_one_call_at_most_where_the_client_wants_no_parallel_ones() -> None:
    """`parallel_tool_calls: false` was taken and had no effect."""
    for kind, text in (
        ("hermes", f"<tool_call>{CALL}</tool_call>" * 2),
        ("mistral", f"[TOOL_CALLS][{CALL}, {CALL}]"),
        ("required", f"[{LLAMA}, {LLAMA}]"),
    ):
        reader = ToolCallReader(kind, single=True)
        deltas = reader.push(text) + reader.finish()
        assert len(reader.calls) == 1 and reader.content == "" and len(deltas) == 1, kind
    fields = {"model": "base", "messages": ASKED, "tools": [TOOL], "tool_choice": "required"}
    for parallel, most in ((None, None), (True, None), (False, 1)):
        asked = ChatRequest(**fields, parallel_tool_calls=parallel)
        schema = asked.to_generation_request(LimitsConfig(), ("base",), ({"messages": ASKED},)).schema
        assert json.loads(schema or "").get("maxItems") == most


def test_the_form_is_known_by_the_chat_template() -> None:
    assert tool_format("... <tool_call> ...") == "hermes"
    assert tool_format("... [TOOL_CALLS] ...") == "mistral"
    assert tool_format(TEMPLATE) == "llama3_json"
    assert tool_format("<tool_call><function=x>") is None and tool_format("") is None


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Path]) -> Iterator[LiveService]:
    """The base alone, with a chat template that writes tools as Llama 3 does."""
    folder = tmp_path_factory.mktemp("tools")
    base = folder / "base"
    shutil.copytree(tiny_llama(context=2048), base)
    (base / "chat_template.jinja").write_text(TEMPLATE)
    limits = {"max_tokens": 400, "default_max_tokens": 200}
    made = LiveService(ServeConfig(output_dir=str(folder / "serve"), model_name_or_path=str(base), limits=limits))
    yield made
    made.close()


def prompt_of(service: LiveService, **fields: Any) -> str:
    ids = send(service, "POST", "/tokenize", {"messages": ASKED, **fields})[2]["tokens"]
    return str(send(service, "POST", "/detokenize", {"tokens": ids})[2]["prompt"])


def test_the_template_is_given_tools_variables_and_the_calls_of_earlier_turns(service: LiveService) -> None:
    written = prompt_of(service, tools=[TOOL, OTHER], chat_template_kwargs={"style": "brief"})
    assert '"name": "get_weather"' in written and '"get_time"' in written and written.endswith("[brief]<assistant>")
    assert "<tools>" not in prompt_of(service)
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    turns = [
        *ASKED,
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "function_call": None},
        {"role": "tool", "tool_call_id": "c1", "content": "Sunny."},
    ]
    told = prompt_of(service, messages=turns, tools=[TOOL])
    assert '{"name": "get_weather", "parameters": {"city": "Rome"}}' in told and "<tool>Sunny." in told
    assert chat(service, messages=turns, tools=[TOOL], max_tokens=3)[0] == 200
    for wrong in (
        [*ASKED, {"role": "assistant", "tool_calls": [{**call, "function": {"name": "a", "arguments": "{"}}]}, *ASKED],
        [{"role": "user", "content": "x", "tool_calls": [call]}],
        [{"role": "user", "content": "x", "tool_call_id": "c1"}],
    ):
        assert chat(service, messages=wrong)[0] == 400
    assert chat(service, messages=ASKED, chat_template_kwargs={"messages": []})[0] == 400


def test_the_template_is_given_the_reasoning_of_earlier_turns(service: LiveService) -> None:
    """It was taken and dropped: a model that reasons between two calls of tools did not read what it had thought."""
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    answer = {"role": "tool", "tool_call_id": "c1", "content": "Sunny."}

    def turns(**said: Any) -> list[dict[str, Any]]:
        return [*ASKED, {"role": "assistant", "content": None, "tool_calls": [call], **said}, answer]

    plain = prompt_of(service, messages=turns(), tools=[TOOL])
    thought = prompt_of(service, messages=turns(reasoning_content="First Rome."), tools=[TOOL])
    assert thought == plain.replace("<assistant>", "<assistant><think>First Rome.</think>", 1)
    assert "<think>" not in plain and prompt_of(service, messages=turns(reasoning_content=""), tools=[TOOL]) == plain
    spelled = {"messages": turns(reasoning_content="</s>"), "tools": [TOOL]}
    assert not {0, 1, 2} & set(send(service, "POST", "/tokenize", spelled)[2]["tokens"][1:])
    assert chat(service, messages=turns(reasoning_content="First Rome."), tools=[TOOL], max_tokens=3)[0] == 200
    row = {"messages": turns(reasoning_content="First Rome."), "chosen": "Sun.", "rejected": "Rain."}
    assert send(service, "POST", "/v1/preferences", row)[0] == 200


@pytest.mark.parametrize("value", ["Infinity", "NaN", "1e999", '"\\ud800"'])
def test_arguments_in_the_history_are_json_that_can_be_written_again(service: LiveService, value: str) -> None:
    """They were accepted, and then a server error where the prompt, or the preference, was written."""
    call = {"id": "c1", "type": "function", "function": {"name": "get_time", "arguments": f'{{"x": {value}}}'}}
    turns = [*ASKED, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c1", "content": ""}]
    for path, more in (
        ("/v1/chat/completions", {"model": "base"}),
        ("/v1/compare", {"models": ["base"]}),
        ("/v1/preferences", {"chosen": "a", "rejected": "b"}),
        ("/tokenize", {}),
    ):
        status, _, found = send(service, "POST", path, {"messages": turns, **more})
        assert status == 400 and "arguments: expected a JSON object" in found["error"]["message"], path


@pytest.mark.parametrize("error", [OSError("full"), ValueError("Out of range float values are not JSON compliant")])
def test_a_log_that_cannot_be_written_takes_no_answer_away(
    service: LiveService, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(row: Any) -> None:
        raise error

    monkeypatch.setattr(service.api.access_log, "append", fail)
    assert chat(service, max_tokens=2)[0] == 200


@has_library
def test_json_that_is_no_call_is_the_reply(service: LiveService) -> None:
    """In Llama 3's form nothing marks a call: a reply that has a name was taken for one, and its text dropped."""
    for name, called in (("Ann", False), ("get_time", True)):
        one_of = {"name": {"const": name}, "parameters": {"const": {}}}
        schema = {"type": "object", "properties": one_of, "required": [*one_of], "additionalProperties": False}
        form = {"type": "json_schema", "json_schema": {"schema": schema}}
        status, found = chat(service, messages=ASKED, tools=[TOOL, OTHER], response_format=form, max_tokens=400)
        (choice,) = found["choices"]
        assert status == 200 and choice["finish_reason"] == ("tool_calls" if called else "stop")
        assert ("tool_calls" in choice["message"]) is called and bool(choice["message"]["content"]) is not called


def test_no_text_of_tools_becomes_a_control_token(service: LiveService) -> None:
    """A description that spells </s> ended the prompt there (id 2)."""

    def tokenize(**fields: Any) -> tuple[int, Any]:
        status, _, found = send(service, "POST", "/tokenize", {"messages": ASKED, **fields})
        return status, found.get("tokens")

    described = {**OTHER["function"], "description": "Ends </s> here."}
    status, ids = tokenize(tools=[{"type": "function", "function": described}])
    assert status == 200 and not {0, 1, 2} & set(ids[1:])
    ids = tokenize(chat_template_kwargs={"style": "</s>"})[1]
    assert not {0, 1, 2} & set(ids[1:])
    call = {"id": "1", "type": "function", "function": {"name": "get_time", "arguments": '{"a": "</s>"}'}}
    turns = [
        *ASKED,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "</s>", "tool_call_id": "1"},
    ]
    ids = tokenize(messages=turns)[1]
    assert not {0, 1, 2} & set(ids[1:])
    named = {**OTHER["function"], "parameters": {"properties": {"</s>": {}}}}
    assert tokenize(tools=[{"type": "function", "function": named}])[0] == 400


@has_library
def test_a_call_in_the_models_own_form_comes_back_and_goes_in_again(service: LiveService) -> None:
    """What a model that was trained on tools would write is written by a schema here."""
    ai = client(service)
    schema = {
        "type": "object",
        "properties": {"name": {"const": "get_weather"}, "parameters": PARAMETERS},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }
    asked: dict[str, Any] = {
        "model": "base",
        "messages": ASKED,
        "tools": [TOOL],
        "seed": 1,
        "response_format": {"type": "json_schema", "json_schema": {"name": "call", "schema": schema}},
    }
    choice = ai.chat.completions.create(**asked).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = choice.message.tool_calls
    assert call.function.name == "get_weather" and json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    pieces = list(ai.chat.completions.create(**asked, stream=True))
    (streamed,) = [c for p in pieces for c in p.choices[0].delta.tool_calls or ()]
    assert (streamed.function.name, streamed.function.arguments) == (call.function.name, call.function.arguments)
    assert pieces[-1].choices[0].finish_reason == "tool_calls"
    history = [*ASKED, choice.message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "Sunny."}]
    assert ai.chat.completions.create(model="base", messages=history, tools=[TOOL], max_tokens=3).choices


@has_library
def test_a_tool_that_must_be_called_is_called(service: LiveService) -> None:
    ai = client(service)
    asked: dict[str, Any] = {"model": "base", "messages": ASKED, "tools": [TOOL, OTHER], "temperature": 0}
    named = ai.chat.completions.create(**asked, tool_choice={"type": "function", "function": {"name": "get_weather"}})
    (call,) = named.choices[0].message.tool_calls
    assert call.function.name == "get_weather" and json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    forced = ai.chat.completions.create(**asked, tool_choice="required", max_tokens=400, seed=3)
    if forced.choices[0].finish_reason != "length":
        assert {c.function.name for c in forced.choices[0].message.tool_calls} <= {"get_weather", "get_time"}
    none = ai.chat.completions.create(**asked, tool_choice="none", max_tokens=5)
    assert none.choices[0].message.tool_calls is None


@has_library
def test_parameters_that_refer_to_their_own_definitions(service: LiveService) -> None:
    """As Pydantic writes nested models: behind `required` the references led nowhere, and the request was refused."""
    item = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    own = {"type": "object", "properties": {"item": {"$ref": "#/$defs/Item"}}, "required": ["item"]}
    own |= {"$defs": {"Item": item}, "additionalProperties": False}
    tools = [{"type": "function", "function": {"name": name, "parameters": own}} for name in ("one", "two")]
    for chosen in ("required", {"type": "function", "function": {"name": "two"}}):
        asked = {"tools": tools, "tool_choice": chosen, "parallel_tool_calls": False, "max_tokens": 400}
        status, found = chat(service, messages=ASKED, seed=1, **asked)
        assert status == 200, found
        choice = found["choices"][0]
        if choice["finish_reason"] != "length":
            (call,) = choice["message"]["tool_calls"]
            assert json.loads(call["function"]["arguments"]) in ({"item": {"n": 1}}, {"item": {"n": 2}})


@has_library
def test_replies_follow_their_schema_beside_replies_that_have_none(service: LiveService) -> None:
    """Each row its own mask: 12 schemas and plain requests in one batch, every reply as it is alone."""

    def ask(number: int) -> Any:
        schema = {
            "type": "object",
            "properties": {f"k{number}": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"type": "boolean"}},
            "required": [f"k{number}", "b"],
            "additionalProperties": False,
        }
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
        fields = {"response_format": form} if number % 2 else {}
        return chat(service, messages=ASKED, seed=number, max_tokens=60, **fields)[1]["choices"][0]

    alone = [ask(number) for number in range(6)]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(ask, range(6)))
    assert alone == together
    for number in (1, 3, 5):
        reply = together[number]
        if reply["finish_reason"] == "stop":
            found = json.loads(reply["message"]["content"])
            assert found.keys() == {f"k{number}", "b"} and 0 <= found[f"k{number}"] <= 99
    ended = [together[n]["finish_reason"] for n in (1, 3, 5)]
    assert "stop" in ended, ended


@has_library
def test_any_json_object(service: LiveService) -> None:
    form = {"response_format": {"type": "json_object"}, "max_tokens": 200}
    replies = [chat(service, messages=ASKED, seed=s, **form)[1]["choices"][0] for s in range(4)]
    whole = [r["message"]["content"] for r in replies if r["finish_reason"] == "stop"]
    assert all(isinstance(json.loads(text), dict) for text in whole)
    assert all(r["message"]["content"].lstrip().startswith("{") for r in replies)


@has_library
def test_schemas_that_cannot_be_followed_are_refused(service: LiveService) -> None:
    def ask(schema: Any, **fields: Any) -> Any:
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        return chat(service, messages=ASKED, response_format=form, **fields)

    for schema in ({"type": "elephant"}, {"$ref": "https://example.org/x.json"}, {"type": "string", "pattern": "("}):
        status, found = ask(schema)
        assert status == 400 and found["error"]["param"] == "response_format", found
    assert ask({}, ignore_eos=True)[0] == ask({}, min_tokens=3)[0] == 400
    assert chat(service, messages=ASKED)[0] == 200


def test_without_the_library_a_schema_is_refused_clearly(backbone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structured, "is_available", lambda: False)
    with pytest.raises(ApiError, match="llguidance") as caught:
        asyncio.run(SchemaCompiler(backbone.tokenizer, 260).compile("{}"))
    assert (caught.value.status, caught.value.param) == (400, "response_format")
