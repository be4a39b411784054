"""transformers' Trainer as SFT, DPO and reward modelling use it: its loop, optimizers, DDP; our loss, row order, schedule, log.

Loss = sum over the step's items / their global number, so the gradient does not depend on how rows are cut into microbatches and
ranks. Trainer's own saving, evaluation, logging and mixed precision stay off: the base keeps its dtype, adapters are float32.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from rlhf_ray.config import DPOConfig, RewardConfig, SFTConfig, check_accumulation
from rlhf_ray.errors import ConfigError, InvariantError, Problem, ResourceError
from rlhf_ray.maths.schedules import lr_multiplier, resolve_warmup
from rlhf_ray.roles.guards import Guards
from rlhf_ray.roles.optimizer_state import export_torch_state, restore_torch_state
from rlhf_ray.runtime.fault_injection import inject_nan
from rlhf_ray.supervised.batch_sampler import EpochLoader, PickedRows, RowOrder

OPTIMIZER_FILE = "optimizer.safetensors"
Batch = dict[str, Tensor]
Sums = dict[str, Tensor]


class Objective(ABC):
    """What a stage minimises. Its rows are of one type; a batch is a dict of tensors."""

    model: nn.Module
    """What is trained and called, wrapped by Trainer for several workers: every training forward goes through it."""

    @abstractmethod
    def length(self, row: Any) -> int:
        """Tokens that a forward pass over the row costs."""

    @abstractmethod
    def collate(self, picked: Sequence[tuple[Any, bool]]) -> Batch:
        """Rows as one right-padded batch; a row that does not count adds 0 to loss and count."""

    @abstractmethod
    def count(self, batch: Batch) -> int:
        """Items (tokens, pairs) that carry loss."""

    @abstractmethod
    def loss_sum(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Sums]:
        """Sum of the loss over the batch's items, with gradient, and detached scalar sums for the log."""

    @abstractmethod
    def log(self, sums: dict[str, float], items: float) -> dict[str, float]:
        """Training metrics of a logging window, from `loss_sum`'s sums and the items of all its steps, all ranks together."""


class SupervisedTrainer(Trainer):
    """on_log: called on every rank with (step, metrics) of each logging window.

    A run goes on by `train(resume_from_checkpoint=folder)`: Trainer takes the step and the place in the epoch from its
    trainer_state.json, the optimizer's state is in optimizer.safetensors. The weights are put into the model beforehand."""

    loss_is_scaled_for_ga = True
    objective: Objective

    def __init__(
        self,
        objective: Objective,
        rows: Sequence[Any],
        order: RowOrder,
        config: SFTConfig | DPOConfig | RewardConfig,
        arguments: TrainingArguments,
        all_reduce: Callable[[Sequence[float]], list[float]],
        on_log: Callable[[int, dict[str, float]], None],
        guards: Guards,
        callbacks: list[TrainerCallback],
    ) -> None:
        self.rows = PickedRows(rows)
        super().__init__(
            model=objective.model,
            args=arguments,
            train_dataset=self.rows,
            data_collator=objective.collate,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)  # it prints to stdout
        self.objective, self.order, self.config = objective, order, config
        self._all_reduce, self._on_log, self.guards = all_reduce, on_log, guards
        self.skipped = 0
        """Updates left out since the start of the run, because a loss or gradient was not finite."""
        self._sums: Sums = {}
        self._items = 0.0
        self._updates, self._skipped_updates = 0, 0  # since the last logged step
        self._before: tuple[Tensor, Sums, float] = (torch.zeros(()), {}, 0.0)
        self._loss = torch.zeros(())

    def get_train_dataloader(self) -> DataLoader[Any]:
        """This rank's microbatches. They are dealt out by `RowOrder`, so accelerate has nothing to shard."""
        return EpochLoader(
            self.rows,
            batch_sampler=self.order,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """The microbatches of one optimizer step, and the number of loss items in it over all ranks."""
        self._before = self._tr_loss.clone(), dict(self._sums), self._items
        self._loss = torch.zeros((), device=device)
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator)]
        (count,) = self._all_reduce([float(sum(self.objective.count(b) for b in batches))])
        self._items += count
        return batches, torch.tensor(count, device=device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """loss sum / items of the whole step x world size (DDP averages gradients)."""
        if return_outputs or num_items_in_batch is None:
            raise NotImplementedError("the loss is defined for a whole optimizer step")
        total, sums = self.objective.loss_sum(model, inputs)
        step, rank = self.state.global_step + 1, self.args.process_index
        total = inject_nan("learner", "gradient", total.reshape(1), step, rank)[0]
        self._loss = self._loss + total.detach()
        for name, value in sums.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        # A step without any loss item has loss 0, never 0 / 0.
        return total / torch.as_tensor(num_items_in_batch).clamp_min(1) * self.args.world_size

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient's norm before clipping; here it is known, before the update, whether that may be made.

        Where loss or gradient is not finite on any rank, no rank learns from the step, and it leaves no trace in what is logged but
        its number: weights, moments, step counts and schedule stay as they are. Raises StopTraining at the third such in a row."""
        norm = super()._get_grad_norm(model, grad_norm)
        figures = {"gradient norm": float(norm), "loss sum": float(self._loss)}
        (bad,) = self._all_reduce([float(not all(map(math.isfinite, figures.values())))])
        if bad:
            self._leave_out(model)
        else:
            self._updates += 1
        self.guards.note_update(
            not bad, figures, self.state.global_step + 1, "look at the rows of this step and the base's dtype"
        )
        return norm

    def _leave_out(self, model: nn.Module) -> None:
        model.zero_grad(set_to_none=True)  # an optimizer passes over what has no gradient
        self.skipped, self._skipped_updates = self.skipped + 1, self._skipped_updates + 1
        loss, self._sums, self._items = self._before
        self._tr_loss.copy_(loss)

    def trained(self) -> dict[str, nn.Parameter]:
        """What the optimizer moves, by name."""
        return {name: p for name, p in self.objective.model.named_parameters() if p.requires_grad}

    def optimizer_state(self) -> dict[str, Tensor]:
        return export_torch_state(self._own_optimizer(), self.trained())

    def _own_optimizer(self) -> Any:
        """Without accelerate's wrapping."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def window(self) -> dict[str, Any]:
        """What was summed up since the last logged step on this rank, as JSON."""
        sums = {name: float(value) for name, value in self._sums.items()}
        return {
            "since": self._globalstep_last_logged,
            "loss": float(self._tr_loss),
            "items": self._items,
            "sums": sums,
            "updates": self._updates,
            "skipped_updates": self._skipped_updates,
        }

    def load_window(self, window: Mapping[str, Any]) -> None:
        """Put back what `window` gave; while training begins, which sets it to nothing."""
        self._globalstep_last_logged, self._items = window["since"], window["items"]
        self._tr_loss.fill_(window["loss"])
        self._sums = {name: torch.tensor(value, device=self.args.device) for name, value in window["sums"].items()}
        self._updates = window.get("updates", self.state.global_step - window["since"])
        self._skipped_updates = window.get("skipped_updates", 0)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """The weights are in the model already."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The schedule is a function of the updates made (`create_scheduler`)."""
        if checkpoint is not None:
            stored = load_file(Path(checkpoint) / OPTIMIZER_FILE)
            restore_torch_state(self._own_optimizer(), self.trained(), stored)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """There is none to load: random numbers of a step are functions of (seed, rank, step)."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer then tells its callbacks, one of which saves."""

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        config = self.config
        warmup = resolve_warmup(config.warmup_steps, num_training_steps)

        def factor(step: int) -> float:
            made = step - self.skipped  # an update left out does not move the schedule
            return lr_multiplier(config.lr_scheduler_type, made, num_training_steps, warmup, config.min_lr_ratio)

        scheduled: Any = optimizer or self.optimizer
        done = self.state.global_step  # 0, but for a run that goes on
        if done:
            for group in scheduled.param_groups:
                group["initial_lr"] = group["lr"]
        self.lr_scheduler = LambdaLR(scheduled, factor, last_epoch=done - 1)
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's figures under our names, with the objective's; its summary at the end of training is left out."""
        if "loss" not in logs:
            return
        names = sorted(self._sums)
        totals = dict(zip(names, self._all_reduce([float(self._sums[n]) for n in names])))
        updates, skipped = self._updates, self._skipped_updates
        found = self.objective.log(totals, self._items) if updates else {}
        self._sums, self._items, self._updates, self._skipped_updates = {}, 0.0, 0, 0
        figures: dict[str, float] = {
            name: float(logs[name]) for name in ("loss", "learning_rate", "grad_norm") if name in logs
        }
        if skipped:  # Trainer's mean is over all steps, its norm of the last one
            figures["loss"] *= (updates + skipped) / max(updates, 1)
            figures = {n: v for n, v in figures.items() if (updates and math.isfinite(v)) or n == "learning_rate"}
        step = self.state.global_step
        for name, value in figures.items():
            if not math.isfinite(value):
                raise InvariantError.at(f"step {step}", f"{name} is not finite", "a finite number", str(value))
        epoch = float(self.state.epoch or 0.0)
        self._on_log(step, {**figures, "skipped_updates": float(skipped), "epoch": epoch, **found})

    def floating_point_ops(self, inputs: Batch) -> int:
        """Not counted: Trainer's estimate walks over all parameters at every microbatch."""
        return 0


class _OneDevice(TrainingArguments):
    """Each process trains on one device, where the model already is."""

    @property
    def n_gpu(self) -> int:
        """At most 1: Trainer would wrap the model in DataParallel where a lone process sees several GPUs."""
        return min(super().n_gpu, 1)

    @property
    def place_model_on_device(self) -> bool:
        return False


@contextlib.contextmanager
def undisturbed(world_size: int) -> Iterator[None]:
    """Build a Trainer in here: accelerate takes LOCAL_RANK for a launcher's, and would wrap the model of a lone process in DDP;
    it sets torch's thread count, and transformers warns of the process group that a lone process has."""
    threads, verbosity = torch.get_num_threads(), logging.get_verbosity()
    local_rank = os.environ.pop("LOCAL_RANK", None) if world_size == 1 else None
    logging.set_verbosity_error()
    try:
        yield
    finally:
        if local_rank is not None:
            os.environ["LOCAL_RANK"] = local_rank
        torch.set_num_threads(threads)
        logging.set_verbosity(verbosity)


def check_trainer_options(options: Mapping[str, Any]) -> None:
    """ConfigError for an allow-listed argument that would have no effect, ResourceError for one that this machine cannot follow."""
    without_effect = {
        "lr_scheduler_kwargs": "the schedule is ours: lr_scheduler_type, min_lr_ratio, warmup_steps",
        "optim_args": "none of our optimizers has further arguments",
    }
    ConfigError.raise_all(
        Problem(f"trainer.{name}", f"has no effect: {why}", fix="drop it")
        for name, why in without_effect.items()
        if name in options
    )
    if options.get("use_liger_kernel") and importlib.util.find_spec("liger_kernel") is None:
        raise ResourceError.at(
            "trainer.use_liger_kernel", "liger-kernel is not installed", fix="pip install liger-kernel"
        )


def training_arguments(
    config: SFTConfig | DPOConfig | RewardConfig, output_dir: str, device: torch.device, world_size: int
) -> TrainingArguments:
    """TrainingArguments from our fields, and the allow-listed ones of `config.trainer`.

    Raises ResourceError if bitsandbytes is asked for and missing, ConfigError for arguments that Trainer refuses."""
    if config.optim == "adamw_8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise ResourceError.at("optim", "adamw_8bit needs bitsandbytes", fix="pip install 'rlhf_ray[quant]'")
    check_trainer_options(config.trainer)
    distributed_cpu = world_size > 1 and device.type == "cpu"
    passed_on = {"dataloader_pin_memory": device.type == "cuda", **config.trainer}
    passed_on.pop("label_smoothing_factor", None)  # the loss is ours
    try:
        return _OneDevice(
            output_dir=output_dir,
            per_device_train_batch_size=config.per_device_train_batch_size,
            gradient_accumulation_steps=check_accumulation(
                "train_batch_size", config.train_batch_size, config.per_device_train_batch_size, world_size
            ),
            num_train_epochs=config.num_train_epochs,
            max_steps=config.max_steps,
            learning_rate=config.learning_rate,
            optim=config.optim,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_epsilon=config.adam_epsilon,
            max_grad_norm=config.max_grad_norm,
            logging_strategy="steps",
            logging_steps=config.logging_steps,
            logging_first_step=True,
            logging_nan_inf_filter=False,
            eval_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            log_level="error",
            log_level_replica="error",
            seed=config.seed % 2**32,
            remove_unused_columns=False,
            use_cpu=distributed_cpu,
            ddp_backend="gloo" if distributed_cpu else None,
            ddp_find_unused_parameters=False,
            ddp_broadcast_buffers=False,
            **passed_on,
        )
    except (TypeError, ValueError) as error:
        given = ", ".join(f"{k}={v!r}" for k, v in passed_on.items())
        raise ConfigError.at("trainer", f"transformers refuses: {error}", got=given) from error


def total_steps(config: SFTConfig | DPOConfig | RewardConfig, rows: int) -> int:
    """Optimizer steps of the run: max_steps, or num_train_epochs passes of ceil(rows / train_batch_size) steps."""
    if config.max_steps > 0:
        return config.max_steps
    return math.ceil(config.num_train_epochs * -(-rows // config.train_batch_size))
