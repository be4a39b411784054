"""One trial: the PPO stage, whose evaluations Tune hears of; or the DPO stage, and how its result answers held-out prompts.

A colocated job with one worker runs in the trial's own process, which Tune uses for the next trial again: starting a process
with torch costs seconds. Other jobs start their worker group from the trial's process. Either way the run folder is the truth; Tune
keeps nothing of ours, and a trial that starts again goes on from its newest checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from rlhf_ray.config import JobFields, PPOConfig
from rlhf_ray.config.sweep import SweepConfig
from rlhf_ray.console import Console, duration
from rlhf_ray.errors import InvariantError, LimitReached, RlhfRayError
from rlhf_ray.metrics import read_metrics
from rlhf_ray.runtime.session import enter
from rlhf_ray.stages.start import dpo, evaluate, ppo
from rlhf_ray.storage.files import atomic_write_json
from rlhf_ray.sweep.results import K1, LENGTH, failure_file, of_replies, outcome_of
from rlhf_ray.sweep.trials import Trial, TrialJob, evaluation_of, job_of, trial_of

J = TypeVar("J", bound=JobFields)
Report = Callable[[dict[str, Any]], None]
"""Hears of an evaluation: score, KL, length, step, its number among the trial's evaluations, and the time left."""


class TrialConsole(Console):
    """Tells of every evaluation after training has begun. Everything else a trial says is in its run folder.

    seen: the number of the last one, counted from the trial's beginning; 0 if this start has told of none."""

    def __init__(self, metric: str, total_steps: int, report: Report, folder: Path) -> None:
        """folder: of the trial's run."""
        self.metric, self.total, self.report, self.seen = metric, total_steps, report, 0
        self._metrics = folder / "metrics.jsonl"
        self._started, self._first = time.monotonic(), 0

    def emit(self, event: dict[str, Any]) -> None:
        if event["kind"] == "progress":
            self.total = event["total"]
        if event["kind"] != "metrics":
            return
        step, values = event["step"], event["values"]
        self._first = self._first or step
        if step > 0 and of_replies(values):
            self.tell(step, values)

    def tell(self, step: int, values: Mapping[str, float]) -> None:
        if self.metric not in values:
            known = ", ".join(sorted(name for name in values if name.startswith("eval/")))
            raise InvariantError.at(
                "metric", "is never reported in this job", known, self.metric, "set metric to one of those"
            )
        self.seen = (self.seen or self._told_before(step)) + 1
        seconds = (time.monotonic() - self._started) / max(step - self._first + 1, 1) * max(self.total - step, 0)
        shown = {"score": values[self.metric], "KL": values.get(K1), "length": values.get(LENGTH)}
        self.report({**shown, "step": step, "evaluation": self.seen, "left": duration(seconds)})

    def _told_before(self, step: int) -> int:
        """Evaluations of earlier starts, before `step`: schedulers compare trials after equally many."""
        rows = read_metrics(self._metrics) if self._metrics.is_file() else []
        return sum(0 < row["step"] < step and of_replies(row) for row in rows)


def run_trial(config: SweepConfig, params: dict[str, Any], in_process: bool, threads: int, folder: str) -> None:
    """The body of a trial in a process of Tune's. params: {"settings", "seed"}.  folder: the driver's working directory."""
    from ray import tune

    enter(folder)
    trial = trial_of(config, params["settings"], params["seed"])
    job = job_of(config, trial)
    train_trial(config, trial, alone(job, threads) if in_process else job, tune.report)


def train_trial(config: SweepConfig, trial: Trial, job: TrialJob, report: Report, seat: Any = None) -> None:
    """Train, and leave beside the run why, if it does not come to its end. Raises what the stage raises, but for limits.

    seat: of a trial that shares process and base with others."""
    failure_file(trial).unlink(missing_ok=True)
    console = TrialConsole(config.metric, max(job.max_steps, 0), report, trial.folder)
    try:
        if isinstance(job, PPOConfig):
            run = ppo(job, console, seat)
            if not console.seen:  # it was finished already
                console.tell(run.steps, run.metrics)
        else:
            run = dpo(job, console)
            if config.evaluate is not None:
                evaluate(evaluation_of(config, trial, job), console)
            console.tell(run.steps, outcome_of(trial).last)
    except LimitReached as error:  # a verdict on the setting: neither a failure, nor worth another try
        write_failure(trial, error)
    except Exception as error:
        if seat is None or not seat.stop.asked():
            write_failure(trial, error)
        raise


def alone(job: J, threads: int) -> J:
    """The job in this very process."""
    return job.model_copy(
        update={"learner": job.learner.model_copy(update={"num_workers": 0, "num_gpus": None, "num_threads": threads})}
    )


def write_failure(trial: Trial, error: BaseException) -> None:
    """Leave beside the run why it did not come to its end."""
    told = str(error.problems[0]) if isinstance(error, RlhfRayError) else f"{type(error).__name__}: {error}"
    code = error.exit_code if isinstance(error, RlhfRayError) else 1
    failure_file(trial).parent.mkdir(parents=True, exist_ok=True)
    record = {"error": " ".join(told.split()), "exit_code": code, "limit": isinstance(error, LimitReached)}
    atomic_write_json(failure_file(trial), record)
