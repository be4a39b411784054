"""Checked access to the fields of a row: texts and message lists, with one message per fault, whatever file the row is from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_ray.data.lines import BadRow
from rlhf_ray.data.prompts import ROLES, Message

Fields = Mapping[str, Any]

_TYPES = {str: "string", type(None): "null", dict: "object"}
_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_TOOL_TURNS = ("function_call", "observation")
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
    for key in (role_key, text_key):
        fault = f"missing field '{key}'" if key not in item else _fault_of(f"'{key}'", item[key])
        if fault:
            return fault
    if item.get("tool_calls") or item[role_key] in _TOOL_TURNS:
        return "tool calls are not supported"
    if item[role_key] not in roles:
        return f"unknown {role_key} '{item[role_key]}'; expected one of {', '.join(roles)}"
    return Message(roles[item[role_key]], item[text_key])


def last_response(turns: tuple[Message, ...], name: str) -> str:
    """What the assistant says last. Raises BadRow if someone else has the last word."""
    if not turns or turns[-1].role != "assistant":
        raise BadRow(f"'{name}': expected the assistant's message last")
    return turns[-1].content
