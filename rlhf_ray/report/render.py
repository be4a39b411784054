"""The page: one HTML file that needs nothing else, and a content policy that forbids it to load or send anything."""

from __future__ import annotations

import base64
import hashlib
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_ray.report.compare import compared, comparison, comparison_table, evaluate_story
from rlhf_ray.report.folder import RunFiles, read_folder
from rlhf_ray.report.html import Html, join, tag
from rlhf_ray.report.layout import chain, charts, findings, masthead, missing, report_link, tiles, title_of
from rlhf_ray.report.ppo import ppo_story
from rlhf_ray.report.provenance import all_metrics, configuration, provenance, roles
from rlhf_ray.report.samples import samples_section
from rlhf_ray.report.story import Story
from rlhf_ray.report.supervised import dpo_story, reward_story, sft_story

STORIES: dict[str, Callable[[RunFiles], Story]] = {
    "sft": sft_story,
    "dpo": dpo_story,
    "reward": reward_story,
    "ppo": ppo_story,
    "evaluate": evaluate_story,
}
CHARTS_ON_COVER = 4

# Anchor, heading, content; without content a section is left out.
Section = tuple[str, str, Any]


def write_report(run_dir: str | Path) -> Path:
    """Write `run_dir/report.html` from the files of the run folder, finished or not, and return its path.

    A folder of stage folders (pipeline, demo) gets a cover page. Raises ArtifactError if `run_dir` is not a run folder.
    """
    run = read_folder(Path(run_dir))
    return write_page(run.path, page(run))


def sheet_page(title: str, samples: Sequence[Mapping[str, Any]]) -> str:
    """A document of replies side by side alone. samples: rows as an evaluation writes them to samples.jsonl."""
    head = tag("header", tag("h1", title), tag("p", f"{len({str(s.get('prompt')) for s in samples}):,} prompts"))
    return document(title, head, [("samples", "Replies side by side", samples_section([dict(s) for s in samples]))])


def write_page(folder: Path, text: str) -> Path:
    """Put `text` into `folder`/report.html, whole or not at all."""
    target = folder / "report.html"
    temporary = folder / f".report.html.tmp-{uuid.uuid4().hex[:12]}"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def page(run: RunFiles) -> str:
    """The whole document of a run."""
    return document(f"{run.name} · {title_of(run)}", masthead(run), _cover(run) if run.children else _stage(run))


def document(title: str, head_of_page: Html, contents: Sequence[Section]) -> str:
    """A page of ours: its head, links to its sections, and those of them that have content."""
    here = Path(__file__).parent
    script = Html((here / "script.js").read_text(encoding="utf-8"))
    style = Html((here / "style.css").read_text(encoding="utf-8"))
    sections = [section for section in contents if section[2]]
    links = [tag("a", heading, href=f"#{anchor}") for anchor, heading, _ in sections if heading]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(script)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", style),
    )
    body = tag(
        "body",
        head_of_page,
        tag("nav", links) if len(links) > 2 else None,
        tag("main", [_section(*section) for section in sections]),
        tag("footer", "Written by rlhf_ray from the files of this run folder."),
        tag("script", script),
    )
    text = "<!DOCTYPE html>\n" + tag("html", head, body, lang="en") + "\n"
    return text.encode("utf-8", errors="backslashreplace").decode(
        "utf-8"
    )  # a lone surrogate in a reply cannot be UTF-8


def _policy(script: str) -> str:
    """Only our own script runs, known by its hash: markup that slipped through in a reply could still do nothing."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def _section(anchor: str, title: str, content: Any) -> Html:
    return tag("section", tag("h2", title) if title else None, content, id=anchor)


def _story(run: RunFiles) -> Story:
    teller = STORIES.get(run.stage)
    return teller(run) if teller else Story(f"A run of the stage {run.stage}.")


def _stage(run: RunFiles) -> list[Section]:
    story = _story(run)
    beside_charts = join(story.tables) if story.groups else None
    summary = join(
        tag("p", story.sentence, class_="sentence"),
        tiles(story.tiles),
        None if beside_charts else story.tables,
        findings(story.findings),
    )
    return [
        ("summary", "", summary),
        *((title.lower().replace(" ", "-"), title, charts(group, run)) for title, group in story.groups),
        ("last-evaluation", "Last evaluation", beside_charts),
        ("samples", "Samples", samples_section(run.samples)),
        ("provenance", "Provenance", _fine_print(run)),
    ]


def _fine_print(run: RunFiles) -> Html:
    return join(provenance(run), configuration(run), roles(run), all_metrics(run) if run.stage != "evaluate" else None)


def _cover(run: RunFiles) -> list[Section]:
    """The comparison first, then what each stage did, then replies of all policies side by side."""
    evaluation = run.children.get("evaluate")
    job = evaluation.config if evaluation else {}
    policies, table = comparison(_evaluated(run), job)
    sentence = compared(policies, table, job) or "The stages so far, in the order they run."
    stages = [
        (f"stage-{name}", title_of(child), _stage_on_cover(name, child))
        for name, child in run.children.items()
        if name != "evaluate"
    ]
    return [
        ("summary", "", join(tag("p", sentence, class_="sentence"), comparison_table(policies, table), chain(run))),
        *stages,
        ("samples", "Replies side by side", samples_section(evaluation.samples) if evaluation else None),
        ("provenance", "Provenance", _fine_print(run)),
    ]


def _evaluated(run: RunFiles) -> dict[str, float]:
    """What the evaluation found, and what a pipeline's own summary says of it: there stages stand before their metrics."""
    own = {n.removeprefix("evaluate/"): v for n, v in run.results.items() if n.startswith(("evaluate/", "true_reward"))}
    evaluation = run.children.get("evaluate")
    return {**own, **(evaluation.results if evaluation else {})}


def _stage_on_cover(name: str, child: RunFiles) -> Html:
    """The outcome of a stage: its sentence, figures, concerns and first charts."""
    story = _story(child)
    first = [chart for _, group in story.groups for chart in group if not chart.empty][:CHARTS_ON_COVER]
    link = report_link(name, "Full report of this stage", child)
    return join(
        tag("p", story.sentence, class_="sentence small"),
        missing(child),
        tiles(story.tiles),
        findings([finding for finding in story.findings if finding.concern]),
        charts(first, child),
        tag("p", link) if isinstance(link, Html) else None,
    )
