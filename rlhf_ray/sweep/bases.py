"""The driver of a sweep whose trials share bases (`share_base`): Tune's scheduler and searcher, without a process for each trial.

A process holds one base and up to `trials_per_base` trials (`host.py`): an actor of Ray's, or with learner.num_workers 0 the driver
itself, without Ray, whose own processes take more memory than some bases. Tune would give every trial a process of its own, which
imports Tune and, for a trial, torch; here its schedulers and searchers are asked directly, about trials that live elsewhere.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from rlhf_ray.config.sweep import SweepConfig
from rlhf_ray.console import Console
from rlhf_ray.launch.resources import ACCELERATOR
from rlhf_ray.sweep.capacity import Capacity
from rlhf_ray.sweep.host import GO_ON, STOP, Event, Host
from rlhf_ray.sweep.record import Record
from rlhf_ray.sweep.sharing import processes
from rlhf_ray.sweep.space import read_space
from rlhf_ray.sweep.tuning import Watcher, scheduler_of

ENVIRONMENT = {"MALLOC_ARENA_MAX": "1"}
"""Of a process: glibc gives each thread a heap of its own, and what one trial has freed the next one could not use. They take
turns, so that one heap for all has no price."""
M_ARENA_MAX = -8
"""Its name to glibc's mallopt."""
POLL_S = 1.0
"""How long a process is asked for news at a time: how soon the driver notices a signal, or the end of its time."""
SAVE_S = 20.0
"""How long trials that are ended with the sweep may take to save their last whole step."""


@dataclass(eq=False)
class Placed:
    """A trial as Tune's schedulers, and our `Watcher`, know trials. tries: starts after the first one."""

    trial_id: str
    config: dict[str, Any]
    status: str = "PENDING"
    last_result: dict[str, Any] = field(default_factory=dict)
    tries: int = 0

    @property
    def params(self) -> dict[str, Any]:
        params: dict[str, Any] = self.config["trial"]
        return params


class _Alone:
    """What a scheduler may ask of Tune's controller: no trial waits for another one to be paused."""

    def get_live_trials(self) -> list[Any]:
        return []


class _Process:
    """A process with a base. trials: that it trains, by our name.  turn: a file that says whose turn it is there."""

    def __init__(self, config: SweepConfig, fits: Capacity, turn: Path) -> None:
        self.turn = turn
        each = {k: v for k, v in fits.each.items() if k not in ("CPU", "GPU")}
        options: dict[str, Any] = {"num_cpus": fits.each.get("CPU", 0), "num_gpus": fits.each.get("GPU", 0)}
        accelerator = next((k.removeprefix(ACCELERATOR) for k in each if k.startswith(ACCELERATOR)), None)
        self._make = lambda: (
            ray.remote(Host)
            .options(
                **options,
                accelerator_type=accelerator,
                max_concurrency=4,
                runtime_env={"env_vars": ENVIRONMENT},
            )
            .remote(config, fits.threads, os.getcwd(), str(turn.absolute()))
        )
        self.trials: dict[str, Placed] = {}
        self.answers: dict[str, str] = {}
        self.begin()

    def begin(self) -> None:
        """Start the process, or another one after it died."""
        self.turn.unlink(missing_ok=True)
        self.actor: Any = self._make()
        self.news: Any = None
        self.begun: dict[Any, list[str]] = {}  # answers to come of `start`, and its trials

    def start(self, trials: Sequence[tuple[str, Placed]]) -> None:
        self.trials |= dict(trials)
        begun = self.actor.start.remote([placed.params for _, placed in trials])
        self.begun[begun] = [name for name, _ in trials]

    def ask(self) -> Any:
        """The answer to come, of what is new."""
        if self.news is None:
            self.news = self.actor.news.remote(self.answers, POLL_S)
            self.answers = {}
        return self.news


class _Here:
    """This very process, with a base: what `_Process` is, without Ray. It dies with its trials, which the sweep's resume goes on
    with."""

    def __init__(self, config: SweepConfig, fits: Capacity, turn: Path) -> None:
        self.turn = turn
        self.trials: dict[str, Placed] = {}
        self.answers: dict[str, str] = {}
        if sys.platform == "linux":  # what ENVIRONMENT says to a process that is yet to start
            ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
        self.host = Host(config, fits.threads, os.getcwd(), str(turn.absolute()))

    def start(self, trials: Sequence[tuple[str, Placed]]) -> None:
        self.trials |= dict(trials)
        self.host.start([placed.params for _, placed in trials])

    def news(self) -> list[Event]:
        """What has happened; waits for something for a while."""
        answers, self.answers = self.answers, {}
        return self.host.news(answers, POLL_S)


class SharedTrials:
    """Trials of a sweep on shared bases, until all have ended. Failed and stopped ones are in the record, not raised."""

    def __init__(self, config: SweepConfig, record: Record, fits: Capacity, console: Console) -> None:
        self.config, self.record, self.console = config, record, console
        self.watcher = Watcher(config, record, console)
        self.scheduler = scheduler_of(config)
        self.scheduler.set_search_properties("score", "max")
        self.search: Any = None
        self.waiting = [Placed(t.id, {"trial": {"settings": t.settings, "seed": t.seed}}) for t in record.left()]
        self.to_suggest = 0
        if config.search == "optuna":
            from rlhf_ray.sweep.suggest import Suggestions

            self.waiting, self.search = [], Suggestions(read_space(config.space), config, record)
            self.to_suggest = self.search.to_run
        count, self.at_once = processes(config, fits, len(self.waiting) or self.to_suggest)
        self.all: list[Placed] = []
        turns = [record.folder / f".turn{i}" for i in range(count)]
        self.processes: list[_Process | _Here] = (
            [_Here(config, fits, turns[0])] if fits.is_here else [_Process(config, fits, turn) for turn in turns]
        )

    def run(self) -> None:
        try:
            self._fill()
            while any(process.trials for process in self.processes):
                self._hear()
                self._show()
                if self.watcher.out_of_time:
                    break
                self._fill()
        finally:
            self._close()
        self.watcher.close()
        self._show(done=True)

    def _fill(self) -> None:
        """Start trials where there is room, each process's together."""
        room = self.at_once - sum(len(process.trials) for process in self.processes)
        coming: dict[int, list[tuple[str, Placed]]] = {}
        for _ in range(room):
            placed = self._next()
            if placed is None:
                break
            number = min(
                range(len(self.processes)), key=lambda i: len(self.processes[i].trials) + len(coming.get(i, ()))
            )
            placed.status = "RUNNING"
            coming.setdefault(number, []).append((self.watcher.ours(placed).id, placed))
            self.watcher.on_trial_start(0, self.all, placed)
        for number, trials in coming.items():
            self.processes[number].start(trials)

    def _next(self) -> Placed | None:
        """The next trial to be started: one that waits, or one that is suggested."""
        if self.waiting:
            placed = self.waiting.pop(0)
        elif self.to_suggest > 0:
            self.to_suggest -= 1
            name = f"suggested{self.to_suggest}"
            suggested = self.search.suggest(name)
            if suggested == Searcher.FINISHED:
                self.to_suggest = 0
                return None
            placed = Placed(name, suggested)
        else:
            return None
        if placed not in self.all:
            self.all.append(placed)
            self.scheduler.on_trial_add(_Alone(), placed)  # type: ignore[arg-type]
        return placed

    def _hear(self) -> None:
        asked: dict[Any, _Process] = {}
        for process in self.processes:
            if isinstance(process, _Here):
                self._take(process, process.news())
            elif process.trials:
                asked |= dict.fromkeys((*process.begun, process.ask()), process)
        ready, _ = ray.wait(list(asked), timeout=2 * POLL_S) if asked else ([], [])
        for reference in ready:
            process = asked[reference]
            begun = process.begun.pop(reference, None)
            try:
                found = ray.get(reference)
                if begun is None:
                    process.news = None
                    self._take(process, found)
            except RayError as error:
                if begun is not None and isinstance(error, RayTaskError):
                    self._not_begun(process, begun, error)
                else:
                    self._died(process, error)

    def _take(self, process: _Process | _Here, events: Sequence[Event]) -> None:
        """Judge what trials of `process` have told, and note which have ended."""
        for event in events:
            placed = process.trials[event["trial"]]
            if "report" in event:
                process.answers[event["trial"]] = self._judge(placed, event["report"])
            else:
                del process.trials[event["trial"]]
                self._ended(placed, event["end"])

    def _judge(self, placed: Placed, report: dict[str, Any]) -> str:
        """Whether a trial goes on after an evaluation."""
        placed.last_result = report
        self.watcher.on_trial_result(report["evaluation"], self.all, placed, placed.last_result)
        decision = self.scheduler.on_trial_result(_Alone(), placed, placed.last_result)  # type: ignore[arg-type]
        return STOP if decision == TrialScheduler.STOP else GO_ON

    def _ended(self, placed: Placed, end: str) -> None:
        if end not in ("done", "stopped"):
            self._failed(placed)
            return
        placed.status = "TERMINATED"
        self.scheduler.on_trial_complete(_Alone(), placed, placed.last_result)  # type: ignore[arg-type]
        self._tell_search(placed, error=False)
        self.watcher.on_trial_complete(0, self.all, placed)

    def _failed(self, placed: Placed, counts: bool = True) -> None:
        """Try it again, from its newest checkpoint, or leave it.   counts: as one of its own failures."""
        if placed.tries < self.config.max_trial_failures or not counts:
            placed.tries += counts
            placed.status = "PENDING"
            self.waiting.insert(0, placed)
            return
        placed.status = "ERROR"
        self.scheduler.on_trial_error(_Alone(), placed)  # type: ignore[arg-type]
        self._tell_search(placed, error=True)
        self.watcher.on_trial_error(0, self.all, placed)

    def _not_begun(self, process: _Process, names: Sequence[str], error: RayTaskError) -> None:
        """The process lives, but could not start these trials."""
        self.console.warn(f"{len(names)} trials could not be started: {type(error.cause).__name__}: {error.cause}")
        for name in reversed(names):
            self._failed(process.trials.pop(name))

    def _died(self, process: _Process, error: RayError) -> None:
        """Its trials resume in another process. Whoever had the turn is to blame; where nobody had it, all may be."""
        first = next(iter(str(error).splitlines()), type(error).__name__)
        self.console.warn(f"the process of {len(process.trials)} trials died, and they resume in another one: {first}")
        blamed = process.turn.read_text() if process.turn.is_file() else ""
        lost, process.trials, process.answers = dict(process.trials), {}, {}
        process.begin()
        for name, placed in reversed(lost.items()):
            self._failed(placed, counts=blamed not in lost or name == blamed)

    def _tell_search(self, placed: Placed, error: bool) -> None:
        if self.search is not None:
            self.search.on_trial_complete(placed.trial_id, placed.last_result, error)

    def _show(self, done: bool = False) -> None:
        if self.watcher.reporter.should_report(self.all, done):
            self.watcher.reporter.report(self.all, done)

    def _close(self) -> None:
        """End the processes; trials that run save what is whole."""
        away = [process for process in self.processes if isinstance(process, _Process)]
        busy = [process.actor.close.remote(SAVE_S) for process in away if process.trials]
        if busy:
            ray.wait(busy, num_returns=len(busy), timeout=SAVE_S + POLL_S)
        for process in self.processes:
            if isinstance(process, _Here):
                process.host.close(SAVE_S)
            else:
                ray.kill(process.actor)
            process.turn.unlink(missing_ok=True)
