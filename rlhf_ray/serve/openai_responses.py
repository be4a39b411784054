"""From a replica's events (generation.py) to OpenAI's objects: whole, or chunk by chunk."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf_ray.serve.api_errors import ApiError

Kind = Literal["chat", "completion", "comparison"]
OBJECTS = {"chat": "chat.completion", "completion": "text_completion", "comparison": "comparison"}
IDS = {"chat": "chatcmpl", "completion": "cmpl", "comparison": "cmp"}
DONE = "data: [DONE]\n\n"


@dataclass
class PartialChoice:
    """One choice, as far as it has come."""

    text: str = ""
    tokens: list[list[Any]] = field(default_factory=list)
    end: dict[str, Any] | None = None


@dataclass
class ResponseBuilder:
    """Takes in events; gives out the whole answer, or its chunks. model: as the client named it.
    logprobs: the client wants them.  usage: it wants them in a last chunk."""

    kind: Kind
    model: str
    logprobs: bool = False
    usage: bool = False
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    start: dict[str, Any] = field(default_factory=dict)
    partials: dict[int, PartialChoice] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.id = f"{IDS[self.kind]}-{uuid.uuid4().hex[:24]}"

    def take(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Raises ApiError if one of them is an error."""
        for event in events:
            if "error" in event:
                raise ApiError(**event["error"])
            if "start" in event:
                self.start = dict(event["start"])
                continue
            partial = self.partials.setdefault(event["i"], PartialChoice())
            partial.text += event.get("text", "")
            partial.tokens += event.get("tokens", ())
            if "end" in event:
                partial.end = dict(event)

    # ---- whole ----------------------------------------------------------------------------------------------------------

    def whole(self) -> dict[str, Any]:
        return {
            **self._head(OBJECTS[self.kind]),
            "choices": [self._choice(i) for i in sorted(self.partials)],
            "usage": self.counts(),
        }

    def counts(self) -> dict[str, int]:
        prompt = int(self.start.get("prompt_tokens", 0))
        written = sum(r.end["completion_tokens"] for r in self.partials.values() if r.end is not None)
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}

    def adapters(self) -> str:
        """Ids of the versions that wrote, for the access log."""
        return ",".join(a["id"] for a in self.start.get("adapters", {}).values())

    def _head(self, kind: str) -> dict[str, Any]:
        adapters = self.start.get("adapters", {})
        head = {"id": self.id, "object": kind, "created": self.created}
        if self.kind == "comparison":
            return {**head, "adapters": adapters}
        mine = adapters.get(self.model, {})
        return {
            **head,
            "model": self.model,
            "system_fingerprint": mine.get("fingerprint"),
            "adapter": {k: mine.get(k) for k in ("id", "sha256")},
        }

    def _choice(self, index: int) -> dict[str, Any]:
        partial = self.partials[index]
        end = partial.end or {}
        choice: dict[str, Any] = {"index": index, "finish_reason": end.get("end"), **self._extras(end)}
        if self.kind == "completion":
            return {**choice, "text": partial.text, "logprobs": _flat(partial.tokens, 0) if self.logprobs else None}
        choice["message"] = {"role": "assistant", "content": partial.text, "refusal": None}
        choice["logprobs"] = _chat(partial.tokens) if self.logprobs else None
        if self.kind == "comparison":
            choice |= {"model": self._model_name(index), "completion_tokens": end.get("completion_tokens")}
        return choice

    def _extras(self, end: Mapping[str, Any]) -> dict[str, Any]:
        return {name: end[name] for name in ("reward", "kl") if name in end}

    def _model_name(self, index: int) -> str:
        return str(self.start["choices"][index])

    # ---- chunk by chunk --------------------------------------------------------------------------------------------------

    def chunks(self, events: Iterable[Mapping[str, Any]]) -> str:
        """Server-sent events for these events, which have been taken in already."""
        return "".join(_sse(chunk) for event in events for chunk in self._chunks(event))

    def tail(self) -> str:
        """The usage chunk, if it is wanted, and the end."""
        if not self.usage:
            return DONE
        return _sse({**self._head(self._part), "choices": [], "usage": self.counts()}) + DONE

    @property
    def _part(self) -> str:
        return "text_completion" if self.kind == "completion" else f"{OBJECTS[self.kind]}.chunk"

    def _chunks(self, event: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
        if "start" in event:
            if self.kind != "completion":
                for index in range(len(self.start["choices"])):
                    yield self._chunk(index, {"role": "assistant", "content": ""})
            return
        text, tokens = event.get("text", ""), event.get("tokens", [])
        if text or tokens:
            at = len(self.partials[event["i"]].text) - len(text)
            logprobs = None
            if self.logprobs:
                logprobs = _flat(tokens, at) if self.kind == "completion" else _chat(tokens)
            yield self._chunk(event["i"], {"content": text}, logprobs=logprobs)
        if "end" in event:
            yield self._chunk(event["i"], {}, event["end"], **self._extras(event))

    def _chunk(self, index: int, delta: dict[str, Any], end: str | None = None, **more: Any) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "finish_reason": end, "logprobs": None, **more}
        choice |= {"text": delta.get("content", "")} if self.kind == "completion" else {"delta": delta}
        if self.kind == "comparison":
            choice["model"] = self._model_name(index)
        chunk = {**self._head(self._part), "choices": [choice]}
        return {**chunk, "usage": None} if self.usage else chunk


def error_chunk(error: ApiError) -> str:
    """How a stream that has begun tells that it failed."""
    return _sse(error.to_json())


async def stream(
    builder: ResponseBuilder, first: list[dict[str, Any]], rest: AsyncIterator[list[dict[str, Any]]]
) -> AsyncIterator[str]:
    """The answer as server-sent events. first: the events that are there already, and have been taken in."""
    try:
        yield builder.chunks(first)
        async for events in rest:
            builder.take(events)
            yield builder.chunks(events)
        yield builder.tail()
    except ApiError as error:
        yield error_chunk(error) + DONE


def _sse(value: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _chat(tokens: list[list[Any]]) -> dict[str, Any]:
    content = [
        {"token": text, "logprob": value, "bytes": list(text.encode("utf-8", "replace")), "top_logprobs": []}
        for text, value in tokens
    ]
    return {"content": content, "refusal": None}


def _flat(tokens: list[list[Any]], at: int) -> dict[str, Any]:
    offsets = []
    for text, _ in tokens:
        offsets.append(at)
        at += len(text)
    return {
        "tokens": [text for text, _ in tokens],
        "token_logprobs": [value for _, value in tokens],
        "top_logprobs": None,
        "text_offset": offsets,
    }
