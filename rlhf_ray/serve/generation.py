"""A generation request as it crosses from the API to a replica: plain, checked data; the replies on their way; and what comes back.

Back come lists of events, each a dict:
    {"start": {prompt_tokens, adapters: {model: {id, sha256, fingerprint}}}}     first
    {"i": choice, "text": "...", "tokens": [[text, log-probability], ...]}      tokens only where log-probabilities were asked for
    {"i": choice, "end": "stop" or "length", "completion_tokens", "reward", "kl"}    last of a choice
    {"error": {...}}                                                            last of all
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # the API's process sends requests, and has no model: it must not import torch
    from rlhf_ray.data.templates import Template
    from rlhf_ray.serve.adapter_cache import CachedAdapter
    from rlhf_ray.serve.model_index import ModelReadout
    from rlhf_ray.serve.text import ResponseText


@dataclass(frozen=True)
class GenerationRequest:
    """prompts: each {text, input}, {messages}, {raw} (text without template) or {ids}.   models: names; more than one compares
    them on one prompt, under the same random numbers.   n: replies of each.   temperature: 0 is greedy.   seed: None draws one.

    reward: name of a reward adapter, True for the default one.  kl: also nats between the adapter and the base, over the reply.
    Choices are numbered by prompt, then model, then sample."""

    models: tuple[str, ...]
    prompts: tuple[Mapping[str, Any], ...]
    n: int = 1
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stops: tuple[str, ...] = ()
    logprobs: bool = False
    reward: str | bool = False
    kl: bool = False

    @property
    def rows(self) -> int:
        return len(self.prompts) * len(self.models) * self.n


@dataclass(frozen=True)
class ServedModel:
    """Who writes a reply. model: as it was asked for.  cached: None for the base, adapters off."""

    model: str
    id: str
    sha256: str
    template: Template
    stop_ids: tuple[int, ...]
    cached: CachedAdapter[ModelReadout] | None = None


@dataclass(eq=False)
class Generation:
    """One reply on its way. room: most tokens it may take."""

    index: int
    served: ServedModel
    prompt: Mapping[str, Any]
    prompt_ids: tuple[int, ...]
    room: int
    text: ResponseText
    response_ids: list[int] = field(default_factory=list)
    logprob: float = 0.0
    end: Literal["stop", "length"] | None = None
