"""From a replica's events (generation.py) to OpenAI's objects: one response, or a stream of chunks."""

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
ID_PREFIXES = {"chat": "chatcmpl", "completion": "cmpl", "comparison": "cmp"}
DONE = "data: [DONE]\n\n"


@dataclass
class PartialChoice:
    """One choice, as far as it is written."""

    text: str = ""
    tokens: list[list[Any]] = field(default_factory=list)
    bytes: list[list[int]] = field(default_factory=list)
    end: dict[str, Any] | None = None


@dataclass
class ResponseBuilder:
    """Collects the events of one request. model: as the client named it.  logprobs: the client wants them.
    include_usage: it wants the token usage in a last chunk (OpenAI's `stream_options`)."""

    kind: Kind
    model: str
    logprobs: bool = False
    include_usage: bool = False
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    start: dict[str, Any] = field(default_factory=dict)
    partials: dict[int, PartialChoice] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.id = f"{ID_PREFIXES[self.kind]}-{uuid.uuid4().hex[:24]}"

    def add(self, events: Iterable[Mapping[str, Any]]) -> None:
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
            partial.bytes += event.get("bytes", ())
            if "end" in event:
                partial.end = dict(event)

    # ---- one response --------------------------------------------------------------------------------------------------

    def response(self) -> dict[str, Any]:
        return {
            **self._common_fields(OBJECTS[self.kind]),
            "choices": [self._choice(i) for i in sorted(self.partials)],
            "usage": self.token_usage(),
        }

    def token_usage(self) -> dict[str, int]:
        prompt = int(self.start.get("prompt_tokens", 0))
        completion = sum(r.end["completion_tokens"] for r in self.partials.values() if r.end is not None)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def adapter_ids(self) -> str:
        """Of the versions that answered, for the access log."""
        return ",".join(a["id"] for a in self.start.get("adapters", {}).values())

    def _common_fields(self, kind: str) -> dict[str, Any]:
        adapters = self.start.get("adapters", {})
        fields = {"id": self.id, "object": kind, "created": self.created}
        if self.kind == "comparison":
            return {**fields, "adapters": adapters}
        adapter = adapters.get(self.model, {})
        return {
            **fields,
            "model": self.model,
            "system_fingerprint": adapter.get("fingerprint"),
            "adapter": {k: adapter.get(k) for k in ("id", "sha256")},
        }

    def _choice(self, index: int) -> dict[str, Any]:
        partial = self.partials[index]
        end = partial.end or {}
        choice: dict[str, Any] = {"index": index, "finish_reason": end.get("end"), **self._scores(end)}
        if self.kind == "completion":
            tokens = end.get("listed", partial.tokens)
            return {
                **choice,
                "text": end.get("prompt_text", "") + partial.text,
                "logprobs": _completion_logprobs(tokens, 0) if self.logprobs else None,
            }
        choice["message"] = {"role": "assistant", "content": partial.text, "refusal": None}
        choice["logprobs"] = _chat_logprobs(partial.tokens, partial.bytes) if self.logprobs else None
        if self.kind == "comparison":
            choice |= {"model": self._model_of(index), "completion_tokens": end.get("completion_tokens")}
        return choice

    def _scores(self, end: Mapping[str, Any]) -> dict[str, Any]:
        return {name: end[name] for name in ("reward", "kl") if name in end}

    def _model_of(self, index: int) -> str:
        return str(self.start["choices"][index])

    # ---- chunks --------------------------------------------------------------------------------------------------------

    def chunks(self, events: Iterable[Mapping[str, Any]]) -> str:
        """Server-sent events for these events, which have been added already."""
        return "".join(_sse(chunk) for event in events for chunk in self._chunks(event))

    def end_of_stream(self) -> str:
        """The usage chunk, if it is wanted, and OpenAI's end mark."""
        if not self.include_usage:
            return DONE
        return _sse({**self._common_fields(self._chunk_object), "choices": [], "usage": self.token_usage()}) + DONE

    @property
    def _chunk_object(self) -> str:
        return "text_completion" if self.kind == "completion" else f"{OBJECTS[self.kind]}.chunk"

    def _chunks(self, event: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
        if "start" in event:
            if self.kind != "completion":
                for index in range(len(self.start["choices"])):
                    yield self._chunk(index, {"role": "assistant", "content": ""})
            return
        text, tokens = event.get("text", ""), event.get("tokens", [])
        if text or tokens:
            listed = self.partials[event["i"]].tokens  # with those of this event
            offset = sum(len(token[0]) for token in listed[: len(listed) - len(tokens)])
            logprobs = None
            if self.logprobs:
                is_completion, raw = self.kind == "completion", event.get("bytes", [])
                logprobs = _completion_logprobs(tokens, offset) if is_completion else _chat_logprobs(tokens, raw)
            yield self._chunk(event["i"], {"content": text}, logprobs=logprobs)
        if "end" in event:
            yield self._chunk(event["i"], {}, event["end"], **self._scores(event))

    def _chunk(self, index: int, delta: dict[str, Any], end: str | None = None, **scores: Any) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "finish_reason": end, "logprobs": None, **scores}
        choice |= {"text": delta.get("content", "")} if self.kind == "completion" else {"delta": delta}
        if self.kind == "comparison":
            choice["model"] = self._model_of(index)
        chunk = {**self._common_fields(self._chunk_object), "choices": [choice]}
        return {**chunk, "usage": None} if self.include_usage else chunk


def error_chunk(error: ApiError) -> str:
    """The error of a stream that has begun, when the status can no longer tell it."""
    return _sse(error.to_json())


async def sse_stream(
    builder: ResponseBuilder, first: list[dict[str, Any]], rest: AsyncIterator[list[dict[str, Any]]]
) -> AsyncIterator[str]:
    """The response as server-sent events. first: events that have been added already."""
    try:
        yield builder.chunks(first)
        async for events in rest:
            builder.add(events)
            yield builder.chunks(events)
        yield builder.end_of_stream()
    except ApiError as error:
        yield error_chunk(error) + DONE


def _sse(value: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _chat_logprobs(tokens: list[list[Any]], raw: list[list[int]]) -> dict[str, Any]:
    content = [
        {"token": text, "logprob": value, "bytes": part, "top_logprobs": []} for (text, value), part in zip(tokens, raw)
    ]
    return {"content": content, "refusal": None}


def _completion_logprobs(tokens: list[list[Any]], offset: int) -> dict[str, Any]:
    """offset: characters of the text before the first of `tokens`."""
    offsets = []
    for text, *_ in tokens:
        offsets.append(offset)
        offset += len(text)
    others = [token[2] if len(token) > 2 else None for token in tokens]
    return {
        "tokens": [text for text, *_ in tokens],
        "token_logprobs": [token[1] for token in tokens],
        "top_logprobs": others if any(others) else None,
        "text_offset": offsets,
    }
