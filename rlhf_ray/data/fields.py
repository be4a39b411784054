"""Checked access to the fields of a row: texts and message lists, with one message per fault, whatever file the row is from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rlhf_ray.data.lines import BadRow
from rlhf_ray.data.prompts import ROLES, Message

Fields = Mapping[str, Any]

_TYPES = {str: "string", type(None): "null", dict: "object"}
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "function": "tool",
}
"""LLaMA-Factory's tags; those of the collections that were scraped from several assistants; and OpenAI's roles: `function` is the
older name of what a function has answered."""
EXTRA = ("reasoning_content", "reasoning", "thinking", "tool_calls", "tool_call_id", "name")
"""What chat templates read of a message beside role and content."""
KNOWN = (*EXTRA, "role", "content", "from", "value", "weight", "train")
_IS_LEARNT, _IS_NOT_LEARNT = (1, "1", "1.0", "true"), (0, "0", "0.0", "false")
"""Of a message's `weight` and `train`; true and 1.0 equal 1."""
_NEXT = {
    "system": ("user", "assistant"),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
"""Who may speak after whom."""
_CHAT_ROLES = {role: role for role in ROLES}


def type_name(value: Any) -> str:
    """The type of a value as JSON users call it."""
    return _TYPES.get(type(value), type(value).__name__)


def is_list(value: Any) -> bool:
    """Whether a field holds messages (one, or a list) and not a text."""
    return isinstance(value, (list, dict))


def texts(row: Fields, *names: str) -> list[str]:
    """The named texts. Raises one BadRow that tells every fault among them."""
    faults = [fault for name in names if (fault := _fault_of(f"'{name}'", row[name]))]
    if faults:
        raise BadRow(faults[0], "; ".join(faults))
    return [row[name] for name in names]


def _fault_of(label: str, value: Any) -> str:
    """What is wrong with a value that has to be a text, or ""."""
    if value is None:
        return f"{label} is null"
    if not isinstance(value, str):
        return f"{label}: expected string, got {type_name(value)}"
    if "\0" in value:
        return f"{label} holds a NUL character"
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            return f"{label} holds a lone surrogate (U+{ord(value[error.start]):04X})"
    return ""


def messages(row: Fields, name: str, sharegpt: bool = False) -> tuple[Message, ...]:
    """The messages of a field: {role, content}, or {from, value} as ShareGPT has them. A single object counts as a list of one.

    Raises BadRow naming the message, counted from 0, and its fault.
    """
    items = [row[name]] if isinstance(row[name], dict) else row[name]
    if not isinstance(items, list):
        raise BadRow(f"'{name}': expected a list of messages, got {type_name(items)}")
    found: list[Message] = []
    for i, item in enumerate(items):
        message = _message(
            item, *(("from", "value", _SHAREGPT_ROLES) if sharegpt else ("role", "content", _CHAT_ROLES))
        )
        if isinstance(message, str):
            raise BadRow(f"'{name}': malformed messages", f"'{name}'[{i}]: {message}")
        found.append(message)
    return tuple(found)


def _message(item: Any, role_key: str, text_key: str, roles: Mapping[str, str]) -> Message | str:
    """One message, or what is wrong with it."""
    if not isinstance(item, dict):
        return f"expected an object with '{role_key}' and '{text_key}', got {type_name(item)}"
    extra = {key: item[key] for key in EXTRA if item.get(key) not in (None, "", [])}
    text = _joined(item.get(text_key))
    if text is None and ("tool_calls" in extra or (text_key not in item and "reasoning_content" in extra)):
        text = ""
    values = {role_key: item.get(role_key), text_key: text}
    for key in (role_key, text_key):
        fault = (
            f"missing field '{key}'" if key not in item and values[key] is None else _fault_of(f"'{key}'", values[key])
        )
        if fault:
            return fault
    role = item[role_key]
    if role not in roles:
        return f"unknown {role_key} '{role}'; expected one of {', '.join(roles)}"
    if role == "function_call":
        extra["tool_calls"], text = text, ""
    if "tool_calls" in extra:
        calls = _tool_calls(extra["tool_calls"])
        if isinstance(calls, str):
            return calls
        extra["tool_calls"] = calls
    if faults := [
        fault
        for key, value in extra.items()
        if (fault := _fault_of(f"'{key}'", _unescaped(value) if key == "tool_calls" else value))
    ]:
        return faults[0]
    is_learnt = True
    for key in ("weight", "train"):
        value = item.get(key)
        said = value.strip().lower() if isinstance(value, str) else value
        if said not in (None, "", *_IS_LEARNT, *_IS_NOT_LEARNT):
            return f"'{key}': expected 0 or 1, or true or false, got {value!r:.60}"
        is_learnt = is_learnt and said not in _IS_NOT_LEARNT
    return Message(roles[role], str(text), json.dumps(extra, sort_keys=True) if extra else "", is_learnt)


def _joined(content: Any) -> Any:
    """The text of a content that is a list of text parts; anything else as it is."""
    is_parts = isinstance(content, list) and content
    if is_parts and all(
        isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content
    ):
        return "".join(part["text"] for part in content)
    return content


def _tool_calls(calls: Any) -> list[dict[str, Any]] | str:
    """In OpenAI's form, with arguments as an object, which templates write as JSON; or what is wrong with them. ShareGPT has one
    call, {name, arguments} as JSON text."""
    if isinstance(calls, str):
        try:
            calls = json.loads(calls)
        except ValueError:
            return "the function call is not JSON"
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            return "malformed tool call: expected {name, arguments}"
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except ValueError:
                return "malformed tool call: its arguments are not JSON"
        of_call = {k: v for k, v in call.items() if k in ("id", "type") and isinstance(v, str)}
        found.append({"type": "function", **of_call, "function": {"name": function["name"], "arguments": arguments}})
    return found or "malformed tool call: there is none"


def given_json(row: Fields, name: str, kind: type) -> str:
    """A field that holds JSON of one kind (list, dict), or a text of it, in one form; "" where it is not there, or empty."""
    value = row.get(name)
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise BadRow(f"'{name}' is not JSON", f"'{name}' is not JSON: {error}") from error
    if not value:
        return ""
    if not isinstance(value, kind):
        raise BadRow(f"'{name}': expected {kind.__name__}, got {type_name(value)}")
    if fault := _fault_of(f"'{name}'", _unescaped(value)):
        raise BadRow(fault)
    return json.dumps(value, sort_keys=True)


def given_tools(row: Fields) -> str:
    """What a row offers to call, as `given_json`. Raises BadRow for what is no tool of any API: {type: function, function: {...}},
    {name, parameters}, or one without a function, {type: web_search}."""
    tools = given_json(row, "tools", list)
    for i, tool in enumerate(json.loads(tools) if tools else ()):
        if not isinstance(tool, dict) or not isinstance(tool.get("function") or {}, dict):
            raise BadRow("'tools': malformed tool", f"'tools'[{i}]: expected {{type, function: {{name, parameters}}}}")
    return tools


def _unescaped(value: Any) -> str:
    """JSON as its texts are rendered."""
    return json.dumps(value, ensure_ascii=False)


def unread_keys(row: Fields, name: str) -> list[str]:
    """Keys of a field's messages that nothing reads, as `messages[].key`."""
    items = row.get(name)
    items = items if isinstance(items, list) else [items]
    keys = dict.fromkeys(key for item in items if isinstance(item, dict) for key in item if key not in KNOWN)
    return [f"{name}[].{key}" for key in keys]


def last_response(turns: tuple[Message, ...], name: str) -> Message:
    """What the assistant says last. Raises BadRow if someone else has the last word."""
    if not turns or turns[-1].role != "assistant":
        raise BadRow(f"'{name}': expected the assistant's message last")
    return turns[-1]


def continued(asked: tuple[Message, ...], inner: tuple[Message, ...]) -> tuple[Message, ...]:
    """A conversation of `asked` and, behind it, `inner`, which may begin with all or the end of it, or hold it whole.

    Raises BadRow where they cannot be one conversation."""
    if not asked or not inner:
        return asked + inner
    first, second = ([(m.role, m.content.strip(), m.extra) for m in turns] for turns in (asked, inner))
    if any(second[at : at + len(first)] == first for at in range(len(second))):
        return inner
    shared = next((n for n in range(len(first), 0, -1) if first[-n:] == second[:n]), 0)
    if not shared and inner[0].role not in _NEXT[asked[-1].role]:
        raise BadRow(
            "the prompt and the turns of 'chosen' do not go together",
            f"'chosen' does not continue the prompt: {inner[0].role} after {asked[-1].role}",
            "prompt: what chosen begins with, or what precedes it; or no prompt where chosen is the whole conversation",
        )
    return asked + inner[shared:]
