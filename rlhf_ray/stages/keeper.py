"""What happens between optimizer steps of supervised training: evaluations, checkpoints, metrics, progress, the best weights."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlhf_ray.errors import Interrupted
from rlhf_ray.maths.rng import derived_seed
from rlhf_ray.metrics import MetricsWriter
from rlhf_ray.models.artifact import resume_command, write_checkpoint
from rlhf_ray.stages.task import Job

EVALUATIONS = 10
KEEP_ALL = 10**9
SHOWN = ("loss", "eval/loss", "eval/accuracy", "learning_rate")


class Keeper(TrainerCallback):
    """Trainer tells it of every step. All ranks evaluate; rank 0, which has the writer, writes."""

    def __init__(self, job: Job, writer: MetricsWriter | None) -> None:
        self.config, self.session, self.stage, self.task = job.config, job.session, job.stage, job.task
        self.held_out, self.folder, self.steps = job.examples.held_out, job.folder, job.steps
        self.writer = writer
        self.eval_every = self.config.eval_steps or max(self.steps // EVALUATIONS, 1)
        self.save_every = self.config.save_steps or self.eval_every
        self.step = 0
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.best_step, self.best_loss = 0, math.inf
        self._best: tuple[dict[str, Tensor], Tensor | None] | None = None
        self._logged_step, self._logged_at, self._elsewhere = 0, 0.0, 0.0

    def start(self) -> None:
        """Step 0: where an evaluation stands before training."""
        if self.task.evaluates_at_start:
            self._evaluate()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Trainer seeds every rank alike; dropout has to differ between the rows of different ranks.
        torch.manual_seed(derived_seed(self.config.seed, "dropout", self.session.rank))
        self._logged_at = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.step = state.global_step
        final = self.step >= self.steps
        if final:
            control.should_log = True
        started = time.perf_counter()
        if final or self.step % self.eval_every == 0:
            self._evaluate()
        stop = "" if final else self.session.must_stop()
        if final or stop or self.step % self.save_every == 0:
            self._save()
        if stop:
            resume = resume_command(self.config.output_dir)
            raise Interrupted.at(self.config.output_dir, f"{stop}; step {self.step} is saved", fix=resume)
        self._elsewhere += time.perf_counter() - started
        if self.session.is_main:
            known = {name: self.last[name] for name in SHOWN if name in self.last}
            self.session.console.progress(self.stage, self.step, self.steps, known)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Training metrics of the steps since the last call."""
        now = time.perf_counter()
        training = now - self._logged_at - self._elsewhere
        self._record(step, {**metrics, "time/step": training / max(step - self._logged_step, 1)})
        self._logged_step, self._logged_at, self._elsewhere = step, now, 0.0

    def keep_best(self) -> None:
        """Put the weights with the lowest held-out loss back, where the job asks for them."""
        if self._best is not None and self.best_step != self.step:
            self.task.restore(*self._best)
            self.last |= self._measured()
            if self.session.is_main:
                self.session.console.log(
                    f"{self.stage}: keeping step {self.best_step}, held-out loss {self.best_loss:.4f}"
                )

    def summary(self) -> dict[str, float]:
        """The last value of every metric, where the losses started, and which step was best."""
        found = dict(self.last)
        found |= {f"{name}_start": self.first[name] for name in ("loss", "eval/loss") if name in self.first}
        if self.best_loss < math.inf:
            found |= {"best/step": float(self.best_step), "best/eval_loss": self.best_loss}
        return found

    def _evaluate(self) -> None:
        if not self.held_out:
            return
        metrics = self._measured()
        self._record(self.step, metrics)
        if metrics["eval/loss"] < self.best_loss:
            self.best_step, self.best_loss = self.step, metrics["eval/loss"]
            if self.config.load_best_model_at_end:
                self._best = (self.task.tensors(), self.task.head())

    def _measured(self) -> dict[str, float]:
        started = time.perf_counter()
        self.task.model.eval()
        with torch.no_grad():
            metrics = self.task.evaluate(self.held_out, self.session)
        return {**metrics, "time/evaluate": time.perf_counter() - started}

    def _save(self) -> None:
        if not self.session.is_main:
            return
        keep = self.config.save_total_limit or KEEP_ALL

        def writer(folder: Path) -> None:
            self.task.save(folder / "adapter")

        write_checkpoint(self.folder, self.step, writer, keep, {self.best_step})

    def _record(self, step: int, metrics: dict[str, float]) -> None:
        self.last |= metrics
        for name, value in metrics.items():
            self.first.setdefault(name, value)
        if self.writer is not None:
            self.writer.write(step, metrics)
