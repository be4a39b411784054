"""Tool calls in a reply, read back from the forms in which models write them: as a whole, or while the reply is streamed.

- hermes (Hermes 2 Pro, Qwen 2.5 and 3): <tool_call>{"name": ..., "arguments": {...}}</tool_call>, several of them;
- llama3_json (Llama 3.1 and later): a reply that is {"name": ..., "parameters": {...}}, several with a semicolon between;
- mistral: [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...], or [TOOL_CALLS]name{...} as of tokenizer version 11.

Behind a mark a function without arguments is called with none, {}; JSON without a mark is a call only with them. What looks like a
call and is none is text, as the model wrote it.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Collection, Iterator
from typing import Any

from rlhf_ray.serve.response_text import overlap
from rlhf_ray.serve.strict_json import DECODER, check_utf8, load_json

Call = tuple[str, str]
"""(name of the function, its arguments as JSON text)"""

MARKERS: dict[str, tuple[str, ...]] = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "mistral": ("[TOOL_CALLS]", "[ARGS]"),
    "llama3_json": ("<|python_tag|>",),
}
_NAME = re.compile(r"\s*([A-Za-z0-9_.-]{1,64})\s*(?:\[ARGS\])?\s*(?=\{)")


def tool_format(chat_template: str) -> str | None:
    """The form in which a model with this chat template writes tool calls; None if it is none of those above."""
    if "[TOOL_CALLS]" in chat_template:
        return "mistral"
    if "<tool_call>" in chat_template and "<function=" not in chat_template:
        return "hermes"
    if "<|start_header_id|>" in chat_template and '"parameters"' in chat_template.replace("'", '"'):
        return "llama3_json"
    return None


class ToolCallReader:
    """`push` the text of a reply as it comes, then `finish`. Both return what it adds: {"content": ...} and {"tool_calls": [...]},
    as in the deltas of a stream. A call of the model's own form comes as a whole.

    kind: of `MARKERS`; "required", a JSON list of calls; or "named:NAME", the arguments of one function.   single: calls
    behind the first are dropped (`parallel_tool_calls: false`).   tools: names of the functions there are; where no mark has to
    stand before a call (llama3_json), JSON that names none of them is the reply itself. None: any name is one."""

    def __init__(self, kind: str, single: bool = False, tools: Collection[str] | None = None) -> None:
        self._single, self._tools = single, tools if kind == "llama3_json" else None
        self._kind, self._called = kind, kind.partition(":")[2]
        self._held = ""
        self._count = 0
        self._within = kind == "required"
        self._is_text = False
        self.calls: list[dict[str, Any]] = []
        self.content = ""

    def push(self, text: str) -> list[dict[str, Any]]:
        return list(self._push(text))

    def finish(self) -> list[dict[str, Any]]:
        return list(self._finish())

    def _push(self, text: str) -> Iterator[dict[str, Any]]:
        if self._called:
            yield from self._arguments(text)
            return
        self._held += text
        if self._kind == "llama3_json" and not self._is_text:
            (tag,), begun = MARKERS["llama3_json"], self._held.lstrip()
            if tag.startswith(begun) or begun.removeprefix(tag).lstrip()[:1] in ("", "{"):
                return  # perhaps a call: known at the end
            self._is_text = True
        if self._kind == "llama3_json":
            yield from self._say_held()
        if self._kind in ("hermes", "mistral"):
            yield from self._marked()

    def _marked(self) -> Iterator[dict[str, Any]]:
        """Text up to a mark, then what stands behind it: up to the mark that closes it, or the end of the reply."""
        opens, closes = MARKERS[self._kind][0], "</tool_call>"
        while not (self._within and (self._kind == "mistral" or closes not in self._held)):
            if self._within:
                inside, _, self._held = self._held.partition(closes)
                self._within = False
                yield from self._call_or_text(_calls(inside), f"{opens}{inside}{closes}")
                continue
            before, mark, after = self._held.partition(opens)
            keep = 0 if mark else overlap(before, opens)
            yield from self._say(before[: len(before) - keep])
            self._held = after if mark else before[len(before) - keep :]
            if not mark:
                return
            self._within = True

    def _finish(self) -> Iterator[dict[str, Any]]:
        held, self._held = self._held, ""
        if not held and not self._within:
            return
        if self._kind == "mistral" and self._within:
            yield from self._call_or_text(_mistral_calls(held), f"[TOOL_CALLS]{held}")
        elif self._kind == "hermes" and self._within:
            yield from self._call_or_text(_calls(held), f"<tool_call>{held}")
        elif self._kind in ("llama3_json", "required") and not self._is_text:
            (tag,), text = MARKERS["llama3_json"], held.strip()
            is_marked = self._kind == "required" or text.startswith(tag)
            yield from self._call_or_text(_calls(text.removeprefix(tag), is_marked), held)
        else:
            yield from self._say(held)

    def _arguments(self, text: str) -> Iterator[dict[str, Any]]:
        """The reply is the arguments of the function that had to be called."""
        if not self.calls:
            yield self._call(self._called, text)
        elif text:
            self.calls[0]["function"]["arguments"] += text
            yield {"tool_calls": [{"index": 0, "function": {"arguments": text}}]}

    def _call_or_text(self, calls: list[Call] | None, text: str) -> Iterator[dict[str, Any]]:
        if calls is None or (self._tools is not None and any(name not in self._tools for name, _ in calls)):
            yield from self._say(text)
            return
        if self._single:
            calls = [] if self.calls else calls[:1]
        for name, arguments in calls:
            yield self._call(name, arguments)

    def _call(self, name: str, arguments: str) -> dict[str, Any]:
        function = {"name": name, "arguments": arguments}
        call = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
        self.calls.append(call)
        return {"tool_calls": [{"index": len(self.calls) - 1, **call, "function": dict(function)}]}

    def _say_held(self) -> Iterator[dict[str, Any]]:
        held, self._held = self._held, ""
        yield from self._say(held)

    def _say(self, text: str) -> Iterator[dict[str, Any]]:
        if text and not (self.calls and not text.strip()):  # blank between two calls is no content
            self.content += text
            yield {"content": text}


def _calls(text: str, is_marked: bool = True) -> list[Call] | None:
    """Of one JSON object, a JSON list of them, or several with semicolons between; None if it is anything else.

    is_marked: what stands there says that it is a call, and may leave out the arguments."""
    found, at = list[Any](), 0
    text = text.strip()
    try:
        while at < len(text):
            value, at = DECODER.raw_decode(text, at)
            found += value if isinstance(value, list) else [value]
            rest = text[at:].lstrip("; \n\t")
            at = len(text) - len(rest)
        check_utf8(found)
    except (ValueError, RecursionError):
        return None
    calls = [_call_of(value, is_marked) for value in found]
    return None if not calls or None in calls else [call for call in calls if call is not None]


def _call_of(value: Any, is_marked: bool) -> Call | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    given = (value[key] for key in ("arguments", "parameters") if value.get(key) is not None)
    arguments = next(given, None)
    if arguments is None and is_marked:  # without a mark it is some JSON that has a name
        return value["name"], "{}"
    if isinstance(arguments, str):
        return value["name"], arguments
    return (value["name"], json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None


def _mistral_calls(text: str) -> list[Call] | None:
    """A JSON list of calls; or NAME{arguments}, each behind a mark of its own."""
    if text.lstrip().startswith(("[", "{")):
        return _calls(text)
    calls = []
    for part in text.split("[TOOL_CALLS]"):
        name = _NAME.match(part)
        try:
            arguments = load_json(part[name.end() :]) if name else None
        except (ValueError, RecursionError):
            arguments = None
        if name is None or not isinstance(arguments, dict):
            return None
        calls.append((name[1], json.dumps(arguments, ensure_ascii=False)))
    return calls
