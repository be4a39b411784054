"""What a request asks of the sampler beside its prompt: from its fields to those of a DecodeRequest, checked against the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_ray.models.backbone import Backbone
from rlhf_ray.sampler.logits import NOTHING, LogitsOptions
from rlhf_ray.serve.api_errors import ApiError
from rlhf_ray.serve.generation import GenerationRequest, ServedModel
from rlhf_ray.serve.structured import JsonGrammar, SchemaCompiler
from rlhf_ray.serve.tool_calls import MARKERS, tool_format


@dataclass(frozen=True)
class DecodeOptions:
    """decode: fields of every DecodeRequest of one request.   tool_format: how the model writes tool calls, if they are asked for.
    spoken: special tokens that are part of the reply's text, since they mark its tool calls."""

    decode: Mapping[str, Any] = field(default_factory=dict)
    tool_format: str | None = None
    spoken: Mapping[int, str] = field(default_factory=dict)


class DecodeOptionsReader:
    """For one base.   tool_call_parser: of the configuration (see `ServeConfig`)."""

    def __init__(self, backbone: Backbone, tool_call_parser: str) -> None:
        self._tokenizer, self._parser = backbone.tokenizer, tool_call_parser
        self._vocabulary = int(backbone.model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
        self._compiler = SchemaCompiler(backbone.tokenizer, self._vocabulary)

    async def read(self, request: GenerationRequest, served: Sequence[ServedModel]) -> DecodeOptions:
        """ApiError for what this model cannot do."""
        self._check_ids(request)
        grammar = None if request.schema is None else await self._grammar(request, served)
        logits = LogitsOptions(
            request.presence_penalty,
            request.frequency_penalty,
            request.repetition_penalty,
            request.logit_bias,
            request.min_tokens,
            grammar,
        )
        decode = {
            "min_p": request.min_p,
            "logits": None if logits == NOTHING else logits,
            "raw_logprobs": True,
            "top_logprobs": request.top_logprobs
            if request.logprobs and (request.echo_first or not request.echo)
            else 0,
        }
        if not request.calls_tools:
            return DecodeOptions(decode)
        written = tool_format(str(self._tokenizer.chat_template or "")) if self._parser == "auto" else self._parser
        if written is None:
            message = (
                "tools: the form in which this model writes tool calls is not known; set tool_call_parser in the"
                " service's configuration, or give tool_choice: none."
            )
            raise ApiError(400, message, "unsupported_parameter", "tools")
        added = self._tokenizer.added_tokens_decoder.items()
        return DecodeOptions(
            decode, written, {i: t.content for i, t in added if t.special and t.content in MARKERS[written]}
        )

    async def _grammar(self, request: GenerationRequest, served: Sequence[ServedModel]) -> JsonGrammar:
        assert request.schema is not None
        for name in ("ignore_eos", "min_tokens"):
            if getattr(request, name):
                message = f"{name} and response_format exclude each other: a reply ends where its JSON is complete."
                raise ApiError(400, message, "invalid_value", name)
        if not all(model.stop_ids for model in served):
            message = "response_format needs a model that ends its replies by itself."
            raise ApiError(400, message, "unsupported_parameter", "response_format")
        return await self._compiler.compile(request.schema)

    def _check_ids(self, request: GenerationRequest) -> None:
        for name, ids in (
            ("logit_bias", [i for i, _ in request.logit_bias]),
            ("stop_token_ids", request.stop_token_ids),
        ):
            if any(i >= self._vocabulary for i in ids):
                message = f"{name}: a token id is not in the vocabulary of {self._vocabulary}."
                raise ApiError(400, message, "invalid_token", name)
        if request.min_tokens and len(set(request.stop_token_ids)) + 8 >= self._vocabulary:
            message = "stop_token_ids: with min_tokens, no token would be left to begin with."
            raise ApiError(400, message, "invalid_value", "stop_token_ids")
