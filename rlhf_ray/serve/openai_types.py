"""Requests of the OpenAI API as this service accepts them. Unknown fields are refused, and so are fields that would change the
response but are not supported; `user`, `store`, `metadata` and the like, which change nothing, are accepted and ignored. So is any
field that is null, empty or neutral, known or not: it asks for nothing. A message that this service, or another one, returned is
accepted as it came, in the history of the next request."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from rlhf_ray.config.serve import LimitsConfig
from rlhf_ray.serve.api_errors import ApiError
from rlhf_ray.serve.generation import GenerationRequest

Text = Annotated[str, Field(max_length=1_000_000)]
ModelName = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
StopString = Annotated[str, Field(max_length=256)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
MAX_LIST = 10_000
"""Entries of a list that the service's limits bound further. A list ends at its first fault, and a union is told apart by its first
entry: a megabyte of faults, in each of four forms, kept every other client waiting for 13 s."""


def _prompt_form(prompt: Any) -> str:
    """The form of `CompletionRequest.prompt`, by its first entry."""
    first = prompt[0] if isinstance(prompt, list) and prompt else None
    if isinstance(first, list):
        return "a-id-lists"
    return "a-ids" if isinstance(first, int) else "a-texts" if isinstance(prompt, list) else "a-text"


def _text_or_parts(content: Any) -> str:
    return "a-parts" if isinstance(content, list) else "a-text"


Prompt = Annotated[
    Annotated[Text, Tag("a-text")]
    | Annotated[TokenIds, Tag("a-ids")]
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_LIST, fail_fast=True), Tag("a-texts")]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_LIST, fail_fast=True), Tag("a-id-lists")],
    Discriminator(_prompt_form),
]


class _StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, values: Any) -> Any:
        """Without unknown fields that are null, false or empty: clients send those of other services along."""
        if not isinstance(values, dict):
            return values
        return {
            name: value
            for name, value in values.items()
            if name in cls.model_fields or not (value is None or value is False or value in ("", [], {}))
        }


class TextPart(_StrictModel):
    type: Literal["text"]
    text: Text


class ChatMessage(_StrictModel):
    """name: accepted and ignored, and so is the assistant's reasoning, which chat templates leave out of earlier turns.

    content: None, or none at all, of an assistant who said nothing."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: (
        Annotated[
            Annotated[Text, Tag("a-text")]
            | Annotated[list[TextPart], Field(max_length=100, fail_fast=True), Tag("a-parts")],
            Discriminator(_text_or_parts),
        ]
        | None
    ) = None
    name: str | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None

    @model_validator(mode="after")
    def _only_the_assistant_says_nothing(self) -> ChatMessage:
        if self.content is None and self.role != "assistant":
            raise ValueError("content: expected a text")
        if self.role != "assistant" and (self.reasoning_content or self.reasoning):
            raise ValueError("reasoning_content: only the assistant reasons")
        return self

    def to_dict(self) -> dict[str, str]:
        said = self.content or ""
        text = said if isinstance(said, str) else "".join(part.text for part in said)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


Messages = Annotated[list[ChatMessage], Field(max_length=MAX_LIST, fail_fast=True)]


class StreamOptions(_StrictModel):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class SamplingParams(_StrictModel):
    """Fields of chat, completions and comparisons alike. reward, kl: this service's own (see generation.py)."""

    max_tokens: int | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1_000_000)] | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    length_penalty: float | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=4, fail_fast=True)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, Any] | None = None
    user: str | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    reward: bool | ModelName = False
    kl: bool = False

    UNSUPPORTED: ClassVar[tuple[str, ...]] = ("presence_penalty", "frequency_penalty", "logit_bias", "min_p")
    """Fields that would change the response; anything but their neutral value is refused."""

    def unsupported(self) -> Iterator[str]:
        yield from (name for name in self.UNSUPPORTED if getattr(self, name))
        yield from (n for n in ("repetition_penalty", "length_penalty") if getattr(self, n) not in (None, 1.0))

    @property
    def wants_stream(self) -> bool:
        return bool(self.stream)

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def requested_max_tokens(self) -> int | None:
        return self.max_tokens

    def to_generation_request(
        self, limits: LimitsConfig, models: tuple[str, ...], prompts: tuple[dict[str, Any], ...]
    ) -> GenerationRequest:
        """ApiError for a value beyond the limits of the service, or a field that it does not support."""
        for name in self.unsupported():
            raise ApiError(400, f"{name} is not supported by this service.", "unsupported_parameter", name)
        if self.stream_options is not None and not self.wants_stream:
            raise ApiError(400, "stream_options needs stream: true.", "invalid_value", "stream_options")
        max_tokens, n = self.requested_max_tokens(), self.n or 1
        _check_range("max_tokens", max_tokens, limits.max_tokens)
        _check_range("n", n, limits.max_n)
        asked = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        stop_strings = tuple(stop for stop in asked if stop)  # an empty one would stop everything, or nothing
        return GenerationRequest(
            models=models,
            prompts=prompts,
            n=n,
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else max(self.temperature, 0.01 if self.temperature else 0.0),
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(self.top_k or 0, 0),  # vLLM's name for all tokens is -1
            seed=self.seed,
            stop_strings=stop_strings,
            reward=self.reward,
            kl=self.kl,
        )


class ChatRequest(SamplingParams):
    model: ModelName
    messages: Annotated[Messages, Field(min_length=1)]
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

    def requested_max_tokens(self) -> int | None:
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise ApiError(400, "Give max_completion_tokens or max_tokens, not both.", "invalid_value", "max_tokens")
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(SamplingParams):
    model: ModelName
    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    def unsupported(self) -> Iterator[str]:
        yield from super().unsupported()
        yield from (n for n in ("logprobs", "echo") if getattr(self, n) and self.wants_stream)
        if self.suffix:
            yield "suffix"
        if self.best_of not in (None, self.n or 1):
            yield "best_of"

    def to_generation_request(
        self, limits: LimitsConfig, models: tuple[str, ...], prompts: tuple[dict[str, Any], ...]
    ) -> GenerationRequest:
        """See SamplingParams. With `echo` max_tokens may be 0: only the prompt is asked about."""
        only_prompt = bool(self.echo) and self.max_tokens == 0
        values = self.model_copy(update={"max_tokens": 1}) if only_prompt else self
        request = super(CompletionRequest, values).to_generation_request(limits, models, prompts)
        return replace(
            request,
            max_tokens=0 if only_prompt else request.max_tokens,
            logprobs=self.logprobs is not None,
            top_logprobs=self.logprobs or 0,
            echo=bool(self.echo),
        )

    def prompts(self) -> tuple[dict[str, Any], ...]:
        """Texts go without the adapter's template, as in OpenAI's API."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return ({"raw": prompt},)
        if isinstance(prompt[0], int):
            return ({"ids": prompt},)
        return tuple({"raw": p} if isinstance(p, str) else {"ids": p} for p in prompt)


class CompareRequest(SamplingParams):
    """One prompt through several models, under the same random numbers."""

    models: Annotated[list[ModelName], Field(min_length=1, max_length=MAX_LIST, fail_fast=True)]
    prompt: Text | None = None
    messages: Messages | None = None


class PreferenceRequest(_StrictModel):
    """Which response is better. comparison: id of the response of /v1/compare, if they come from one."""

    prompt: Text | None = None
    messages: Messages | None = None
    chosen: Text
    rejected: Text
    chosen_model: ModelName | None = None
    rejected_model: ModelName | None = None
    comparison: Annotated[str, Field(max_length=64)] | None = None


def to_prompt(prompt: str | None, messages: list[ChatMessage] | None, limits: LimitsConfig) -> dict[str, Any]:
    """One of the two, as a prompt of a GenerationRequest. A conversation of one user turn is its text."""
    if (prompt is None) == (messages is None):
        raise ApiError(422, "Give exactly one of prompt and messages.", "invalid_value", "prompt")
    if messages is None:
        return {"text": prompt}
    _check_range("messages", len(messages), limits.max_messages)
    turns = [message.to_dict() for message in messages]
    if not turns or turns[-1]["role"] == "assistant":
        raise ApiError(
            422, "The last message must be one to be answered, not the assistant's.", "invalid_value", "messages"
        )
    return {"text": turns[0]["content"]} if len(turns) == 1 and turns[0]["role"] == "user" else {"messages": turns}


def _check_range(name: str, value: int | None, maximum: int) -> None:
    if value is not None and not 1 <= value <= maximum:
        raise ApiError(
            422,
            f"{name}: expected 1 to {maximum}; got {value if abs(value) < 10**12 else 'more'}.",
            "invalid_value",
            name,
        )
