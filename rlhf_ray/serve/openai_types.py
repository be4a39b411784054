"""Requests of the OpenAI API as this service accepts them, with the fields that vLLM adds, in vLLM's meaning.

Unknown fields are refused, and so are fields that would change the response but are not supported; `user`, `store`, `metadata` and
the like, which change nothing, are accepted and ignored. So is any field that is null, empty or neutral, known or not: it asks for
nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from rlhf_ray.config.serve import LimitsConfig
from rlhf_ray.serve.api_errors import ApiError
from rlhf_ray.serve.generation import GenerationRequest
from rlhf_ray.serve.openai_messages import (
    MAX_LIST,
    ChatMessage,
    Messages,
    NamedTool,
    ResponseFormat,
    StrictModel,
    Text,
    Tool,
    calls_schema,
)

ModelName = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
StopString = Annotated[str, Field(max_length=256)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]


def _prompt_form(prompt: Any) -> str:
    """The form of `CompletionRequest.prompt`, by its first entry."""
    first = prompt[0] if isinstance(prompt, list) and prompt else None
    if isinstance(first, list):
        return "a-id-lists"
    return "a-ids" if isinstance(first, int) else "a-texts" if isinstance(prompt, list) else "a-text"


Prompt = Annotated[
    Annotated[Text, Tag("a-text")]
    | Annotated[TokenIds, Tag("a-ids")]
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_LIST, fail_fast=True), Tag("a-texts")]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_LIST, fail_fast=True), Tag("a-id-lists")],
    Discriminator(_prompt_form),
]


class StreamOptions(StrictModel):
    include_usage: bool = False
    include_obfuscation: bool | None = None


Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenIdText = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")]


class SamplingParams(StrictModel):
    """Fields of chat, completions and comparisons alike. reward, kl: this service's own (see generation.py)."""

    max_tokens: int | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1_000_000)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    length_penalty: float | None = None
    logit_bias: Annotated[dict[TokenIdText, Bias], Field(max_length=1024)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=4, fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=256, fail_fast=True)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    skip_special_tokens: Literal[True] | None = None
    user: str | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    reward: bool | ModelName = False
    kl: bool = False

    def unsupported(self) -> Iterator[str]:
        """Fields that would change the response; anything but their neutral value is refused."""
        if self.length_penalty not in (None, 1.0):
            yield "length_penalty"
        if self.prompt_logprobs is not None and self.wants_stream:
            yield "prompt_logprobs"

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
            raise ApiError(400, f"{name} is not supported here.", "unsupported_parameter", name)
        if self.stream_options is not None and not self.wants_stream:
            raise ApiError(400, "stream_options needs stream: true.", "invalid_value", "stream_options")
        max_tokens, n, min_tokens = self.requested_max_tokens(), self.n or 1, self.min_tokens or 0
        _check_range("max_tokens", max_tokens, limits.max_tokens)
        _check_range("n", n, limits.max_n)
        most = limits.max_tokens if max_tokens is None else max_tokens
        if min_tokens > most:
            message = f"min_tokens: expected at most max_tokens, {most}; got {min(min_tokens, 10**12)}."
            raise ApiError(400, message, "invalid_value", "min_tokens")
        if max_tokens is None and min_tokens > limits.default_max_tokens:
            max_tokens = min_tokens
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
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            logit_bias=tuple((int(i), bias) for i, bias in (self.logit_bias or {}).items()),
            min_tokens=min_tokens,
            ignore_eos=bool(self.ignore_eos),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            seed=self.seed,
            stop_strings=stop_strings,
            prompt_logprobs=self.prompt_logprobs,
            schema=None if self.response_format is None else self.response_format.schema_text(),
            reward=self.reward,
            kl=self.kl,
        )


class ChatRequest(SamplingParams):
    model: ModelName
    messages: Annotated[Messages, Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=32)] | None = None
    add_generation_prompt: Literal[True] | None = None
    functions: list[Any] | None = None
    function_call: Any = None
    parallel_tool_calls: bool | None = None
    modalities: list[str] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None

    @model_validator(mode="after")
    def _tools_fit(self) -> ChatRequest:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) != len(names):
            raise ValueError("tools: a name stands there twice")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError("tool_choice: expected the name of one of the tools")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice: required needs tools")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs: true")
        return self

    def unsupported(self) -> Iterator[str]:
        yield from super().unsupported()
        yield from (n for n in ("functions", "reasoning_effort", "verbosity") if getattr(self, n))
        if self.modalities not in (None, ["text"]):
            yield "modalities"
        if self.tool_choice not in (None, "none", "auto") and self.response_format is not None:
            yield "response_format"

    def requested_max_tokens(self) -> int | None:
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise ApiError(400, "Give max_completion_tokens or max_tokens, not both.", "invalid_value", "max_tokens")
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def prompt(self, limits: LimitsConfig) -> dict[str, Any]:
        tools = None if self.tool_choice == "none" else self.tools
        return prompt_of_chat(self.messages, tools, self.chat_template_kwargs, limits)

    @property
    def calls(self) -> str:
        """How tool calls are read from the reply: "" not at all, "auto" as the model writes them, "required" as a JSON list, or
        "named:NAME" as the arguments of one function."""
        if not self.tools or self.tool_choice == "none":
            return ""
        if isinstance(self.tool_choice, NamedTool):
            return f"named:{self.tool_choice.function.name}"
        return self.tool_choice or "auto"

    def to_generation_request(
        self, limits: LimitsConfig, models: tuple[str, ...], prompts: tuple[dict[str, Any], ...]
    ) -> GenerationRequest:
        """See SamplingParams. A tool that must be called is a schema that the reply must follow."""
        request = super().to_generation_request(limits, models, prompts)
        schema = request.schema
        if self.calls == "required":
            schema = calls_schema(self.tools or [], 1 if self.parallel_tool_calls is False else None)
        elif isinstance(self.tool_choice, NamedTool) and self.tools:
            (chosen,) = (t for t in self.tools if t.function.name == self.tool_choice.function.name)
            schema = json.dumps(chosen.function.parameters or {"type": "object"})
        return replace(
            request,
            logprobs=bool(self.logprobs),
            top_logprobs=self.top_logprobs or 0,
            schema=schema,
            calls_tools=self.calls == "auto",
        )


class CompletionRequest(SamplingParams):
    model: ModelName
    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    suffix: str | None = None
    add_special_tokens: Literal[True] | None = None

    def unsupported(self) -> Iterator[str]:
        yield from super().unsupported()
        if self.best_of not in (None, self.n or 1) and self.wants_stream:
            yield "best_of"
        if self.suffix:
            yield "suffix"

    def to_generation_request(
        self, limits: LimitsConfig, models: tuple[str, ...], prompts: tuple[dict[str, Any], ...]
    ) -> GenerationRequest:
        """See SamplingParams. With `echo` or `prompt_logprobs` max_tokens may be 0: only the prompt is asked about."""
        only_prompt = (bool(self.echo) or self.prompt_logprobs is not None) and self.max_tokens == 0
        values = self.model_copy(update={"max_tokens": 1}) if only_prompt else self
        request = super(CompletionRequest, values).to_generation_request(limits, models, prompts)
        _check_range("best_of", self.best_of, limits.max_n)
        if self.best_of is not None and self.best_of < request.n:
            message = f"best_of: expected at least n, {request.n}; got {self.best_of}."
            raise ApiError(400, message, "invalid_value", "best_of")
        return replace(
            request,
            n=self.best_of or request.n,
            ranked=self.best_of not in (None, request.n),
            max_tokens=0 if only_prompt else request.max_tokens,
            logprobs=self.logprobs is not None,
            top_logprobs=self.logprobs or 0,
            echo=bool(self.echo),
            echo_first=bool(self.echo) and self.wants_stream,
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


class PreferenceRequest(StrictModel):
    """Which response is better. comparison: id of the response of /v1/compare, if they come from one.

    verdict: "tie" and "both_bad" say that neither is; no reward can be learnt from that, so it is kept apart."""

    prompt: Text | None = None
    messages: Messages | None = None
    chosen: Text
    rejected: Text
    chosen_model: ModelName | None = None
    rejected_model: ModelName | None = None
    comparison: Annotated[str, Field(max_length=64)] | None = None
    verdict: Literal["better", "tie", "both_bad"] = "better"


class TokenizeRequest(StrictModel):
    """A text or a conversation. add_special_tokens: of a text; a conversation has those of its template."""

    model: ModelName | None = None
    prompt: Text | None = None
    messages: Annotated[Messages, Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: Literal[True] | None = None
    return_token_strs: bool | None = None
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=32)] | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("Give exactly one of prompt and messages")
        if self.messages is not None and self.add_special_tokens is not None:
            raise ValueError("add_special_tokens: only of a prompt")
        return self


class DetokenizeRequest(StrictModel):
    model: ModelName | None = None
    tokens: Annotated[list[TokenId], Field(max_length=200_000, fail_fast=True)]


def to_prompt(prompt: str | None, messages: list[ChatMessage] | None, limits: LimitsConfig) -> dict[str, Any]:
    """One of the two, as a prompt of a GenerationRequest. A conversation of one user turn is its text."""
    if (prompt is None) == (messages is None):
        raise ApiError(400, "Give exactly one of prompt and messages.", "invalid_value", "prompt")
    if messages is None:
        return {"text": prompt}
    _check_range("messages", len(messages), limits.max_messages)
    turns = [message.to_dict() for message in messages]
    if not turns or turns[-1]["role"] == "assistant":
        raise ApiError(
            400, "The last message must be one to be answered, not the assistant's.", "invalid_value", "messages"
        )
    return {"text": turns[0]["content"]} if len(turns) == 1 and turns[0]["role"] == "user" else {"messages": turns}


def prompt_of_chat(
    messages: list[ChatMessage], tools: list[Tool] | None, template_kwargs: dict[str, Any] | None, limits: LimitsConfig
) -> dict[str, Any]:
    """A conversation as a prompt of a GenerationRequest, with what the chat template is given beside it."""
    prompt = to_prompt(None, messages, limits)
    if tools:
        prompt["tools"] = json.dumps([tool.to_dict() for tool in tools], sort_keys=True)
    if template_kwargs:
        prompt["template_kwargs"] = json.dumps(template_kwargs, sort_keys=True)
    return prompt


def _check_range(name: str, value: int | None, maximum: int) -> None:
    if value is not None and not 1 <= value <= maximum:
        raise ApiError(
            400,
            f"{name}: expected 1 to {maximum}; got {value if abs(value) < 10**12 else 'more'}.",
            "invalid_value",
            name,
        )
