"""The parts pages are made of: head, tiles, checks, rows of charts, the chain of stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf_ray.console import duration
from rlhf_ray.report.charts import Chart, draw
from rlhf_ray.report.folder import STAGES, RunFiles
from rlhf_ray.report.html import Html, join, tag
from rlhf_ray.report.numbers import count
from rlhf_ray.report.story import Finding, Tile

TITLES = {
    "sft": "Supervised fine-tuning",
    "dpo": "Direct preference optimisation",
    "reward": "Reward model",
    "ppo": "PPO",
    "evaluate": "Evaluation",
    "pipeline": "Pipeline",
    "demo": "Demo",
}


def title_of(run: RunFiles) -> str:
    return TITLES.get(run.stage, run.stage)


def masthead(run: RunFiles) -> Html:
    base = run.manifest.get("base")
    facts = (
        ("base", run.config.get("model_name_or_path") or (base.get("path") if isinstance(base, dict) else None)),
        ("seed", run.config.get("seed", run.manifest.get("seed"))),
        ("started", _moment(run.manifest.get("created"))),
        ("took", took(run) if run.done else None),
    )
    told = [tag("span", f"{label} ", tag("b", value)) for label, value in facts if value not in (None, "")]
    return tag(
        "header",
        tag("p", title_of(run), chip(run), class_="kind"),
        tag("h1", run.name),
        tag("p", told, class_="figures"),
        missing(run),
    )


def missing(run: RunFiles) -> list[Html]:
    return [tag("p", f"{note}.", class_="missing") for note in run.notes]


def chip(run: RunFiles) -> Html:
    """Whether the run has ended, and how far it has come if not."""
    if run.done:
        return tag("span", "done", class_="chip done")
    total = run.config.get("max_steps")
    of = f" of {total:,}" if isinstance(total, int) and total > 0 else ""
    return tag("span", f"not finished, step {run.steps:,}{of}" if run.rows else "not finished", class_="chip running")


def took(run: RunFiles) -> str:
    return "" if run.seconds is None else duration(run.seconds)


def tiles(items: Sequence[Tile]) -> Html | None:
    cells = [
        tag("div", tag("dt", t.label), tag("dd", t.value, tag("small", t.detail) if t.detail else None)) for t in items
    ]
    return tag("dl", cells, class_="tiles") if cells else None


def findings(items: Sequence[Finding]) -> Html | None:
    """Concerns in full; what is in order folded away."""
    concerns, fine = [f for f in items if f.concern], [f for f in items if not f.concern]
    title = f"{count(len(fine), 'more check' if concerns else 'check')} in order"
    return (
        join(
            tag("ul", [_finding(f) for f in concerns], class_="findings") if concerns else None,
            tag("details", tag("summary", title), tag("ul", [_finding(f) for f in fine], class_="findings"))
            if fine
            else None,
        )
        or None
    )


def _finding(finding: Finding) -> Html:
    return tag("li", tag("b", finding.title), f": {finding.text}", class_="concern" if finding.concern else "fine")


def charts(items: Sequence[Chart], run: RunFiles) -> Html | None:
    steps = [x for name in run.names() for x, _ in run.points(name)]
    span = (min(steps), max(steps)) if steps else None
    drawn = [figure for chart in items if (figure := draw(chart, span))]
    return tag("div", drawn, class_="charts") if drawn else None


def chain(run: RunFiles) -> Html:
    """The stages of a pipeline in the order they run, each with its state and a link to its own report."""
    cells = [
        tag("li", tag("b", report_link(name, title_of(child), child)), chip(child), tag("small", took(child)))
        for name in STAGES
        if (child := run.children.get(name)) is not None
    ]
    return tag("ol", cells, class_="chain")


def report_link(folder: str, text: str, child: RunFiles) -> Html | str:
    """`text`, linked to the stage's own report where there is one."""
    return tag("a", text, href=f"{folder}/report.html") if (child.path / "report.html").is_file() else text


def _moment(value: Any) -> str | None:
    """2026-01-02T03:04:05.6+00:00 without what nobody reads."""
    return str(value)[:19].replace("T", " ") if value else None
