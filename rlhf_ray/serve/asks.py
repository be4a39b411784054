"""A request as it crosses from the API to a replica: plain, checked data; and what comes back.

Back come lists of events, each a dict:
    {"start": {prompt_tokens, adapters: {model: {id, sha256, fingerprint}}}}     first
    {"i": choice, "text": "...", "tokens": [[text, log-probability], ...]}      tokens only where log-probabilities were asked for
    {"i": choice, "end": "stop" or "length", "completion_tokens", "reward", "kl"}    last of a choice
    {"error": {...}}                                                            last of all
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


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
