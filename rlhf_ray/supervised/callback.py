"""What happens between optimizer steps of supervised training: evaluations, checkpoints, metrics, progress, the best weights.

A checkpoint is taken at one point only: the end of a step, after its metrics are written (supervised/checkpoint.py).
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlhf_ray.errors import Interrupted, Problem
from rlhf_ray.maths.rng import derived_seed
from rlhf_ray.metrics import MetricsWriter
from rlhf_ray.roles.guards import LOWER_RATE, StopTraining
from rlhf_ray.storage.run_folder import resume_command
from rlhf_ray.supervised import checkpoint
from rlhf_ray.supervised.state import SupervisedState
from rlhf_ray.supervised.task import Job
from rlhf_ray.supervised.trainer import SupervisedTrainer
from rlhf_ray.training.monitor import TrainingMonitor

EVALUATIONS = 10
SHOWN = ("loss", "eval/loss", "eval/accuracy", "learning_rate")


class RunCallback(TrainerCallback):
    """Trainer tells it of every step. All ranks evaluate; rank 0, which has the writer, writes."""

    trainer: SupervisedTrainer

    def __init__(self, job: Job, writer: MetricsWriter | None) -> None:
        self.job, self.config, self.session, self.task = job, job.config, job.session, job.task
        self.writer, self.steps = writer, job.steps
        self.eval_every = self.config.eval_steps or max(self.steps // EVALUATIONS, 1)
        self.save_every = self.config.save_steps or self.eval_every
        self.state = SupervisedState()
        self.monitor = TrainingMonitor(job.config, job.session, job.folder)
        self._stop = ""
        self._logged_step, self._logged_at, self._elsewhere = 0, 0.0, 0.0
        self._started = time.monotonic()

    @property
    def step(self) -> int:
        return self.state.step

    @property
    def seconds(self) -> float:
        """Of this run, all its starts together."""
        return self.state.seconds + time.monotonic() - self._started

    def run(self, trainer: SupervisedTrainer) -> None:
        """All steps that are left, from the newest checkpoint if there is one. Raises Interrupted if somebody or a guard ends the
        run."""
        self.trainer = trainer
        try:
            restored = checkpoint.restore(self.job, trainer, self.state, self.monitor.guards, self.writer)
            if restored is None and self.task.evaluates_at_start:
                self._evaluate()
            if self.step < self.steps:
                trainer.train(resume_from_checkpoint=None if restored is None else str(restored))
        except StopTraining as found:
            raise self.monitor.stopped_by_guard(found, self._save) from None
        finally:
            self.monitor.watchdog.enter("", 0)

    def _save(self) -> None:
        checkpoint.save(self.job, self.trainer, self.state, self.seconds, self.monitor.guards, self.writer)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.state.window is not None:
            self.trainer.load_window(self.state.window)
        state.logging_steps = int(args.logging_steps)  # a run that goes on may log more or less often
        self._logged_step, self._logged_at = self.step, time.perf_counter()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step = state.global_step + 1
        self.monitor.enter("update", step)
        # Dropout differs between steps and between the rows of different ranks, and needs no state to go on.
        torch.manual_seed(derived_seed(self.config.seed, "dropout", self.session.rank, step))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.state.step = state.global_step
        final = self.step >= self.steps
        if final:
            control.should_log = True
        started = time.perf_counter()
        if final or self.step % self.eval_every == 0:
            self._evaluate()
        self._stop = "" if final else self.session.must_stop()
        due = final or self.step % self.save_every == 0
        control.should_save = self.session.is_preempted() or due or bool(self._stop)
        self._elsewhere += time.perf_counter() - started
        if not control.should_log:
            self._progress()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After the step's metrics were written, if they were due."""
        started = time.perf_counter()
        self.monitor.enter("save", self.step)
        self._save()
        self.monitor.enter("step_end", self.step)
        if self._stop:
            resume = resume_command(self.config.output_dir)
            raise Interrupted.at(self.config.output_dir, f"{self._stop}; step {self.step} is saved", fix=resume)
        self._elsewhere += time.perf_counter() - started

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Training metrics of the steps since the last call."""
        now = time.perf_counter()
        training = now - self._logged_at - self._elsewhere
        self._record(step, {**metrics, "time/step": training / max(step - self._logged_step, 1)})
        self._logged_step, self._logged_at, self._elsewhere = step, now, 0.0
        self._progress()

    def _progress(self) -> None:
        """One line, with the newest training metrics there are."""
        if self.session.is_main:
            known = {name: self.state.last[name] for name in SHOWN if name in self.state.last}
            self.session.console.progress(self.job.stage, self.step, self.steps, known)

    def keep_best(self) -> None:
        """Put the weights with the lowest held-out loss back, where the job asks for them."""
        found = self.state
        if found.best is None:
            return
        keeping = f"{self.job.stage}: keeping step {found.best_step}, held-out loss {found.best_loss:.4f}"
        if found.best_step != found.step:
            self.task.restore(*found.best)
            found.last |= self._measured()
            if self.session.is_main:
                self.session.console.log(keeping)
        if self.session.is_main and self.task.evaluates_at_start and found.best_loss >= found.first["eval/loss"]:
            self.session.console.warn(
                f"{keeping}; no step's is below that of the start, {found.first['eval/loss']:.4f}"
            )

    def summary(self) -> dict[str, float]:
        """The last value of every metric, where the losses started, and which step was best."""
        progress = self.state
        found = dict(progress.last)
        found |= {f"{name}_start": progress.first[name] for name in ("loss", "eval/loss") if name in progress.first}
        if progress.best_loss < math.inf:
            found |= {"best/step": float(progress.best_step), "best/eval_loss": progress.best_loss}
        return found

    def _evaluate(self) -> None:
        if not self.job.examples.held_out:
            return
        self.monitor.enter("heldout", self.step)
        metrics = self._measured()
        for name, value in metrics.items():
            if not math.isfinite(value):
                fix = f"{LOWER_RATE}, or look at the base's dtype"
                raise StopTraining(
                    Problem(f"step {self.step}", f"{name} is not finite", "a finite number", str(value), fix)
                )
        self._record(self.step, metrics)
        is_trained = self.step > self.trainer.skipped  # the start is no result, even where no step is better
        if is_trained and metrics["eval/loss"] < self.state.best_loss:
            self.state.best_step, self.state.best_loss = self.step, metrics["eval/loss"]
            if self.config.load_best_model_at_end:
                self.state.best = (self.task.tensors(), self.task.head())

    def _measured(self) -> dict[str, float]:
        started = time.perf_counter()
        self.task.model.eval()
        with torch.no_grad():
            metrics = self.task.evaluate(self.job.examples.held_out, self.session)
        return {**metrics, "time/evaluate": time.perf_counter() - started}

    def _record(self, step: int, metrics: dict[str, float]) -> None:
        self.state.last |= metrics
        for name, value in metrics.items():
            self.state.first.setdefault(name, value)
        if self.writer is not None:
            self.writer.write(step, metrics)
