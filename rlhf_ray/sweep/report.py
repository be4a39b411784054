"""The page of a sweep: who wins and how surely, reward against measured KL, curves, replies, and what did not finish."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_ray.config.stored import load_stored
from rlhf_ray.config.sweep import SweepConfig
from rlhf_ray.maths.standard_errors import pooled_deviation
from rlhf_ray.metrics import read_metrics
from rlhf_ray.report.charts import Chart, Line, draw
from rlhf_ray.report.html import Html, join, tag
from rlhf_ray.report.numbers import count, shown, with_error
from rlhf_ray.report.plane import Dots, Plane, draw_plane
from rlhf_ray.report.render import Section, document, write_page
from rlhf_ray.report.samples import samples_section
from rlhf_ray.storage.run_folder import open_run
from rlhf_ray.sweep.choice import (
    CONFIDENCE,
    Choice,
    comparison_sentence,
    conclusion,
    confirmation_sentence,
    frontier,
    score_error,
)
from rlhf_ray.sweep.evaluation import EVALUATION, TRAINED
from rlhf_ray.sweep.record import Record, setting_row
from rlhf_ray.sweep.results import K1, K3, LENGTH, Setting, TrialOutcome, row_of
from rlhf_ray.sweep.trials import planned

MOST_GROUPS = 12
_SPREADS = {
    "seeds as blocks": "the spread between seeds, pooled over settings",
    "seeds": "the spread between seeds, pooled over settings",
    "prompts": "the prompts of one seed",
}
CURVES = (
    ("Held-out reward", "", "reward"),
    ("KL to the reference", K1, "nats"),
    ("The penalty itself", "kl/penalty_per_response", "nats"),
    ("Reply length", LENGTH, "tokens"),
    ("Entropy", "policy/entropy", "nats"),
)
"""Heading, metric (empty: the one that is maximised), unit."""


def write_sweep_report(folder: str | Path) -> Path:
    """Write report.html of a sweep, finished or not, from its trials' run folders; its path. ArtifactError if it is no sweep."""
    run = open_run(folder, verify=False)
    values = {**run.config(), "output_dir": str(run.path)}
    config = load_stored(SweepConfig, values, str(run.path / "config.yaml"))
    record = Record(config, run.path, planned(config))
    outcomes = record.outcomes()
    settings, choice = record.choice(outcomes)
    head = tag(
        "header",
        tag("p", "Sweep", class_="kind"),
        tag("h1", run.path.name),
        tag(
            "p",
            [
                tag("span", f"{label} ", tag("b", value))
                for label, value in (
                    ("base", config.model_name_or_path),
                    ("maximises", config.metric),
                    ("search", config.search),
                    ("early stopping", config.scheduler),
                    ("seeds", ", ".join(map(str, config.seeds))),
                )
            ],
            class_="figures",
        ),
    )
    groups = grouped(config, settings)
    sections: list[Section] = [
        (
            "summary",
            "",
            join(tag("p", sentence(config, choice), class_="sentence"), _planes(config, groups, settings, choice)),
        ),
        ("settings", "Settings", settings_table(settings, choice)),
        *(
            (f"curve-{i}", title, _curves(config, groups, name or config.metric, unit))
            for i, (title, name, unit) in enumerate(CURVES)
        ),
        ("samples", "Replies on the frontier", _samples(config, settings, choice)),
        ("unfinished", "Stopped early, failed, or not run", _unfinished(outcomes, config)),
        ("trials", "All trials", _trials(outcomes, config)),
    ]
    return write_page(run.path, document(f"{run.path.name} · Sweep", head, sections))


def sentence(config: SweepConfig, choice: Choice) -> str:
    """The outcome in a line or two, with its uncertainty."""
    if choice.winner is None:
        return (
            "No setting finished within the KL cap and the length ratio."
            if choice.excluded
            else "No trial has finished yet."
        )
    kl, found = choice.winner.mean(K1), conclusion(choice, config.metric)
    measured = "" if math.isnan(kl) else f", KL {shown(kl)} nats"
    text = f"{found[0].upper()}{found[1:]}{measured}. {confirmation_sentence(choice)}"
    if choice.p:
        text += f" {comparison_sentence(choice)}"
    if choice.not_worse:
        named = "; ".join(label(s) for s in choice.not_worse[:4])
        more = f"; and {len(choice.not_worse) - 4} more" if len(choice.not_worse) > 4 else ""
        text += f" Not shown to be worse: {named}{more}."
    return text


def label(setting: Setting) -> str:
    return ", ".join(f"{name}={_setting(value)}" for name, value in setting.settings.items())


def _setting(value: Any) -> str:
    """As in a job file: 0.1, not 0.100."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _text(value: Any) -> str:
    return shown(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def grouped(config: SweepConfig, settings: Sequence[Setting]) -> dict[str, list[Setting]]:
    """Settings by the value of the field that is compared: the KL penalty if it varies, else the first whose values are words."""
    names = [n for n in config.space if any(isinstance(s.settings.get(n), (str, bool)) for s in settings)]
    field = "kl_penalty" if "kl_penalty" in names else names[0] if names else None
    groups: dict[str, list[Setting]] = {}
    for setting in settings:
        groups.setdefault(str(setting.settings[field]) if field else "all settings", []).append(setting)
    return groups


def _planes(
    config: SweepConfig, groups: dict[str, list[Setting]], settings: Sequence[Setting], choice: Choice
) -> Html | None:
    if not settings:
        return None
    spread = pooled_deviation([s.scores for s in settings])
    drawn = []
    for name, what in ((K1, "k1"), (K3, "k3")):
        if any(math.isnan(s.mean(name)) for s in settings):  # DPO samples nothing; an evaluation of it has no k3
            continue
        best = sorted((s.mean(name), s.score) for s in frontier(settings)) if name == K1 else []
        series = [
            Dots(
                group,
                [(s.mean(name), s.score) for s in members],
                [label(s) for s in members],
                [s.score - score_error(s, spread) for s in members],
                [s.score + score_error(s, spread) for s in members],
            )
            for group, members in groups.items()
        ]
        marked = (choice.winner.mean(name), choice.winner.score) if choice.winner is not None else None
        limit = (config.kl_cap, f"KL cap {config.kl_cap:g}") if config.kl_cap is not None and name == K1 else None
        note = "Means over seeds, one standard error up and down; the ring is the setting to promote"
        note += ", the line joins settings that no other beats" if best else ""
        note += f", dots mark the KL cap of {config.kl_cap:g}." if limit is not None else "."
        drawn.append(
            draw_plane(
                Plane(f"Reward against measured KL ({what})", "nats per reply", series, best, marked, limit, note)
            )
        )
    return tag("div", drawn, class_="charts") if drawn else None


def settings_table(settings: Sequence[Setting], choice: Choice) -> Html | None:
    """One row per setting that finished, best first."""
    if not settings:
        return None
    ordered = sorted(settings, key=lambda s: -s.score)
    rows = [setting_row(s, choice, settings) for s in ordered]
    names = list(ordered[0].settings)
    spread = pooled_deviation([s.scores for s in settings])
    told = (("kl_k1", "KL (k1)"), ("kl_k3", "KL (k3)"), ("length", "length"))
    figures = [(name, title) for name, title in told if any(row[name] is not None for row in rows)]
    head = [tag("th", n, scope="col") for n in names]
    head += [tag("th", n, class_="number", scope="col") for n in ("seeds", "score", *(h for _, h in figures))]
    head += [tag("th", n, scope="col") for n in ("frontier", "verdict")]
    head.append(tag("th", "p", class_="number", scope="col"))
    body = []
    for setting, row in zip(ordered, rows):
        cells = [tag("td", _setting(row[n])) for n in names]
        cells.append(tag("td", str(row["seeds"]), class_="number"))
        cells.append(tag("td", with_error(setting.score, score_error(setting, spread)), class_="number"))
        cells += [tag("td", "" if row[n] is None else shown(row[n]), class_="number") for n, _ in figures]
        verdict = "highest mean" if row["verdict"] == "winner" and choice.not_worse else row["verdict"]
        cells += [tag("td", "yes" if row["on_frontier"] else ""), tag("td", verdict)]
        cells.append(tag("td", "" if row["p_equal"] is None else shown(row["p_equal"]), class_="number"))
        body.append(tag("tr", cells))
    rule = (
        f"± is one standard error of a setting's own mean, from {_SPREADS[choice.by]}. p: the share of sweeps that would put any"
        f" setting as far below the highest mean if all were equal (studentized range over {choice.compared} settings)."
        f" “worse”: p below {1 - CONFIDENCE:.2g}."
    )
    table = tag("table", tag("thead", tag("tr", head)), tag("tbody", body))
    return tag("div", table, tag("p", rule, class_="note"), class_="wide")


def _curves(config: SweepConfig, groups: dict[str, list[Setting]], name: str, unit: str) -> Html | None:
    """A chart for each group, a line for each of its settings, a band from the lowest to the highest seed."""
    drawn = []
    for group, settings in list(groups.items())[:MOST_GROUPS]:
        lines = [line for s in settings if (line := _line(s, name, group)).points]
        if lines:
            drawn.append(draw(Chart(group, unit, lines, whiskers="")))
    return tag("div", drawn, class_="charts") if drawn else None


def _line(setting: Setting, name: str, group: str) -> Line:
    values: dict[float, list[float]] = {}
    files = [o.trial.folder / "metrics.jsonl" for o in setting.outcomes]
    files = [path for path in files if path.is_file()]  # of folders that are still here
    for path in files:
        for row in read_metrics(path):
            if name in row:
                values.setdefault(float(row["step"]), []).append(row[name])
    whole = {step: v for step, v in sorted(values.items()) if len(v) == len(files)}
    rest = ", ".join(f"{n} {_setting(v)}" for n, v in setting.settings.items() if str(v) != group) or "all"
    return Line(
        rest,
        [(step, sum(v) / len(v)) for step, v in whole.items()],
        low=[(step, min(v)) for step, v in whole.items()] if len(files) > 1 else [],
        high=[(step, max(v)) for step, v in whole.items()] if len(files) > 1 else [],
    )


def _samples(config: SweepConfig, settings: Sequence[Setting], choice: Choice) -> Html | None:
    """The last replies of each setting on the frontier, side by side: of one seed, since other seeds have other prompts."""
    found = []
    for setting in frontier(settings):
        first = min(setting.outcomes, key=lambda o: config.seeds.index(o.trial.seed))
        folder = first.trial.folder / EVALUATION if first.trial.is_evaluated else first.trial.folder
        path = folder / "samples.jsonl"
        rows = read_metrics(path) if path.is_file() else []
        rows = [row for row in rows if row.get("policy", TRAINED) == TRAINED]
        last = max((row["step"] for row in rows), default=0)
        found += [{**row, "policy": label(setting)} for row in rows if row["step"] == last]
    return samples_section([{k: v for k, v in row.items() if k != "step"} for row in found])


def _unfinished(outcomes: Sequence[TrialOutcome], config: SweepConfig) -> Html | None:
    left = [o for o in outcomes if o.status != "done"]
    return _rows(left, config, ("trial", "status", "step", "score", "reason")) if left else None


def _trials(outcomes: Sequence[TrialOutcome], config: SweepConfig) -> Html:
    names = ("trial", *config.space, "seed", "status", "score", "kl_k1", "kl_k3", "length", "step", "seconds")
    title = count(len(outcomes), "trial")
    return tag("details", tag("summary", title), _rows(outcomes, config, names))


def _rows(outcomes: Sequence[TrialOutcome], config: SweepConfig, names: Sequence[str]) -> Html:
    head = tag("tr", [tag("th", n, scope="col") for n in names])
    body = [tag("tr", [tag("td", _cell(o, row_of(o, config.metric).get(n), n)) for n in names]) for o in outcomes]
    return tag("div", tag("table", tag("thead", head), tag("tbody", body)), class_="wide")


def _cell(outcome: TrialOutcome, value: Any, name: str) -> Html | str:
    if name == "trial":
        report = outcome.trial.folder / "report.html"
        link = f"trials/{outcome.trial.id}/report.html"
        return tag("a", outcome.trial.id, href=link) if report.is_file() else outcome.trial.id
    return "" if value is None else _text(value)
