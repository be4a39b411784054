"""A generation request as it crosses from the API to a replica, what a replica makes of it, and the events that come back.

Lists of events come back, each a dict:
    {"start": {prompt_tokens, adapters: {model: {id, sha256, fingerprint}}}}     first; tool_format with calls_tools
    {"i": choice, "text": "...",
     "tokens": [[text, log-probability], ...], "bytes": [[...], ...],            only where log-probabilities are requested
     "top": [[[text, log-probability, bytes], ...], ...]}                        only with top_logprobs: the likeliest at each place
    {"i": choice, "end": "stop" or "length", "completion_tokens", "reward", "kl",    last of a choice
     "prompt_text",                                                              only with echo, not in a stream
     "listed": [[text, log-probability or None, {text: log-probability}], ...],    of the whole sequence
     "prompt_logprobs": [None, {id: {logprob, rank, decoded_token}}, ...],       only if requested
     "mean_logprob"}                                                             only if ranked: nats per token decoded
    {"error": {...}}                                                            last of all
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # the API's process sends requests, and has no model: it must not import torch
    from rlhf_ray.data.templates import Template
    from rlhf_ray.serve.adapter_cache import CachedAdapter
    from rlhf_ray.serve.model_index import ModelCheckpoint
    from rlhf_ray.serve.response_text import ResponseText

Event = dict[str, Any]


@dataclass(frozen=True)
class GenerationRequest:
    """prompts: each {text, input} or {messages}, either with {tools, template_kwargs} as JSON, {raw} (text without template; bare:
    nor bos) or {ids}.   models: names; more than one compares
    them on one prompt, under the same random numbers.   n: responses of each.   temperature: 0 is greedy.   seed: None draws one.

    logprobs: of the model itself, at temperature 1, before penalties, bias, masks and truncation (vLLM's `raw_logprobs`).
    top_logprobs: likeliest tokens to be listed at each place.  echo: the prompt is part of the text, and of what is listed.
    echo_first: it comes before the reply, as text and tokens of the first event, and not at the end (a stream).
    prompt_logprobs: likeliest tokens to be listed at each place of the prompt; None lists nothing.
    penalties, logit_bias, min_tokens, min_p: see sampler/logits.py.  ignore_eos: go on behind the model's own end of a reply.
    stop_token_ids: tokens that end a reply, and are not part of it.  schema: JSON schema, as text, that the reply must follow.
    calls_tools: replies may hold tool calls, in the model's own form.  ranked: the client wants the likeliest replies.
    reward: name of a reward adapter, True for the default one.  kl: also nats between the adapter and the base, over the response.
    key: name of the API key that asks; rows wait by turns of keys.
    Choices are numbered by prompt, then model, then sample."""

    models: tuple[str, ...]
    prompts: tuple[Mapping[str, Any], ...]
    n: int = 1
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    stop_strings: tuple[str, ...] = ()
    logprobs: bool = False
    top_logprobs: int = 0
    echo: bool = False
    echo_first: bool = False
    prompt_logprobs: int | None = None
    schema: str | None = None
    calls_tools: bool = False
    ranked: bool = False
    reward: str | bool = False
    kl: bool = False
    key: str = ""

    @property
    def reads_again(self) -> bool:
        """What it wants to know of tokens comes from a pass over the whole sequence, once that is written."""
        return (self.logprobs and self.echo) or self.prompt_logprobs is not None

    @property
    def rows(self) -> int:
        """Rows of a batch that it takes: one for each choice."""
        return len(self.prompts) * len(self.models) * self.n


@dataclass(frozen=True)
class ServedModel:
    """A model that a request names, in memory. model: as it was named.  cached: None for the base, adapters off."""

    model: str
    id: str
    sha256: str
    template: Template
    stop_ids: tuple[int, ...]
    cached: CachedAdapter[ModelCheckpoint] | None = None


@dataclass(eq=False)
class Generation:
    """One response being written. response_ids: every token decoded.  logprobs: theirs, nats.  end: None while it goes on.
    top: (id, log-probability) of the likeliest tokens at each place, if they are listed.
    stop_ids: the request's own, beside those that end a response of the model."""

    index: int
    served: ServedModel
    prompt: Mapping[str, Any]
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    text: ResponseText
    response_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    end: Literal["stop", "length"] | None = None
    stop_ids: tuple[int, ...] = ()

    @property
    def shown(self) -> int:
        """How many of `response_ids` no stop string hid. What the model itself ended with counts, though it is no text."""
        if self.text.stopped:
            self.text.settle()
            return len(self.text.tokens)
        own_end = self.end != "stop" or self.response_ids[-1] in self.served.stop_ids
        return len(self.response_ids) - (0 if own_end else 1)
