"""What became of the trials, read from their run folders, as a table: one row per trial, one per setting."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rlhf_ray.maths.standard_errors import error_of_mean
from rlhf_ray.metrics import confirm_name, read_metrics, standard_error_name
from rlhf_ray.storage.files import atomic_write_text
from rlhf_ray.storage.run import Run
from rlhf_ray.storage.run_folder import is_run, open_run
from rlhf_ray.sweep.evaluation import EVALUATION, evaluated
from rlhf_ray.sweep.trials import Trial

K1, K3, LENGTH, ROWS = "eval/kl_k1_per_response", "eval/kl_k3_per_response", "eval/length", "eval/rows"
Status = Literal["done", "stopped", "failed", "waiting"]


@dataclass(frozen=True)
class TrialOutcome:
    """One trial. first: its held-out evaluation before training; empty if there was none (eval_on_start: false).  last: that of the
    adapter it ended with, which is its last one but for load_best_model_at_end; of an unfinished trial the last.
    reason: why it did not finish."""

    trial: Trial
    status: Status
    reason: str = ""
    step: int = 0
    seconds: float = 0.0
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)

    @property
    def length_ratio(self) -> float:
        """Held-out reply length over that before training; NaN where that was not measured."""
        before = self.first.get(LENGTH, math.nan)
        return self.last.get(LENGTH, math.nan) / before if before else math.nan


def of_replies(metrics: Container[str]) -> bool:
    """Whether these are an evaluation's of PPO, also where what is maximised applies to none of its replies."""
    return "eval/reward" in metrics or LENGTH in metrics


def failure_file(trial: Trial) -> Path:
    return trial.folder.with_name(f"{trial.id}.failure.json")


def outcome_of(trial: Trial, stopped: str = "") -> TrialOutcome:
    """stopped: why the sweep ended it early, if it did."""
    rows = read_metrics(trial.folder / "metrics.jsonl") if (trial.folder / "metrics.jsonl").is_file() else []
    evaluations = [row for row in rows if of_replies(row) or "eval/loss" in row]
    run = open_run(trial.folder, verify=False) if is_run(trial.folder) else None
    done = run is not None and run.manifest()["status"] == "done"
    found = evaluated(trial.folder) if done and trial.is_evaluated else ({}, {})
    done, (before, after) = done and found is not None, found or ({}, {})
    status: Status = "done" if done else "stopped" if stopped else "waiting"
    reason = "" if done else stopped
    if not done and failure_file(trial).is_file():
        failure = json.loads(failure_file(trial).read_text())
        status, reason = "stopped" if failure.get("limit") else "failed", str(failure["error"])
    step = run.result_step() if run is not None and done else None
    kept, begin = ([row for row in evaluations if row["step"] == at] for at in (step, 0))
    return TrialOutcome(
        trial,
        status,
        reason,
        step=int(rows[-1]["step"]) if rows else 0,
        seconds=_seconds(trial, rows, done),
        first={**(begin[0] if begin else {}), **before},
        last={**((kept or evaluations)[-1] if evaluations else {}), **after},
    )


def _seconds(trial: Trial, rows: Sequence[dict[str, float]], done: bool) -> float:
    """Of training and evaluations. PPO's rows tell those of each step; a DPO run logs means over steps, and says its time when it
    is done."""
    if not any("eval/loss" in row for row in rows):
        return math.fsum(row.get("time/step", 0.0) + row.get("time/evaluate", 0.0) for row in rows)
    parts = [trial.folder, *([trial.folder / EVALUATION] if trial.is_evaluated else [])]
    return math.fsum(Run.load(part).seconds for part in parts) if done else 0.0


@dataclass(frozen=True)
class Setting:
    """The trials of one setting that ended, whatever their seed; means over them. missing: seeds that did not, and why."""

    name: str
    settings: dict[str, Any]
    outcomes: tuple[TrialOutcome, ...]
    metric: str
    missing: str = ""

    @property
    def scores(self) -> list[float]:
        return [o.last[self.metric] for o in self.outcomes]

    def by_seed(self) -> dict[int, float]:
        """Seed -> score, in the order of the seeds."""
        return {o.trial.seed: o.last[self.metric] for o in sorted(self.outcomes, key=lambda o: o.trial.seed)}

    @property
    def score(self) -> float:
        return statistics.fmean(self.scores)

    def confirmed(self) -> Setting | None:
        """The same trials on the held-out prompts that chose nothing; None if they were not all measured there."""
        metric = confirm_name(self.metric)
        return replace(self, metric=metric) if all(metric in o.last for o in self.outcomes) else None

    @property
    def prompt_error(self) -> float:
        """Standard error of `score` from the finite number of held-out prompts alone; nan if it was not recorded."""
        name = standard_error_name(self.metric)
        errors = [o.last.get(name, math.nan) for o in self.outcomes]
        return error_of_mean(errors)

    def mean(self, name: str) -> float:
        return statistics.fmean(o.last.get(name, math.nan) for o in self.outcomes)

    @property
    def length_ratio(self) -> float:
        return statistics.fmean(o.length_ratio for o in self.outcomes)


def settings_of(outcomes: Iterable[TrialOutcome], metric: str) -> list[Setting]:
    """Settings with at least one finished trial, in the order of the trials; a trial that was stopped or failed is left out."""
    groups: dict[str, list[TrialOutcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.trial.setting, []).append(outcome)
    settings = []
    for name, group in groups.items():
        ended = tuple(o for o in group if o.status == "done" and metric in o.last)
        seeds = [f"seed {o.trial.seed} {o.status}" for o in group if o not in ended]
        if ended:
            settings.append(Setting(name, ended[0].trial.settings, ended, metric, ", ".join(seeds)))
    return settings


def _columns(metric: str) -> dict[str, str]:
    """Column of the table -> held-out metric in it."""
    confirmed = confirm_name(metric)
    return {
        "score": metric,
        "score_se": standard_error_name(metric),
        "confirmed": confirmed,
        "confirmed_se": standard_error_name(confirmed),
        "kl_k1": K1,
        "kl_k3": K3,
        "length": LENGTH,
        "rows": ROWS,
        "confirmed_rows": confirm_name(ROWS),
    }


def row_of(outcome: TrialOutcome, metric: str) -> dict[str, Any]:
    """A trial as a row of the table; figures that it does not have are None."""
    return {
        "trial": outcome.trial.id,
        **outcome.trial.settings,
        "seed": outcome.trial.seed,
        "status": outcome.status,
        **{column: outcome.last.get(name) for column, name in _columns(metric).items()},
        "length_ratio": None if math.isnan(outcome.length_ratio) else outcome.length_ratio,
        "step": outcome.step,
        "seconds": round(outcome.seconds, 1),
        "reason": outcome.reason,
    }


def outcome_of_row(trial: Trial, row: Mapping[str, Any], metric: str) -> TrialOutcome:
    """The inverse of `row_of`, for a trial whose run folder is not here any more; an older version wrote fewer columns."""
    last = {name: row[column] for column, name in _columns(metric).items() if row.get(column) is not None}
    ratio = row.get("length_ratio")
    return TrialOutcome(
        trial,
        row["status"],
        row["reason"],
        step=row["step"],
        seconds=row["seconds"],
        first={LENGTH: last[LENGTH] / ratio} if ratio and LENGTH in last else {},
        last=last,
    )


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One line per row; a field that some rows lack stays empty there."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write_text(path, text.getvalue())
