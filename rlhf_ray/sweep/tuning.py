"""Ray Tune around the trials: scheduler, search, budget, retries, and what it tells meanwhile."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from rlhf_ray.config.sweep import SweepConfig
from rlhf_ray.console import Console
from rlhf_ray.sweep.capacity import Capacity
from rlhf_ray.sweep.record import OUT_OF_TIME, Record
from rlhf_ray.sweep.results import failure_file
from rlhf_ray.sweep.space import read_space
from rlhf_ray.sweep.trial import write_failure
from rlhf_ray.sweep.trials import Trial, trial_of

SHOW_EVERY_S = 30.0
MOST_ROWS = 24
ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # trials write their own metrics and TensorBoard files
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}
Body = Callable[[dict[str, Any], bool, int, str], None]
"""A trial: its settings and seed, whether in its own process, threads, working directory."""


def run_trials(config: SweepConfig, record: Record, fits: Capacity, body: Body, console: Console) -> None:
    """Run the trials that are left, and keep `record` written. Failed and stopped trials are in the record, not raised."""
    os.environ.update(ENVIRONMENT)
    here, in_process, threads = os.getcwd(), fits.in_process, fits.threads

    def trainable(params: dict[str, Any]) -> None:
        body(params["trial"], in_process, threads, here)

    left = [{"settings": t.settings, "seed": t.seed} for t in record.left()]
    search, space = None, {"trial": tune.grid_search(left)}
    if config.search == "optuna":
        from rlhf_ray.sweep.suggest import Suggestions

        search, space = Suggestions(read_space(config.space), config, record), {}
    watcher = Watcher(config, record, console)
    beside = record.folder.parent
    with tempfile.TemporaryDirectory(prefix=".rlhf-ray-", dir=beside) as scratch:
        tuner = tune.Tuner(
            tune.with_resources(trainable, tune.PlacementGroupFactory([fits.each])),
            param_space=space,
            tune_config=tune.TuneConfig(
                metric="score",
                mode="max",
                search_alg=search,
                scheduler=scheduler_of(config),
                num_samples=1 if search is None else search.to_run,
                max_concurrent_trials=min(fits.at_once, config.max_concurrent_trials or fits.at_once),
                time_budget_s=config.time_budget_s,
                reuse_actors=in_process,
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=str(Path(scratch).absolute()),
                failure_config=tune.FailureConfig(max_failures=config.max_trial_failures),
                progress_reporter=watcher.reporter,
                callbacks=[watcher],
                verbose=1,
            ),
        )
        tuner.fit()
    watcher.close()


class _MedianStopping(MedianStoppingRule):
    """Tune's notes what a trial ended with, and fails at the next one's result where that is nothing."""

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        if self._time_attr in result and self._metric in result:
            super().on_trial_complete(tune_controller, trial, result)


def scheduler_of(config: SweepConfig) -> TrialScheduler:
    """Time is counted in evaluations, from a trial's beginning: one that is resumed, or tried again, is as old as its run."""
    if config.scheduler == "asha":
        return ASHAScheduler(
            time_attr="evaluation",
            max_t=10**6,  # trials end by themselves
            grace_period=config.grace_evaluations,
            reduction_factor=config.reduction_factor,
        )
    if config.scheduler == "median_stopping":
        return _MedianStopping(time_attr="evaluation", grace_period=config.grace_evaluations)
    return FIFOScheduler()


class _NotKept:
    """Tune pickles what it is given, to restore an experiment, which we never have it do."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Watcher(_NotKept, tune.Callback):
    """Keeps the record, and shows how far the trials are."""

    def __init__(self, config: SweepConfig, record: Record, console: Console) -> None:
        self.config, self.record, self.console = config, record, console
        self.started = time.monotonic()
        self.latest: dict[str, dict[str, Any]] = {}
        self.reporter = Reporter(self)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        ours = self.ours(trial)
        if ours.id not in self.record.trials:  # a suggestion, which a driver that dies now must find again
            self.record.add(ours)
            self.record.write()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self.latest[self.ours(trial).id] = result

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        ours = self.ours(trial)
        if self.record.outcome(ours).status == "waiting":  # it did not come to its end
            self.record.stop(ours, self._why(self.latest.get(ours.id, {})))
        self.record.write()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        ours = self.ours(trial)
        if not failure_file(ours).is_file():
            write_failure(ours, RuntimeError("its process died"))
        self.console.warn(f"trial {ours.id} failed: {self.record.outcome(ours).reason}")
        self.record.write()

    def close(self) -> None:
        """Trials that the time budget left over."""
        for trial in self.record.left():
            if self.out_of_time and not failure_file(trial).is_file():
                self.record.stop(trial, self._why({}))
        self.record.write()

    @property
    def out_of_time(self) -> bool:
        budget = self.config.time_budget_s
        return budget is not None and time.monotonic() - self.started >= budget

    def _why(self, result: dict[str, Any]) -> str:
        if self.out_of_time:
            return f"{OUT_OF_TIME}{self.config.time_budget_s:g} s was used up"
        at = f" at step {result['step']}, score {result['score']:.4g}" if "score" in result else ""
        return f"{self.config.scheduler}: others do better{at}"

    def ours(self, trial: Any) -> Trial:
        params = trial.config["trial"]
        return trial_of(self.config, params["settings"], params["seed"])


class Reporter(_NotKept, tune.ProgressReporter):
    """The table of trials, on our console: running ones first, then the best that ended."""

    def __init__(self, watcher: Watcher) -> None:
        self.watcher, self._shown_at = watcher, 0.0

    def setup(self, *arguments: Any, **info: Any) -> None:
        pass

    def should_report(self, trials: list[Any], done: bool = False) -> bool:
        return done or time.monotonic() - self._shown_at >= SHOW_EVERY_S

    def report(self, trials: list[Any], done: bool, *sys_info: Any) -> None:
        self._shown_at = time.monotonic()
        counts: dict[str, int] = {}
        for trial in trials:
            counts[trial.status] = counts.get(trial.status, 0) + 1
        order = {"RUNNING": 0, "TERMINATED": 1, "ERROR": 2}
        ranked = sorted(trials, key=lambda t: (order.get(t.status, 3), -self._score(t)))
        shown = [t for t in ranked if t.status in order][:MOST_ROWS]
        if not shown:
            return
        names = list(self.watcher.config.space)
        title = "trials: " + ", ".join(f"{n} {status.lower()}" for status, n in sorted(counts.items()))
        rows = [self._row(t, names) for t in shown]
        self.watcher.console.table(title, [*names, "seed", "status", "step", "reward", "KL", "left"], rows)

    def _score(self, trial: Any) -> float:
        return float((trial.last_result or {}).get("score") or float("-inf"))

    def _row(self, trial: Any, names: Sequence[str]) -> list[Any]:
        ours, result = self.watcher.ours(trial), trial.last_result or {}
        figures = [result.get(name, "") for name in ("step", "score", "KL")]
        left = result.get("left", "") if trial.status == "RUNNING" else ""
        return [*(str(ours.settings.get(n, "")) for n in names), ours.seed, trial.status.lower(), *figures, left]
