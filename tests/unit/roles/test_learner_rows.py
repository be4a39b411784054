"""The learner's passes over rows of unequal lengths: gradients do not depend on how rows are laid out, ordered and cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_ray.batches import Experience, Rollout
from rlhf_ray.config import PPOConfig
from rlhf_ray.console import NullConsole
from rlhf_ray.models.adapters import adapter_parameters, load_adapter_tensors
from rlhf_ray.models.assembly import Assembly
from rlhf_ray.roles.experience import Evaluation
from rlhf_ray.roles.guards import Guards
from rlhf_ray.roles.learner import Learner, UpdateStats
from rlhf_ray.roles.optimizer_state import export_state
from rlhf_ray.runtime.session import process_session

RATES = {"policy": 1e-3, "value": 1e-3}
PROMPTS, REPLIES = [7, 1, 3, 2, 7, 5, 1, 4], [1, 9, 4, 9, 2, 3, 6, 9]
WIDTHS = max(PROMPTS), max(REPLIES)
REAL = sum(PROMPTS) + sum(REPLIES)


@pytest.fixture
def job(tiny_llama: Callable[..., Path], tmp_path: Path) -> Callable[..., PPOConfig]:
    base, prompts = str(tiny_llama()), tmp_path / "rows.jsonl"
    prompts.write_text('{"instruction": "say", "output": "it"}\n' * 8)

    def make(**changes: Any) -> PPOConfig:
        common: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "model_name_or_path": base,
            "data": {"train": str(prompts)},
            "rewards": [{"name": "r", "function": "x.py:f"}],
            "lora": {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"},
            "learner": {"num_workers": 0},
            "rollout_batch_size": 8,
            "num_mini_batches": 1,
            "num_ppo_epochs": 1,
            "max_grad_norm": 1e6,
            "max_steps": 1,
            "template": "none",
        }
        return PPOConfig(**{**common, **changes})

    return make


def models(config: PPOConfig) -> Assembly:
    """Policy and value model, neither adapter zero."""
    assembly = Assembly(config, torch.device("cpu"), config.seed, None)
    assembly.add_trained_policy(None, config.lora, with_reference=False)
    assembly.add_value("policy", config.value.adapter, config.value.lora)
    noise, model = torch.Generator().manual_seed(5), assembly.stacks["base"].peft
    for name in ("policy", "value") if config.value.adapter == "own" else ("policy",):
        shapes = {k: p.shape for k, p in adapter_parameters(model, name).items()}
        load_adapter_tensors(model, name, {k: torch.randn(s, generator=noise) * 0.1 for k, s in shapes.items()})
    return assembly


def rollout() -> Rollout:
    noise, (p, r) = torch.Generator().manual_seed(6), WIDTHS
    prompts = torch.arange(p)[None] >= p - torch.tensor(PROMPTS)[:, None]
    replies = torch.arange(r)[None] < torch.tensor(REPLIES)[:, None]
    tokens = torch.randint(3, 200, (8, p + r), generator=noise)
    said, finished = torch.where(replies, -5.0, 0.0), torch.ones(8, dtype=torch.bool)
    return Rollout(tokens, prompts, replies, said, finished, torch.arange(8))


def learnt(config: PPOConfig) -> tuple[Evaluation, dict[str, Tensor], UpdateStats]:
    """What the learner says of the rollout; the gradients of one optimizer step (a tenth of them is Adam's first mean)."""
    sampled, noise = rollout(), torch.Generator().manual_seed(7)
    learner = Learner(models(config).finish(), config, process_session(NullConsole(), 1))
    with torch.no_grad():
        learner.models.head_of("value").weight.normal_(std=0.1, generator=torch.Generator().manual_seed(8))
    found = learner.evaluate(sampled, 1)
    assert found.values is not None
    random = [torch.where(sampled.response_mask, torch.randn(8, 9, generator=noise), 0.0) for _ in range(2)]
    masks = sampled.tokens, sampled.prompt_mask, sampled.response_mask
    experience = Experience(*masks, found.logprobs, torch.zeros(8, 9), found.values, *random)
    stats = learner.update(experience, 1, RATES, 0.0, Guards())
    state = export_state(learner.engine)
    return found, {k: 10 * v for k, v in state.items() if k.endswith("::exp_avg")}, stats


WAYS: dict[str, dict[str, Any]] = {
    "one pass": {"per_device_train_batch_size": 8},
    "pairs": {"per_device_train_batch_size": 2},
    "threes": {"per_device_train_batch_size": 3},
    "budget of the longest row": {"tokens_per_microbatch": 11},
    "budget": {"tokens_per_microbatch": 30},
    "less than any row": {"tokens_per_microbatch": 1},
    "side by side": {"per_device_train_batch_size": 3, "defaults_version": 3},
    "older runs": {"per_device_train_batch_size": 3, "defaults_version": 2},
}
JOBS: dict[str, dict[str, Any]] = {
    "own": {"entropy_coef": 0.1},
    "shared trunk": {"value": {"adapter": "shared"}},
    "zero 2": {"learner": {"num_workers": 0, "zero_stage": 2}},
    "sequence means": {"loss_aggregation": "seq_mean_token_mean"},
    "recomputed": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("name", JOBS)
def test_layout_order_and_cuts_change_no_gradient(job: Callable[..., PPOConfig], name: str) -> None:
    """Each way against rows that go through the model one by one; the first ratio is exactly 1 in all of them."""
    expected, gradients, _ = learnt(job(per_device_train_batch_size=1, **JOBS[name]))
    assert max(float(g.abs().max()) for g in gradients.values()) > 1e-2
    for way, fields in WAYS.items():
        found, others, stats = learnt(job(**fields, **JOBS[name]))
        torch.testing.assert_close(found.logprobs, expected.logprobs, atol=2e-6, rtol=2e-6, msg=way)
        torch.testing.assert_close(found.values, expected.values, atol=2e-6, rtol=2e-6, msg=way)
        torch.testing.assert_close(found.bootstrap, expected.bootstrap, atol=2e-6, rtol=2e-6, msg=way)
        assert others.keys() == gradients.keys()
        for parameter, gradient in gradients.items():
            torch.testing.assert_close(others[parameter], gradient, atol=1e-6, rtol=1e-5, msg=f"{way} {parameter}")
        assert stats.maxima["first_deviation"] == 0.0, way


def computed(config: PPOConfig) -> float:
    return REAL / learnt(config)[2].metrics()["update/real_token_share"]


def test_the_share_of_real_tokens_is_that_of_the_passes_shapes(job: Callable[..., PPOConfig]) -> None:
    """By hand: lengths are 8 10 7 11 9 8 7 13, longest first 13 11 10 9 8 8 7 7."""
    padded = partial(job, defaults_version=3)
    assert computed(padded(per_device_train_batch_size=1)) == pytest.approx(REAL)
    assert computed(padded(per_device_train_batch_size=8)) == pytest.approx(8 * 13)
    assert computed(padded(per_device_train_batch_size=4)) == pytest.approx(4 * 13 + 4 * 8)
    assert computed(padded(tokens_per_microbatch=24)) == pytest.approx(13 + 2 * 11 + 2 * 9 + 3 * 8)
    assert computed(job(per_device_train_batch_size=8)) == computed(job(tokens_per_microbatch=24)) == REAL
    older = job(per_device_train_batch_size=8, defaults_version=2)
    assert "update/real_token_share" not in learnt(older)[2].metrics(), "older runs log what they have logged"


def test_a_value_model_on_a_base_of_its_own_is_counted_as_well(job: Callable[..., PPOConfig]) -> None:
    """The policy's pass is packed, 73 tokens; the value model's is padded, 8 rows of 13: its base has no packing."""
    config, sampled = job(per_device_train_batch_size=8), rollout()
    both, other = models(config).finish(), models(job(defaults_version=3)).finish()
    both.stacks["other"] = other.stacks["base"]
    both.bindings["value"] = replace(both.bindings["value"], stack="other")
    learner, sums = Learner(both, config, process_session(NullConsole(), 1)), dict[str, float]()
    lengths = sampled.attention_mask.sum(dim=1)
    (micro,) = learner._microbatches(torch.arange(8), lengths)
    learner._count_tokens(sums, learner._sequences(sampled, micro), lengths, micro)
    assert sums == {"real_tokens": 2.0 * REAL, "computed_tokens": REAL + 8.0 * 13}
