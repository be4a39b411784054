"""The evaluation's generator: which log-probabilities it reports, and that a sampler with another adapter is found out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlhf_ray.batches import PromptBatch, Sequences
from rlhf_ray.errors import InvariantError
from rlhf_ray.models.batching import Batching
from rlhf_ray.roles.checked_generator import CheckedGenerator
from rlhf_ray.roles.generator import ActiveAdapter, Decoding
from rlhf_ray.sampler.requests import DecodeRequest, DecodeResult

LOGPROB = -0.5


class Script:
    """A sampler that replies 5, 6, ... as long as the row's budget, every token at LOGPROB."""

    def run(self, requests: list[DecodeRequest], *_: Any) -> list[DecodeResult]:
        return [
            DecodeResult(tuple(range(5, 5 + r.max_new_tokens)), (LOGPROB,) * r.max_new_tokens, False) for r in requests
        ]


class Models:
    """Log-probabilities of `policy`: the sampler's plus `gap`; notes the widths of every pass."""

    def __init__(self, gap: float) -> None:
        self.gap = gap
        self.passes: list[tuple[int, int]] = []

    def __call__(self, kind: str, role: str, seq: Sequences, temperature: float) -> Any:
        assert (kind, role, temperature) == ("logprobs", "policy_3", 0.7)
        self.passes.append((len(seq.tokens), seq.response_width))
        return torch.where(seq.response_mask, LOGPROB + self.gap, 0.0), None


def generator(models: Models) -> CheckedGenerator:
    return CheckedGenerator(Script(), 0, 0, models, "policy_3", Batching(2), torch.device("cpu"), 1e-3)  # type: ignore[arg-type]


def prompts() -> PromptBatch:
    ids, budgets = torch.tensor([[0, 11], [12, 13], [0, 14]]), torch.tensor([1, 2, 3])
    return PromptBatch(ids, ids != 0, torch.arange(3), budgets)


def test_log_probabilities_are_the_models_own() -> None:
    models = Models(gap=1e-4)
    rollout = generator(models).generate(prompts(), ActiveAdapter("a"), Decoding((2,), 0.7), "evaluate", 0)
    assert models.passes == [(2, 3), (1, 1)]  # the longest two, then the third: each as wide as its longest reply
    mask = rollout.response_mask
    assert mask.sum(dim=1).tolist() == [1, 2, 3]
    assert rollout.sample_logprobs[mask].tolist() == pytest.approx([LOGPROB + 1e-4] * 6)
    assert not rollout.sample_logprobs[~mask].any()


def test_a_sampler_that_used_another_adapter_is_found_out() -> None:
    with pytest.raises(InvariantError, match="disagree"):
        generator(Models(gap=0.01)).generate(prompts(), ActiveAdapter("a"), Decoding((2,), 0.7), "evaluate", 0)
