"""PPO-ptx: the gradient of a step is PPO's plus ptx_coef times that of the mean supervised loss; rows depend on seed and step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_ray.batches import Experience
from rlhf_ray.config import PPOConfig
from rlhf_ray.console import NullConsole
from rlhf_ray.data.collate import IGNORE_INDEX, TokenisedRow
from rlhf_ray.maths.rng import derived_seed, permutation
from rlhf_ray.models.adapters import adapter_parameters, load_adapter_tensors
from rlhf_ray.models.assembly import Assembly
from rlhf_ray.ppo.models import assemble
from rlhf_ray.roles.guards import Guards
from rlhf_ray.roles.learner import Learner
from rlhf_ray.roles.optimizer_state import export_state
from rlhf_ray.roles.ptx import PtxRows
from rlhf_ray.runtime.session import process_session

RATES = {"policy": 1e-3, "value": 1e-3}


def rows(count: int = 11) -> list[TokenisedRow]:
    """Of different lengths; the first third of each is a prompt, which is not learnt."""
    made = []
    for i in range(count):
        ids = [1, *((7 * i + 3 * t) % 200 + 3 for t in range(3 + i % 5))]
        prompt = 1 + len(ids) // 3
        made.append(TokenisedRow(ids, [IGNORE_INDEX] * prompt + ids[prompt:], f"f:{i}"))
    return made


@pytest.fixture
def job(tiny_llama: Callable[..., Path], tmp_path: Path) -> Callable[..., PPOConfig]:
    (tmp_path / "f.py").write_text("def score(completions, **_):\n    return [0.0 for _ in completions]\n")

    def make(**changes: Any) -> PPOConfig:
        fields: dict[str, Any] = {
            "output_dir": str(tmp_path / "x"),
            "model_name_or_path": str(tiny_llama()),
            "template": "none",
            "data": {"train": "prompts.jsonl"},
            "rewards": [{"function": f"{tmp_path}/f.py:score"}],
            "lora": {"r": 4, "lora_alpha": 8},
            "rollout_batch_size": 8,
            "num_mini_batches": 1,
            "num_ppo_epochs": 1,
            "per_device_train_batch_size": 3,
            "max_grad_norm": 1e6,
            "ptx_data": {"train": "sft.jsonl"},
        }
        return PPOConfig(**{**fields, **changes})

    return make


def loaded(config: PPOConfig) -> Assembly:
    """The models, the policy's adapter not zero."""
    assembly, _ = assemble(config, torch.device("cpu"))
    noise, model = torch.Generator().manual_seed(5), assembly.stacks["base"].peft
    shapes = {k: p.shape for k, p in adapter_parameters(model, "policy").items()}
    load_adapter_tensors(model, "policy", {k: torch.randn(s, generator=noise) * 0.1 for k, s in shapes.items()})
    return assembly


def experience() -> Experience:
    noise = torch.Generator().manual_seed(6)
    mask = torch.arange(5)[None] < torch.tensor([5, 2, 4, 1, 5, 3, 2, 5])[:, None]
    tokens = torch.randint(3, 200, (8, 8), generator=noise)
    numbers = [torch.where(mask, torch.randn(8, 5, generator=noise), 0.0) for _ in range(3)]
    prompts = torch.ones(8, 3, dtype=torch.bool)
    return Experience(tokens, prompts, mask, torch.where(mask, -5.0, 0.0), torch.zeros(8, 5), *numbers)


def learnt(config: PPOConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The gradients of one optimizer step (Adam's first mean is a tenth of them) and its metrics."""
    monkeypatch.setattr(Learner, "_check_first_ratio", lambda *_: None)  # the experience is made up
    ptx = PtxRows(rows(), config, 0) if config.ptx_coef else None
    learner = Learner(loaded(config).finish(), config, process_session(NullConsole(), 1), ptx)
    stats = learner.update(experience(), 2, RATES, 0.0, Guards())
    state = export_state(learner.engine)
    return {k.removesuffix("::exp_avg"): 10 * v for k, v in state.items() if k.endswith("::exp_avg")}, stats.metrics()


def of_rows(config: PPOConfig, batch: list[TokenisedRow]) -> tuple[dict[str, Tensor], float]:
    """Gradient and loss of transformers' own language model on these rows, one by one: the mean over all learnt tokens."""
    model = loaded(config).stacks["base"].peft
    model.set_adapter("policy")
    total, tokens = torch.zeros(()), 0
    for row in batch:
        count = sum(label != IGNORE_INDEX for label in row.labels[1:])
        total = total + count * model(torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss
        tokens += count
    parameters = adapter_parameters(model, "policy")
    gradients = torch.autograd.grad(total / tokens, list(parameters.values()))
    return {f"policy.{name}": g for name, g in zip(parameters, gradients)}, float(total.detach() / tokens)


def of_step(config: PPOConfig, step: int) -> list[TokenisedRow]:
    """The rows of a step of one optimizer step, by hand: 8 a step out of permutations of 11, one after the other."""
    seed = derived_seed(config.seed, "ptx")
    order = [i for number in range(3) for i in permutation(seed, 0, number, 11).tolist()]
    return [rows()[i] for i in order[8 * (step - 1) : 8 * step]]


@pytest.mark.parametrize("width", [3, 8])
@pytest.mark.parametrize("stage", [0, 2])
def test_the_gradient_is_ppos_and_the_coefficient_times_that_of_the_mean_loss(
    job: Callable[..., PPOConfig], width: int, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of rows per forward pass; the value model's is untouched."""
    common = {"per_device_train_batch_size": width, "learner": {"num_workers": 0, "zero_stage": stage}}
    alone, before = learnt(job(**common, ptx_data=None), monkeypatch)
    config = job(**common, ptx_coef=0.7)
    mixed, after = learnt(config, monkeypatch)
    supervised, loss = of_rows(config, of_step(config, 2))
    assert max(float(g.norm()) for g in supervised.values()) > 1e-2
    for name, gradient in mixed.items():
        torch.testing.assert_close(gradient, alone[name] + 0.7 * supervised.get(name, 0.0), atol=2e-6, rtol=1e-4)
    assert after["loss/ptx"] == pytest.approx(loss, rel=1e-5) and "loss/ptx" not in before
    assert after["loss/policy"] == pytest.approx(before["loss/policy"], abs=1e-6)


def test_while_the_value_model_warms_up_the_policy_learns_no_rows_either(
    job: Callable[..., PPOConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RATES, "policy", 0.0)
    found, metrics = learnt(job(ptx_coef=0.7), monkeypatch)
    assert not [name for name in found if name.startswith("policy.")] and "loss/ptx" not in metrics


def test_every_row_comes_once_a_pass_in_an_order_of_the_seed(job: Callable[..., PPOConfig]) -> None:
    """By step, epoch and minibatch alone: a run that is resumed, or has ended a step's epochs early, has no cursor to lose."""
    config = job(ptx_coef=1.0, rollout_batch_size=16, num_mini_batches=2, num_ppo_epochs=2)
    ptx = PtxRows(rows(16), config, 0)
    place = [(step, epoch, number) for step in (1, 2) for epoch in (0, 1) for number in (0, 1)]
    batches = [ptx.minibatch(*where) for where in place]
    seen = [[tuple(t[r].tolist()) for t, r in zip(batch.tokens, batch.real)] for batch in batches]
    every = sorted(tuple(row.input_ids) for row in rows(16))
    assert all(sorted(seen[i] + seen[i + 1]) == every for i in (0, 2, 4, 6)) and seen[0] + seen[1] != seen[2] + seen[3]
    again = PtxRows(rows(16), config, 0).minibatch(*place[5])
    assert torch.equal(again.tokens, batches[5].tokens) and torch.equal(again.learnt, batches[5].learnt)
