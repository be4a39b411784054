"""From a replica's events (generation.py) to OpenAI's objects: one response, or a stream of chunks."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf_ray.serve.api_errors import ApiError
from rlhf_ray.serve.tool_calls import ToolCallReader

Kind = Literal["chat", "completion", "comparison"]
OBJECTS = {"chat": "chat.completion", "completion": "text_completion", "comparison": "comparison"}
ID_PREFIXES = {"chat": "chatcmpl", "completion": "cmpl", "comparison": "cmp"}
DONE = "data: [DONE]\n\n"


@dataclass
class PartialChoice:
    """One choice, as far as it is written. reader: of the tool calls in it.  completion_tokens: decoded for it."""

    text: str = ""
    tokens: list[list[Any]] = field(default_factory=list)
    bytes: list[list[int]] = field(default_factory=list)
    top: list[list[list[Any]]] = field(default_factory=list)
    reader: ToolCallReader | None = None
    completion_tokens: int = 0
    end: dict[str, Any] | None = None


@dataclass
class ResponseBuilder:
    """Collects the events of one request. model: as the client named it.  logprobs: the client wants them.
    include_usage: it wants the token usage in a last chunk (OpenAI's `stream_options`).
    calls: how tool calls are read from replies (`ChatRequest.calls`).   single_call: one of them at most.   tools: their names.
    best: of so many replies to a prompt, that many are returned, the likeliest first."""

    kind: Kind
    model: str
    logprobs: bool = False
    include_usage: bool = False
    calls: str = ""
    single_call: bool = False
    tools: frozenset[str] = frozenset()
    best: tuple[int, int] | None = None
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    start: dict[str, Any] = field(default_factory=dict)
    partials: dict[int, PartialChoice] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.id = f"{ID_PREFIXES[self.kind]}-{uuid.uuid4().hex[:24]}"

    def add(self, events: Iterable[dict[str, Any]]) -> None:
        """Raises ApiError if one of them is an error. With tool calls, each event is given the `deltas` that its text makes."""
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
            partial.top += event.get("top", ())
            partial.completion_tokens = event.get("completion_tokens", partial.completion_tokens)
            if self.calls:
                if partial.reader is None:
                    kind = self.start["tool_format"] if self.calls == "auto" else self.calls
                    partial.reader = ToolCallReader(kind, self.single_call, self.tools)
                event["deltas"] = partial.reader.push(event.get("text", ""))
                event["deltas"] += partial.reader.finish() if "end" in event else []
            if "end" in event:
                if partial.reader is not None and partial.reader.calls and ":" not in self.calls:
                    event["end"] = event["end"].replace("stop", "tool_calls")
                partial.end = dict(event)

    # ---- one response --------------------------------------------------------------------------------------------------

    def response(self) -> dict[str, Any]:
        first = self.partials[0].end or {} if 0 in self.partials else {}
        return {
            **self._common_fields(OBJECTS[self.kind]),
            "choices": [{**self._choice(i), "index": place} for place, i in enumerate(self._returned())],
            "usage": self.token_usage(),
            **(
                {"prompt_logprobs": first["prompt_logprobs"]}
                if self.kind == "chat" and "prompt_logprobs" in first
                else {}
            ),
        }

    def _returned(self) -> list[int]:
        """The choices that the client gets, in order."""
        every = sorted(self.partials)
        if self.best is None:
            return every
        of, keep = self.best
        means = {i: (self.partials[i].end or {}).get("mean_logprob", 0.0) for i in every}
        groups = (every[start : start + of] for start in range(0, len(every), of))
        return [i for group in groups for i in sorted(group, key=lambda i: -means[i])[:keep]]

    def token_usage(self) -> dict[str, int]:
        """So far, choices that have not ended included."""
        prompt = int(self.start.get("prompt_tokens", 0))
        completion = sum(partial.completion_tokens for partial in self.partials.values())
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
            tokens = end.get("listed") or _with_likeliest(partial.tokens, partial.top)
            return {
                **choice,
                "text": end.get("prompt_text", "") + partial.text,
                "logprobs": _completion_logprobs(tokens, 0) if self.logprobs else None,
                **({"prompt_logprobs": end["prompt_logprobs"]} if "prompt_logprobs" in end else {}),
            }
        choice["message"] = {"role": "assistant", "content": partial.text, "refusal": None}
        if partial.reader is not None and partial.reader.calls:
            said = partial.reader.content
            choice["message"] |= {"content": said if said.strip() else None, "tool_calls": partial.reader.calls}
        choice["logprobs"] = _chat_logprobs(partial.tokens, partial.bytes, partial.top) if self.logprobs else None
        if self.kind == "comparison":
            choice |= {"model": self._model_of(index), "completion_tokens": end.get("completion_tokens")}
            choice |= {"prompt_logprobs": end["prompt_logprobs"]} if "prompt_logprobs" in end else {}
        return choice

    def _scores(self, end: Mapping[str, Any]) -> dict[str, Any]:
        return {name: end[name] for name in ("reward", "kl") if name in end}

    def _model_of(self, index: int) -> str:
        return str(self.start["choices"][index])

    # ---- chunks --------------------------------------------------------------------------------------------------------

    def chunks(self, events: Iterable[dict[str, Any]]) -> str:
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
                raw, top = event.get("bytes", []), event.get("top", [])
                if self.kind == "completion":
                    logprobs = _completion_logprobs(_with_likeliest(tokens, top), offset)
                else:
                    logprobs = _chat_logprobs(tokens, raw, top)
            deltas = event.get("deltas", [{"content": text}])
            for delta in deltas or ([{"content": ""}] if tokens else []):
                yield self._chunk(event["i"], delta, logprobs=logprobs)
                logprobs = None
        elif event.get("deltas"):
            for delta in event["deltas"]:
                yield self._chunk(event["i"], delta)
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


def _chat_logprobs(tokens: list[list[Any]], raw: list[list[int]], top: list[list[list[Any]]]) -> dict[str, Any]:
    def entry(text: str, value: float, part: list[int]) -> dict[str, Any]:
        return {"token": text, "logprob": value, "bytes": part}

    content = [
        {**entry(token[0], token[1], part), "top_logprobs": [entry(*other) for other in likeliest]}
        for token, part, likeliest in zip(tokens, raw, top or [[]] * len(tokens))
    ]
    return {"content": content, "refusal": None}


def _with_likeliest(tokens: list[list[Any]], top: list[list[list[Any]]]) -> list[list[Any]]:
    """Tokens with {text: log-probability} of the likeliest in their place, and of themselves; as they are without `top`."""
    if not top:
        return tokens
    named: list[dict[str, float]] = []
    for (text, value), likeliest in zip(tokens, top):
        named.append({})
        for other, other_value, _ in likeliest:
            named[-1].setdefault(other, other_value)  # the likeliest first; two tokens may be the same text
        named[-1].setdefault(text, value)
    return [[*token, others] for token, others in zip(tokens, named)]


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
