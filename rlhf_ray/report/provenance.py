"""Where a run came from: parents, base, data, versions, its files; its configuration; and every metric it wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_ray.metrics import describe
from rlhf_ray.report.folder import RunFiles, is_number
from rlhf_ray.report.html import Html, join, tag
from rlhf_ray.report.numbers import shown, size

HASH_CHARACTERS = 12
LOG_LINES = 40
FACT_CHARACTERS = 19  # a time to the second, a commit that can be looked up


def provenance(run: RunFiles) -> Html:
    manifest = run.manifest
    parts = [
        _table("Parents and base", ("role", "path", "sha256"), _lineage(manifest)),
        _table("Data", ("file", "rows", "used", "sha256"), _data(manifest.get("data"))),
        _table("Results", ("artefact", "path"), [(k, v) for k, v in _mapping(run.summary.get("artifacts")).items()]),
        _table("Files", ("file", "size", "sha256"), _files(manifest.get("files"))),
    ]
    facts = [(label, manifest.get(key)) for label, key in _FACTS] + sorted(_mapping(manifest.get("versions")).items())
    told = [(label, str(value)[:FACT_CHARACTERS]) for label, value in facts if value not in (None, "")]
    line = [tag("span", f"{label} ", tag("b", value)) for label, value in told]
    tables = tag("div", parts, class_="tables") if any(parts) else None
    return join(tag("p", line, class_="figures") if line else None, tables)


_FACTS = (("created", "created"), ("seed", "seed"), ("threads", "threads"), ("commit", "git_commit"))


def configuration(run: RunFiles) -> Html | None:
    return (
        tag("details", tag("summary", "Configuration (config.yaml)"), tag("pre", run.config_text, class_="code"))
        if run.config_text
        else None
    )


def roles(run: RunFiles) -> Html | None:
    """roles.log of a split run: who is who, who was restarted, and who sampled and scored the last steps."""
    lines = run.roles_text.splitlines()
    if not lines:
        return None
    early, late = lines[:-LOG_LINES], lines[-LOG_LINES:]
    kept = [line for line in early if ": adapter " not in line]
    gap = [f"… {len(early) - len(kept)} lines left out"] if len(kept) < len(early) else []
    text = tag("pre", "\n".join([*kept, *gap, *late]), class_="code")
    return tag("details", tag("summary", "Who sampled and scored each step (roles.log)"), text)


def all_metrics(run: RunFiles) -> Html | None:
    """Every metric of metrics.jsonl: what it means, where it started and ended, its extremes."""
    rows = []
    for name in run.names():
        values = run.values(name)
        if not values:
            continue
        try:
            metric = describe(name)
            unit, meaning = metric.unit, metric.meaning
        except KeyError:
            unit, meaning = "", ""
        figures = [
            tag("td", shown(v, unit), class_="number") for v in (values[0], values[-1], min(values), max(values))
        ]
        rows.append(
            tag("tr", tag("td", tag("code", name)), tag("td", unit), figures, tag("td", meaning, class_="meaning"))
        )
    if not rows:
        return None
    head = tag(
        "tr", [tag("th", h, scope="col") for h in ("metric", "unit", "first", "last", "lowest", "highest", "meaning")]
    )
    table = tag("table", tag("thead", head), tag("tbody", rows), class_="metrics")
    return tag("details", tag("summary", f"All {len(rows)} metrics"), tag("div", table, class_="wide"))


def _lineage(manifest: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    rows = [(p.get("role"), p.get("path"), _hash(p.get("sha256"))) for p in _mappings(manifest.get("parents"))]
    base, template = _mapping(manifest.get("base")), _mapping(manifest.get("template"))
    if base:
        revision = f" @ {base['revision']}" if base.get("revision") else ""
        rows.append(("base", f"{base.get('path', '')}{revision}", _hash(base.get("weights_sha256"))))
    if manifest.get("tokenizer_sha256"):
        rows.append(("tokenizer", "", _hash(manifest["tokenizer_sha256"])))
    if template:
        rows.append(("template", template.get("name"), _hash(template.get("sha256"))))
    return rows


def _data(files: Any) -> list[tuple[Any, ...]]:
    return [
        (f.get("path"), _count(f.get("rows")), _count(f.get("used")), _hash(f.get("sha256"))) for f in _mappings(files)
    ]


def _files(files: Any) -> list[tuple[Any, ...]]:
    return [
        (name, size(f["bytes"]) if is_number(f.get("bytes")) else "", _hash(f.get("sha256")))
        for name, f in sorted(_mapping(files).items())
        if isinstance(f, dict)
    ]


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> Html | None:
    if not rows:
        return None
    numbers = {"rows", "used", "size"}
    body = [
        tag(
            "tr",
            [tag("td", cell, class_="number" if h in numbers else None) for h, cell in zip(head, row, strict=True)],
        )
        for row in rows
    ]
    heads = tag("tr", [tag("th", h, class_="number" if h in numbers else None, scope="col") for h in head])
    return tag("table", tag("caption", title), tag("thead", heads), tag("tbody", body), class_="facts")


def _hash(value: Any) -> Html | str:
    text = str(value or "")
    return tag("code", text[:HASH_CHARACTERS], title=text) if text else ""


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value if value is not None else "")


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _mappings(value: Any) -> list[dict[str, Any]]:
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []
