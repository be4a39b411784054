"""DPO's objective on hand-made pairs, against plain torch on unpadded rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from rlhf_ray.config import DPOConfig
from rlhf_ray.console import NullConsole
from rlhf_ray.data.collate import TokenisedPair
from rlhf_ray.data.templates import load_template
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.adapters import adapter_parameters, copy_adapter, use_adapter
from rlhf_ray.models.backbone import Backbone
from rlhf_ray.runtime.session import process_session
from rlhf_ray.supervised.dpo import DPOTask, check_options
from rlhf_ray.supervised.trained_model import PreferenceModel

PAIRS = [
    TokenisedPair([1, 40, 50, 51, 2], [1, 40, 60, 2], 2, "a"),
    TokenisedPair([1, 41, 52, 2], [1, 41, 61, 62, 63, 2], 2, "b"),
    TokenisedPair([1, 42, 43, 53, 54, 2], [1, 42, 43, 64, 65, 66, 67, 2], 3, "c"),
]


def job(tmp_path: Path, **values: Any) -> DPOConfig:
    return DPOConfig(
        output_dir=str(tmp_path / "run"),
        model_name_or_path="unused",
        data={"train": "unused.jsonl"},  # type: ignore[arg-type]
        learner={"num_workers": 0},  # type: ignore[arg-type]
        per_device_eval_batch_size=2,
        **values,
    )


@pytest.fixture
def make_task(tmp_path: Path, make_backbone: Callable[..., Backbone]) -> Callable[..., DPOTask]:
    """A policy that has moved away from its reference: the frozen copy of an adapter, or the base itself."""

    def make(has_adapter: bool = True, **values: Any) -> DPOTask:
        session = process_session(NullConsole(), num_threads=1)
        task = DPOTask(job(tmp_path, **values), make_backbone(), load_template("none"), session)
        shake(task, 1)
        if has_adapter:  # as `sft` makes it
            copy_adapter(task.model.peft_model, "dpo", "reference", trainable=False)
            task.model.reference = "reference"
            shake(task, 2)
        return task

    return make


def shake(task: DPOTask, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(task.model.peft_model, "dpo").values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def reply_logprob(model: PreferenceModel, ids: list[int], prompt: int) -> torch.Tensor:
    """One row, no padding, the model's own logits."""
    logits = model.get_base_model()(torch.tensor([ids])).logits[0].float()
    said = F.log_softmax(logits[:-1], dim=-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
    return said[prompt - 1 :].sum()


def plain_loss(task: DPOTask, pairs: list[TokenisedPair]) -> torch.Tensor:
    """Equation 7 of the paper pair by pair, with plain autograd."""
    config, total = task.config, torch.zeros(())
    for pair in pairs:
        sides = [(pair.chosen_ids, pair.prompt_length), (pair.rejected_ids, pair.prompt_length)]
        new = [reply_logprob(task.model, *side) for side in sides]
        with torch.no_grad(), use_adapter(task.model.peft_model, task.model.reference):
            old = [reply_logprob(task.model, *side) for side in sides]
        p = torch.sigmoid(config.beta * ((new[0] - old[0]) - (new[1] - old[1])))
        total = total - (1 - config.label_smoothing) * p.log() - config.label_smoothing * (1 - p).log()
        total = total - (config.rpo_alpha or 0.0) * new[0] / (len(pair.chosen_ids) - pair.prompt_length)
    return total


def gradients(task: DPOTask, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    task.model.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    return {n: p.grad.clone() for n, p in task.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("has_adapter", [True, False])
@pytest.mark.parametrize("values", [{}, {"beta": 0.7, "label_smoothing": 0.1, "rpo_alpha": 1.0}])
def test_loss_and_gradient_are_those_of_plain_autograd_on_unpadded_rows(
    make_task: Callable[..., DPOTask], has_adapter: bool, values: dict[str, float]
) -> None:
    """A padding pair adds nothing, and only the trained adapter gets a gradient."""
    task = make_task(has_adapter, **values)
    batch = task.collate([(PAIRS[0], True), (PAIRS[1], True), (PAIRS[2], True), (PAIRS[0], False)])
    loss, sums = task.loss_sum(task.model, batch)
    expected = plain_loss(task, PAIRS)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert abs(float(sums["rewards/margins"])) > 1e-3 and task.count(batch) == 3
    ours, plain = gradients(task, loss), gradients(task, expected)
    assert ours.keys() == plain.keys() and all(".dpo." in name for name in ours)
    for name, gradient in plain.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-5, rtol=1e-4)


def test_the_gradient_does_not_depend_on_how_pairs_are_cut_up(make_task: Callable[..., DPOTask]) -> None:
    task = make_task(rpo_alpha=0.5)
    whole = gradients(task, task.loss_sum(task.model, task.collate([(p, True) for p in PAIRS]))[0])
    task.model.zero_grad(set_to_none=True)
    for pair in PAIRS:
        task.loss_sum(task.model, task.collate([(pair, True)]))[0].backward()  # type: ignore[no-untyped-call]
    for name, parameter in task.model.named_parameters():
        if name in whole:
            torch.testing.assert_close(parameter.grad, whole[name], atol=1e-6, rtol=1e-4)


def test_before_the_first_update_the_loss_is_ln_2_and_nothing_is_preferred(
    tmp_path: Path, make_backbone: Callable[..., Backbone]
) -> None:
    session = process_session(NullConsole(), num_threads=1)
    task = DPOTask(job(tmp_path), make_backbone(), load_template("none"), session)
    found = task.evaluate(PAIRS, session)
    assert found["eval/loss"] == pytest.approx(math.log(2), rel=1e-6) and found["eval/accuracy"] == 0.5
    assert found["eval/rewards/margins"] == 0.0 and found["eval/rows"] == 3.0


def test_held_out_figures_are_means_over_pairs_whatever_the_batches(make_task: Callable[..., DPOTask]) -> None:
    task, session = make_task(), process_session(NullConsole(), num_threads=1)
    with torch.no_grad():
        found = task.evaluate(PAIRS, session)
        _, sums = task.loss_sum(task.model, task.collate([(p, True) for p in PAIRS]))
    logged = task.log({name: float(value) for name, value in sums.items()}, 3.0)
    assert found["eval/loss"] == pytest.approx(float(plain_loss(task, PAIRS).detach()) / 3, rel=1e-4)
    assert found["eval/accuracy"] == pytest.approx(logged["rewards/accuracies"])
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"):
        assert found[f"eval/{name}"] == pytest.approx(logged[name], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", ["label_smoothing_factor", "neftune_noise_alpha"])
def test_arguments_of_the_trainer_that_would_mislead_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"trainer.{name}"):
        check_options(job(tmp_path, trainer={name: 0.1}))


def test_an_adapter_has_its_own_shape(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lora: the adapter named by sft has its own"):
        job(tmp_path, sft="runs/sft", lora={"r": 4})
