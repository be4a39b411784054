"""Trainer as we use it: one normaliser for the whole optimizer step, our schedule, arguments that all have an effect."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from rlhf_ray.config import SFTConfig
from rlhf_ray.console import NullConsole
from rlhf_ray.data.collate import IGNORE_INDEX, TokenisedRow
from rlhf_ray.data.templates import load_template
from rlhf_ray.errors import ConfigError, ResourceError
from rlhf_ray.models.adapters import adapter_parameters
from rlhf_ray.models.backbone import Backbone
from rlhf_ray.roles.guards import Guards, StopTraining
from rlhf_ray.runtime.session import Session, process_session
from rlhf_ray.supervised.batch_sampler import RowOrder
from rlhf_ray.supervised.sft import SFTTask
from rlhf_ray.supervised.trainer import SupervisedTrainer, total_steps, training_arguments, undisturbed

Logs = list[tuple[int, dict[str, float]]]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def session() -> Session:
    return process_session(NullConsole(), num_threads=1)


def config_of(tmp_path: Path, **values: Any) -> SFTConfig:
    fixed: dict[str, Any] = {
        "output_dir": str(tmp_path / "run"),
        "model_name_or_path": "unused",
        "data": {"train": "unused.jsonl"},
        "learner": {"num_workers": 0},
        "lora": {"r": 4},
        "train_batch_size": 8,
        "per_device_train_batch_size": 8,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "max_grad_norm": 1e9,
        "logging_steps": 1,
    }
    return SFTConfig(**{**fixed, **values})


def rows(count: int, unequal: bool = True) -> list[TokenisedRow]:
    """Rows whose replies have 1 to 9 tokens: means of microbatch means are far from the mean over tokens."""
    made = []
    for i in range(count):
        response = 1 + (i * 5) % 9 if unequal else 4
        ids = [1, 40 + i % 5, 41] + [50 + (i * 7 + t) % 90 for t in range(response)]
        made.append(TokenisedRow(ids, [IGNORE_INDEX] * 3 + ids[3:], f"row {i}"))
    return made


class Gradients(TrainerCallback):
    """Keeps the gradient of the first optimizer step, before it is forgotten."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.found:
            parameters = adapter_parameters(model.peft_model, "sft")
            self.found = {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}


def run(
    config: SFTConfig,
    backbone: Backbone,
    session: Session,
    data: list[TokenisedRow],
    before: Callable[[SFTTask, SupervisedTrainer], None] = lambda task, trainer: None,
) -> tuple[SFTTask, Logs, dict[str, Tensor]]:
    task, logs, gradients = SFTTask(config, backbone, load_template("none"), session), Logs(), Gradients()
    generator = torch.Generator().manual_seed(9)
    for name, parameter in adapter_parameters(task.model.peft_model, "sft").items():
        if "lora_B" in name:  # from B = 0 the gradient of A would be 0, and prove nothing
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    order = RowOrder(
        [task.length(r) for r in data], config.train_batch_size, config.per_device_train_batch_size, config.seed
    )
    with undisturbed(1):
        arguments = training_arguments(config, config.output_dir, session.device, 1)
        trainer = SupervisedTrainer(
            task,
            data,
            order,
            config,
            arguments,
            session.sum,
            lambda step, m: logs.append((step, m)),
            Guards(),
            [gradients],
        )
    before(task, trainer)
    trainer.train()
    return task, logs, gradients.found


@pytest.mark.parametrize("per_device", [1, 2, 4])
def test_microbatches_have_the_loss_and_gradient_of_the_whole_batch(
    per_device: int, tmp_path: Path, session: Session, make_backbone: Callable[..., Backbone]
) -> None:
    """Seeds F1, 3.4 (f): means of microbatches with unequal token counts are no mean over tokens."""
    data = rows(8)
    _, whole_logs, whole = run(config_of(tmp_path), make_backbone(), session, data)
    _, logs, parts = run(config_of(tmp_path, per_device_train_batch_size=per_device), make_backbone(), session, data)
    assert logs[0][1]["loss"] == pytest.approx(whole_logs[0][1]["loss"], rel=1e-6)
    assert whole.keys() == parts.keys() and len(whole) == 2 * 7 * 2
    for name in whole:
        assert float((parts[name] - whole[name]).norm() / whole[name].norm()) < 1e-5, name


def test_the_logged_loss_is_the_mean_over_all_tokens_by_definition(
    tmp_path: Path, session: Session, make_backbone: Callable[..., Backbone]
) -> None:
    data = rows(8)
    config = config_of(tmp_path, per_device_train_batch_size=2, learning_rate=1e-30)
    task, logs, _ = run(config, make_backbone(), session, data)
    total, tokens = 0.0, 0
    with torch.no_grad():
        for row in data:
            logp = task.model.peft_model(input_ids=torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
            for t in range(3, len(row.input_ids)):
                total, tokens = total - float(logp[t - 1, row.input_ids[t]]), tokens + 1
    assert logs[0][1]["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert logs[0][1]["tokens/train"] == tokens


def test_the_learning_rate_follows_our_schedule_and_never_is_zero(
    tmp_path: Path, session: Session, make_backbone: Callable[..., Backbone]
) -> None:
    """Seeds F6."""
    config = config_of(tmp_path, max_steps=6, warmup_steps=2)
    _, logs, _ = run(config, make_backbone(), session, rows(16))
    rates = [m["learning_rate"] / config.learning_rate for _, m in logs]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25])


def test_parameters_move_in_the_first_update(
    tmp_path: Path, session: Session, make_backbone: Callable[..., Backbone]
) -> None:
    """Seeds F6, 3.4 (h)."""
    before, _, _ = run(config_of(tmp_path, learning_rate=1e-30), make_backbone(), session, rows(8))
    after, _, _ = run(config_of(tmp_path), make_backbone(), session, rows(8))
    changed = [not torch.equal(after.tensors()[n], t) for n, t in before.tensors().items()]
    assert all(changed)


def test_the_gradient_norm_is_logged_as_it_was_before_clipping(
    tmp_path: Path, session: Session, make_backbone: Callable[..., Backbone]
) -> None:
    """Seeds F23: by the definition over the gradients of one step, which are clipped to a tenth of it."""
    _, _, gradients = run(config_of(tmp_path, max_grad_norm=1e9), make_backbone(), session, rows(8))
    norm = float(torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients.values()])))
    _, logs, clipped = run(config_of(tmp_path, max_grad_norm=norm / 10), make_backbone(), session, rows(8))
    assert logs[0][1]["grad_norm"] == pytest.approx(norm, rel=1e-4)
    after = float(torch.linalg.vector_norm(torch.stack([g.norm() for g in clipped.values()])))
    assert after == pytest.approx(norm / 10, rel=1e-3)


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "adamw_8bit"])
def test_every_optimizer_trains(
    optim: str, tmp_path: Path, session: Session, make_backbone: Callable[..., Backbone]
) -> None:
    config = config_of(tmp_path, optim=optim, max_steps=12, num_train_epochs=1.0)
    _, logs, _ = run(config, make_backbone(), session, rows(8, unequal=False))
    assert logs[-1][1]["loss"] < logs[0][1]["loss"] - 0.1


def test_dropout_and_neftune_act_in_training(
    tmp_path: Path, session: Session, make_backbone: Callable[..., Backbone]
) -> None:
    data = rows(8)
    plain = run(config_of(tmp_path), make_backbone(), session, data)[1][0][1]["loss"]
    dropped = run(config_of(tmp_path, lora={"r": 4, "lora_dropout": 0.5}), make_backbone(), session, data)
    noisy = run(config_of(tmp_path, trainer={"neftune_noise_alpha": 50.0}), make_backbone(), session, data)
    assert dropped[1][0][1]["loss"] != pytest.approx(plain, abs=1e-4)
    assert noisy[1][0][1]["loss"] != pytest.approx(plain, abs=1e-4)


def test_losses_that_are_not_finite_stop_the_run_at_the_third_in_a_row(
    tmp_path: Path, session: Session, make_backbone: Callable[..., Backbone]
) -> None:
    with pytest.raises(
        StopTraining, match=r"step [45]: 3 updates in a row had a gradient that is not finite .*gradient norm nan"
    ):
        run(config_of(tmp_path, learning_rate=1e30, max_steps=9, warmup_steps=0), make_backbone(), session, rows(8))


def spoil(steps: set[int], seen: list[dict[str, Tensor]]) -> Callable[[SFTTask, SupervisedTrainer], None]:
    """One gradient is infinite in each of `steps`, though the loss is finite. seen: the adapter before each step."""

    def before(task: SFTTask, trainer: SupervisedTrainer) -> None:
        parameter = next(p for n, p in adapter_parameters(task.model.peft_model, "sft").items() if "lora_B" in n)

        def spoilt(gradient: Tensor) -> Tensor:
            seen.append(task.tensors())
            return gradient * torch.inf if trainer.state.global_step + 1 in steps else gradient

        parameter.register_hook(spoilt)

    return before


def test_a_gradient_that_is_not_finite_is_left_out_and_counted(
    tmp_path: Path, session: Session, make_backbone: Callable[..., Backbone]
) -> None:
    """The step changes nothing but the counter: neither weights, nor moments, nor the schedule."""
    seen: list[dict[str, Tensor]] = []
    config = config_of(tmp_path, max_steps=6, warmup_steps=2)
    task, logs, _ = run(config, make_backbone(), session, rows(8), spoil({3}, seen))
    assert [m["skipped_updates"] for _, m in logs] == [0, 0, 1, 0, 0, 0]
    assert logs[2][1].keys() == {"skipped_updates", "learning_rate", "epoch"}
    assert all(torch.equal(seen[3][name], tensor) for name, tensor in seen[2].items())
    rates = [m["learning_rate"] / config.learning_rate for _, m in logs]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0, 0.75, 0.5])
    # All steps have the same eight rows: with one left out, six steps are the first five of the run nobody spoilt.
    plain_seen: list[dict[str, Tensor]] = []
    _, plain, _ = run(config, make_backbone(), session, rows(8), spoil(set(), plain_seen))
    assert all(torch.equal(plain_seen[5][name], tensor) for name, tensor in task.tensors().items())
    assert [m["loss"] for s, m in logs if s > 3] == pytest.approx([m["loss"] for s, m in plain if 2 < s < 6], rel=1e-6)


def test_a_step_left_out_is_not_in_the_mean_loss(
    tmp_path: Path, session: Session, make_backbone: Callable[..., Backbone]
) -> None:
    fields = {"max_steps": 4, "logging_steps": 4, "learning_rate": 1e-30}
    _, plain, _ = run(config_of(tmp_path, **fields), make_backbone(), session, rows(8))
    _, logs, _ = run(config_of(tmp_path, **fields), make_backbone(), session, rows(8), spoil({2, 3}, []))
    first, last = logs[0][1], logs[-1][1]
    assert (first["skipped_updates"], last["skipped_updates"], last["tokens/train"]) == (
        0, 2, plain[-1][1]["tokens/train"] / 2
    )  # fmt: skip
    assert last["loss"] == pytest.approx(plain[-1][1]["loss"], rel=1e-6)


def test_a_step_without_a_label_is_finite_and_moves_nothing(
    tmp_path: Path, session: Session, make_backbone: Callable[..., Backbone]
) -> None:
    """Seeds F30."""
    masked = [TokenisedRow(r.input_ids, [IGNORE_INDEX] * len(r.input_ids), r.where) for r in rows(8)]
    _, logs, gradients = run(config_of(tmp_path), make_backbone(), session, masked)
    assert logs[0][1]["loss"] == 0.0
    assert not any(g.any() for g in gradients.values())


def test_filler_rows_add_nothing(tmp_path: Path, make_backbone: Callable[..., Backbone], session: Session) -> None:
    """Ranks run equally many microbatches; a filler row may not count, even where it repeats a real one."""
    task = SFTTask(config_of(tmp_path), make_backbone(), load_template("none"), session)
    real, filled = rows(3), task.collate([(r, True) for r in rows(3)] + [(rows(1)[0], False)])
    plain = task.collate([(r, True) for r in real])
    assert task.count(filled) == task.count(plain)
    with torch.no_grad():
        loss, wanted = task.loss_sum(task.model, filled)[0], task.loss_sum(task.model, plain)[0]
    assert float(loss) == pytest.approx(float(wanted), rel=1e-6)


@pytest.mark.parametrize(
    ("trainer", "error", "text"),
    [
        ({"lr_scheduler_kwargs": {}}, ConfigError, "the schedule is ours"),
        ({"optim_args": "a=1"}, ConfigError, "has no effect"),
        ({"use_liger_kernel": True}, ResourceError, "liger-kernel is not installed"),
        ({"dataloader_num_workers": "many"}, ConfigError, "transformers refuses"),
    ],
)
def test_options_without_an_effect_are_refused(
    trainer: dict[str, Any], error: type[Exception], text: str, tmp_path: Path
) -> None:
    """Seeds F32."""
    with pytest.raises(error, match=text):
        training_arguments(config_of(tmp_path, trainer=trainer), str(tmp_path), torch.device("cpu"), 1)


def test_a_lone_process_is_neither_wrapped_nor_given_other_threads(
    tmp_path: Path, session: Session, make_backbone: Callable[..., Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    monkeypatch.setenv("LOCAL_RANK", "0")
    before = torch.get_num_threads()
    with undisturbed(1):
        arguments = training_arguments(config_of(tmp_path), str(tmp_path), session.device, 1)
    assert (arguments.world_size, arguments.n_gpu <= 1, arguments.place_model_on_device) == (1, True, False)
    assert os.environ["LOCAL_RANK"] == "0" and torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("values", "count", "steps"),
    [
        ({"max_steps": 5}, 1000, 5),
        ({"max_steps": -1}, 16, 2),
        ({"max_steps": -1}, 17, 3),
        ({"max_steps": -1, "num_train_epochs": 2.5}, 16, 5),
    ],
)
def test_total_steps(values: dict[str, Any], count: int, steps: int, tmp_path: Path) -> None:
    assert total_steps(config_of(tmp_path, **values), count) == steps
