"""Requests of the OpenAI API as this service takes them. Unknown fields are refused; so is what would change the reply and cannot
be honoured; `user`, `store`, `metadata` and the like, which change nothing, are accepted and ignored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from rlhf_ray.config.serve import LimitsConfig
from rlhf_ray.serve.api_errors import ApiError
from rlhf_ray.serve.generation import GenerationRequest

Text = Annotated[str, Field(max_length=1_000_000)]
Name = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class TextPart(_Strict):
    type: Literal["text"]
    text: Text


class ChatMessage(_Strict):
    """name: accepted and ignored."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(max_length=100)]
    name: str | None = None
    refusal: None = None

    def plain(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class Sampling(_Strict):
    """What chat, completions and comparisons share. reward, kl: this service's own (see generation.py)."""

    max_tokens: int | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=1024)] | None = None
    user: str | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    reward: bool | Name = False
    kl: bool = False

    CHANGES: ClassVar[tuple[str, ...]] = ("presence_penalty", "frequency_penalty", "logit_bias")
    """Fields that would change the reply; anything but their neutral value is refused."""

    def unsupported(self) -> Iterator[str]:
        yield from (name for name in self.CHANGES if getattr(self, name))

    @property
    def wants_stream(self) -> bool:
        return bool(self.stream)

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def longest(self) -> int | None:
        return self.max_tokens

    def to_request(
        self, limits: LimitsConfig, models: tuple[str, ...], prompts: tuple[dict[str, Any], ...]
    ) -> GenerationRequest:
        """ApiError where a limit of the service is broken, or something is asked for that it does not do."""
        for name in self.unsupported():
            raise ApiError(400, f"{name} is not supported by this service.", "unsupported_parameter", name)
        if self.stream_options is not None and not self.wants_stream:
            raise ApiError(400, "stream_options needs stream: true.", "invalid_value", "stream_options")
        longest, n = self.longest(), self.n or 1
        _within("max_tokens", longest, limits.max_tokens)
        _within("n", n, limits.max_n)
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return GenerationRequest(
            models=models,
            prompts=prompts,
            n=n,
            max_tokens=longest,
            temperature=1.0 if self.temperature is None else max(self.temperature, 0.01 if self.temperature else 0.0),
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            seed=self.seed,
            stops=stops,
            reward=self.reward,
            kl=self.kl,
        )


class ChatRequest(Sampling):
    model: Name
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None
    parallel_tool_calls: bool | None = None
    modalities: list[str] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None

    def unsupported(self) -> Iterator[str]:
        yield from super().unsupported()
        yield from (
            n for n in ("tools", "functions", "top_logprobs", "reasoning_effort", "verbosity") if getattr(self, n)
        )
        if self.response_format not in (None, {"type": "text"}):
            yield "response_format"
        if self.modalities not in (None, ["text"]):
            yield "modalities"

    def longest(self) -> int | None:
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise ApiError(400, "Give max_completion_tokens or max_tokens, not both.", "invalid_value", "max_tokens")
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(Sampling):
    model: Name
    prompt: (
        Text
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Text], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
    )
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    def unsupported(self) -> Iterator[str]:
        yield from super().unsupported()
        yield from (n for n in ("logprobs", "echo", "suffix") if getattr(self, n))
        if self.best_of not in (None, self.n or 1):
            yield "best_of"

    def prompts(self) -> tuple[dict[str, Any], ...]:
        """Texts are taken as they are, without the adapter's template, as in OpenAI's API."""
        given = self.prompt
        if isinstance(given, str):
            return ({"raw": given},)
        if isinstance(given[0], int):
            return ({"ids": given},)
        return tuple({"raw": p} if isinstance(p, str) else {"ids": p} for p in given)


class CompareRequest(Sampling):
    """One prompt through several models, under the same random numbers."""

    models: Annotated[list[Name], Field(min_length=1)]
    prompt: Text | None = None
    messages: list[ChatMessage] | None = None


class PreferenceRequest(_Strict):
    """Which reply was better. comparison: id of the answer to /v1/compare, if there was one."""

    prompt: Text | None = None
    messages: list[ChatMessage] | None = None
    chosen: Text
    rejected: Text
    chosen_model: Name | None = None
    rejected_model: Name | None = None
    comparison: Annotated[str, Field(max_length=64)] | None = None


def talk(prompt: str | None, messages: list[ChatMessage] | None, limits: LimitsConfig) -> dict[str, Any]:
    """One of the two, as a GenerationRequest takes it. A conversation of one user turn is its text."""
    if (prompt is None) == (messages is None):
        raise ApiError(422, "Give exactly one of prompt and messages.", "invalid_value", "prompt")
    if messages is None:
        return {"text": prompt}
    _within("messages", len(messages), limits.max_messages)
    plain = [message.plain() for message in messages]
    if not plain or plain[-1]["role"] == "assistant":
        raise ApiError(
            422, "The last message must be one to be answered, not the assistant's.", "invalid_value", "messages"
        )
    return {"text": plain[0]["content"]} if len(plain) == 1 and plain[0]["role"] == "user" else {"messages": plain}


def _within(name: str, value: int | None, most: int) -> None:
    if value is not None and not 1 <= value <= most:
        raise ApiError(
            422, f"{name}: expected 1 to {most}; got {value if abs(value) < 10**12 else 'more'}.", "invalid_value", name
        )
