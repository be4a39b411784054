"""After a reset the reference is the adapter named: a scorer of its own loads it, verifies it by hash and echoes what it holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_ray.batches import Rollout, Scores
from rlhf_ray.config import PPOConfig
from rlhf_ray.data.collate import prompt_batch
from rlhf_ray.data.prompts import Prompt
from rlhf_ray.data.records import Row
from rlhf_ray.errors import InvariantError
from rlhf_ray.models.adapters import adapter_parameters
from rlhf_ray.ppo.actors import build_generator, build_scorer
from rlhf_ray.roles.generator import ActiveAdapter, Decoding
from rlhf_ray.roles.scorer import Scorer
from rlhf_ray.storage.files import sha256_tensors


@pytest.fixture
def job(tiny_llama: Callable[..., Path], tmp_path: Path) -> PPOConfig:
    (tmp_path / "f.py").write_text("def score(completions, **_):\n    return [0.0 for _ in completions]\n")
    return PPOConfig(
        output_dir="x",
        model_name_or_path=str(tiny_llama()),
        template="none",
        data={"train": "prompts.jsonl"},
        rewards=[{"function": f"{tmp_path}/f.py:score"}],
        lora={"r": 4, "lora_alpha": 8},
        placement="split",
        ref_model_sync_steps=2,
    )


@pytest.fixture
def scorer(job: PPOConfig) -> Scorer:
    """As an actor builds it."""
    return build_scorer(job, num_gpus=0.0)


def named(scorer: Scorer, version: int) -> tuple[ActiveAdapter, dict[str, Any]]:
    """A published policy of random weights, as it comes out of the object store."""
    assert scorer.synced is not None
    noise = torch.Generator().manual_seed(version)
    tensors = {k: torch.randn(t.shape, generator=noise) * 0.3 for k, t in scorer.synced.tensors().items()}
    return ActiveAdapter("policy", version, sha256_tensors(tensors)), {k: t.numpy() for k, t in tensors.items()}


def sampled(job: PPOConfig, adapter: ActiveAdapter, tensors: dict[str, Any]) -> Rollout:
    prompts = prompt_batch([[1, 40, 41], [1, 50]], [0, 1], [6, 6], 0)
    return build_generator(job, num_gpus=0.0).generate_with(prompts, adapter, tensors, Decoding((2,)), "rollout", 1)


def scored(scorer: Scorer, rollout: Rollout, adapter: ActiveAdapter, tensors: dict[str, Any]) -> Scores:
    return scorer.score_with(rollout, ROWS, 1.0, adapter, tensors)


ROWS = [Row(f"f:{i}", Prompt("x")) for i in range(2)]


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def test_it_scores_against_the_policy_named_and_measures_the_start_beside_it(job: PPOConfig, scorer: Scorer) -> None:
    """A generator's own log-probabilities under an adapter are those of a scorer whose reference is that adapter."""
    for version in (1, 2, 1):
        adapter, tensors = named(scorer, version)
        rollout = sampled(job, adapter, tensors)
        scores = scored(scorer, rollout, adapter, tensors)
        assert gap(scores.ref_logprobs, rollout.sample_logprobs) < 1e-5
        assert scores.reference_sha256 == adapter.sha256
        plain = scorer.score_at(rollout, ROWS, 1.0)
        assert plain.reference_sha256 == "" and plain.start_logprobs is None
        assert torch.equal(scores.start, plain.ref_logprobs), "the start stays what it was"
        assert gap(scores.start, scores.ref_logprobs) > 0.01
    scored(scorer, rollout, adapter, {})  # it has it already: nothing to load from


def test_another_adapter_under_the_name_is_refused(job: PPOConfig, scorer: Scorer) -> None:
    (first, tensors), (second, others) = named(scorer, 1), named(scorer, 2)
    rollout = sampled(job, first, tensors)
    with pytest.raises(InvariantError, match=f"expected sha256 {first.sha256}; got sha256 {second.sha256}"):
        scored(scorer, rollout, first, others)
    assert scored(scorer, rollout, first, tensors).reference_sha256 == first.sha256


def test_weights_that_change_after_loading_are_echoed(job: PPOConfig, scorer: Scorer) -> None:
    adapter, tensors = named(scorer, 1)
    rollout = sampled(job, adapter, tensors)
    scored(scorer, rollout, adapter, tensors)
    assert scorer.synced is not None
    with torch.no_grad():
        next(iter(adapter_parameters(scorer.synced.model, scorer.synced.name).values())).mul_(1.5)
    found = scored(scorer, rollout, adapter, tensors).reference_sha256
    assert found == sha256_tensors(scorer.synced.tensors()) != adapter.sha256


def test_a_scorer_beside_the_learner_does_not_score_against_what_it_was_not_given(
    job: PPOConfig, scorer: Scorer
) -> None:
    adapter, tensors = named(scorer, 1)
    rollout = sampled(job, adapter, tensors)
    start = "expected sha256 .*; got the policy that the run started from"
    with pytest.raises(InvariantError, match=f"scorer: replies were scored against another reference; {start}"):
        scorer.score(rollout, ROWS, adapter)
