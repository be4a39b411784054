"""What a sweep remembers beside its trials' run folders (sweep.json): which trials there are, which were ended early, and why.

A trial is what its run folder says. Where that is gone (deleted for room, or not copied along with the sweep), it is what
sweep.json said of it last, so that nothing that is done is trained again.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf_ray.config.sweep import SweepConfig
from rlhf_ray.storage.files import atomic_write_json
from rlhf_ray.storage.run_folder import is_run
from rlhf_ray.sweep.choice import CONFIDENCE, Choice, Confirmed, choose, conclusion, frontier
from rlhf_ray.sweep.results import (
    K1,
    K3,
    LENGTH,
    Setting,
    TrialOutcome,
    outcome_of,
    outcome_of_row,
    row_of,
    settings_of,
    write_csv,
)
from rlhf_ray.sweep.space import has_ranges, read_space, size
from rlhf_ray.sweep.trials import Trial, trial_of

SCHEMA = 1
OUT_OF_TIME = "the time budget of "
"""How a reason starts that says so."""
NOT_WORSE = "not shown to be worse"


class Record:
    """The trials of a sweep and what became of them.

    finished: the sweep came to its end, and was given no more time since: only what failed is tried again, however often that is
    interrupted."""

    def __init__(self, config: SweepConfig, folder: Path, planned: Sequence[Trial]) -> None:
        """planned: trials known beforehand."""
        self.config, self.folder = config, folder
        self.trials: dict[str, Trial] = {trial.id: trial for trial in planned}
        self.stopped: dict[str, str] = {}
        self.finished = False
        self._rows: dict[str, dict[str, Any]] = {}  # trial -> what an earlier start wrote of it
        self._lock = threading.RLock()
        if (folder / "sweep.json").is_file():
            before = json.loads((folder / "sweep.json").read_text())
            self.finished = before.get("finished", False)
            self._rows = {row["trial"]: row for row in before["trials"]}
            for row in self._rows.values():
                for seed in config.seeds:  # a suggestion is tried with all of them, wherever the sweep was cut off
                    trial = trial_of(config, row["settings"], seed)
                    self.trials.setdefault(trial.id, trial)
                if row["status"] == "stopped":
                    self.stopped[row["trial"]] = row["reason"]

    def add(self, trial: Trial) -> None:
        with self._lock:
            self.trials.setdefault(trial.id, trial)

    def stop(self, trial: Trial, reason: str) -> None:
        """Note that the sweep ended `trial` before its end."""
        with self._lock:
            self.stopped[trial.id] = reason

    @property
    def has_stopped_for_time(self) -> bool:
        return any(reason.startswith(OUT_OF_TIME) for reason in self.stopped.values())

    def begin(self, finished: bool, has_more_time: bool) -> None:
        """Before a start.   finished: whether its run is.  has_more_time: than at the last start.

        What the time budget stopped waits again, since that was no verdict on it, unless the sweep is finished: then it takes more
        time for that, and for seeds of a suggestion that were never started."""
        with self._lock:
            self.finished = (finished or self.finished) and not has_more_time
            if self.finished:
                self.trials = {name: trial for name, trial in self.trials.items() if name in self._rows}
            else:
                self.stopped = {name: why for name, why in self.stopped.items() if not why.startswith(OUT_OF_TIME)}

    def outcome(self, trial: Trial) -> TrialOutcome:
        """As its run folder says; as sweep.json said where that is gone."""
        found = outcome_of(trial, self.stopped.get(trial.id, ""))
        row = self._rows.get(trial.id, {})
        if_gone = {"done": "waiting", "failed": "waiting", "stopped": "stopped"}.get(row.get("status", ""))
        if found.status != if_gone or is_run(trial.folder):
            return found
        return outcome_of_row(trial, row, self.config.metric)

    def outcomes(self) -> list[TrialOutcome]:
        return [self.outcome(trial) for trial in list(self.trials.values())]

    def left(self) -> list[Trial]:
        """Trials to be run: those that failed are tried again."""
        return [o.trial for o in self.outcomes() if o.status not in ("done", "stopped")]

    def to_suggest(self) -> int:
        """Settings that optuna is still to suggest: new ones, of which a space of lists has no more than its combinations."""
        if self.config.search != "optuna" or self.finished:
            return 0
        wanted, space = self.config.num_samples, read_space(self.config.space)
        if not has_ranges(space):
            wanted = min(wanted, size(space))
        return max(wanted - len({trial.setting for trial in self.trials.values()}), 0)

    def choice(self, outcomes: Sequence[TrialOutcome]) -> tuple[list[Setting], Choice]:
        """The settings that finished, and which of them wins. outcomes: of `outcomes`, which reads every trial's folder."""
        settings = settings_of(outcomes, self.config.metric)
        return settings, choose(settings, self.config.kl_cap, self.config.length_ratio)

    def write(self) -> None:
        """sweep.json, trials.csv and settings.csv, anew."""
        with self._lock:
            outcomes = self.outcomes()
            settings, choice = self.choice(outcomes)
            rows = [{**row_of(o, self.config.metric), **self._where(o)} for o in outcomes]
            write_csv(self.folder / "trials.csv", [{k: v for k, v in row.items() if k != "settings"} for row in rows])
            write_csv(self.folder / "settings.csv", [setting_row(s, choice, settings) for s in settings])
            atomic_write_json(
                self.folder / "sweep.json",
                {
                    "schema": SCHEMA,
                    "metric": self.config.metric,
                    "finished": self.finished,
                    "trials": rows,
                    "settings": [setting_row(s, choice, settings) for s in settings],
                    "choice": choice_record(choice, self.config),
                },
            )

    def _where(self, outcome: TrialOutcome) -> dict[str, Any]:
        trial = outcome.trial
        return {"setting": trial.setting, "settings": trial.settings, "run_dir": f"trials/{trial.id}"}


def setting_row(setting: Setting, choice: Choice, settings: Sequence[Setting]) -> dict[str, Any]:
    """A setting as a row of the table: means over its seeds."""
    why = {s.name: text for s, text in choice.excluded}
    best = {s.name for s in frontier(settings)}
    verdict = (
        "winner"
        if choice.winner is not None and setting.name == choice.winner.name
        else f"excluded: {why[setting.name]}"
        if setting.name in why
        else NOT_WORSE
        if setting.name in {s.name for s in choice.not_worse}
        else "worse"
    )
    return {
        "setting": setting.name,
        **setting.settings,
        "seeds": len(setting.outcomes),
        "score": setting.score,
        "score_low": min(setting.scores),
        "score_high": max(setting.scores),
        "kl_k1": _known(setting.mean(K1)),
        "kl_k3": _known(setting.mean(K3)),
        "length": _known(setting.mean(LENGTH)),
        "length_ratio": _known(setting.length_ratio),
        "on_frontier": setting.name in best,
        "verdict": verdict,
        "p_equal": _known(choice.p.get(setting.name)),
    }


def _plain(confirmed: Confirmed | None) -> dict[str, Any] | None:
    """JSON has no NaN: one prompt has no standard error."""
    if confirmed is None:
        return None
    return {k: _known(v) for k, v in asdict(confirmed).items()}


def _known(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _rule(choice: Choice, config: SweepConfig) -> str:
    """In words; a cap that was not applied to the winner, for want of what it caps, says so."""

    def applied(measured: float) -> str:
        return " (not measured)" if math.isnan(measured) else ""

    kl, ratio = (choice.winner.mean(K1), choice.winner.length_ratio) if choice.winner else (0.0, 1.0)
    rule = f"highest mean {config.metric} over the seeds, of settings with the most finished trials"
    if config.kl_cap is not None:
        rule += f", mean KL (k1) at most {config.kl_cap:g} nats{applied(kl)}"
    if config.length_ratio is not None:
        rule += f", reply length within {config.length_ratio:g} times of what it was{applied(ratio)}"
    return rule


def choice_record(choice: Choice, config: SweepConfig) -> dict[str, Any]:
    """The winner, the rule it won by, and how sure that is, as plain JSON."""
    told: dict[str, Any] = {
        "rule": _rule(choice, config),
        "worse": "studentized range over all settings compared",
        "confidence": CONFIDENCE,
        "compared": choice.compared,
        "spread_of": choice.by,
    }
    if choice.winner is None or choice.trial is None:
        return told | {"setting": None}
    return told | {
        "conclusion": conclusion(choice, config.metric),
        "setting": choice.winner.name,
        "settings": choice.winner.settings,
        "score": choice.winner.score,
        "score_se": _known(choice.error),
        "trial": choice.trial.trial.id,
        "run_dir": f"trials/{choice.trial.trial.id}",
        "not_shown_to_be_worse": [s.name for s in choice.not_worse],
        "excluded": {s.name: why for s, why in choice.excluded},
        "confirmed": _plain(choice.confirmed),
    }
