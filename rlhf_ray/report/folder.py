"""Reading a run folder for its report: whatever is there, with a note for what is missing or damaged."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rlhf_ray.errors import ArtifactError, ConfigError, RlhfRayError
from rlhf_ray.metrics import read_metrics

STAGES = ("sft", "dpo", "reward", "ppo", "evaluate")
FILES = ("config.yaml", "manifest.json", "summary.json", "metrics.jsonl", "samples.jsonl")

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class RunFiles:
    """What a run folder says. `children`: the stage folders of a pipeline, in the order they run. `notes`: what is amiss."""

    path: Path
    stage: str
    config: dict[str, Any]
    config_text: str
    manifest: dict[str, Any]
    summary: dict[str, Any]
    rows: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    roles_text: str = ""
    notes: tuple[str, ...] = ()
    children: dict[str, RunFiles] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.config.get("run_name") or self.path.name)

    @property
    def done(self) -> bool:
        return "done" in (self.summary.get("status"), self.manifest.get("status"))

    @property
    def results(self) -> dict[str, float]:
        """The numbers of summary.json."""
        metrics = self.summary.get("metrics")
        return {k: float(v) for k, v in metrics.items() if is_number(v)} if isinstance(metrics, dict) else {}

    @property
    def seconds(self) -> float | None:
        """How long the run took; None where summary.json does not say so."""
        seconds: Any = self.summary.get("seconds")
        return float(seconds) if is_number(seconds) and seconds >= 0 else None

    @property
    def steps(self) -> int:
        """The last step that has metrics."""
        return max((int(row["step"]) for row in self.rows if is_number(row.get("step"))), default=0)

    def points(self, name: str) -> Points:
        """(step, value) of a metric in order of steps; a step written twice counts once, as written last."""
        found = {row["step"]: row[name] for row in self.rows if is_number(row.get("step")) and is_number(row.get(name))}
        return [(float(step), float(found[step])) for step in sorted(found)]

    def values(self, name: str) -> list[float]:
        return [value for _, value in self.points(name)]

    def names(self) -> list[str]:
        """Every metric in metrics.jsonl, in order of first appearance."""
        return list(dict.fromkeys(key for row in self.rows for key in row if key != "step"))


def read_folder(path: Path) -> RunFiles:
    """Read a run folder or a folder of stage folders. ConfigError if there is no such folder, ArtifactError if it is neither."""
    if not path.exists():
        raise ConfigError.at(str(path), "no such folder", "a run folder")
    children = {name: read_folder(path / name) for name in STAGES if _holds_run(path / name)}
    if not children and not _holds_run(path):
        raise ArtifactError.at(str(path), "not a run folder", "one of " + ", ".join(FILES), "none of them")
    notes: list[str] = []
    text = _read_text(path / "config.yaml", notes)
    manifest = _read_json(path / "manifest.json", notes)
    summary = _read_json(path / "summary.json", notes)
    rows = _read_rows(path / "metrics.jsonl", notes)
    stage = str(manifest.get("stage") or summary.get("stage") or ("pipeline" if children else _guess_stage(rows)))
    return RunFiles(
        path=path,
        stage=stage,
        config=_parse_yaml(text, path / "config.yaml", notes),
        config_text=text,
        manifest=manifest,
        summary=summary,
        rows=rows,
        samples=_read_rows(path / "samples.jsonl", notes),
        roles_text=_read_text(path / "roles.log", notes),
        notes=tuple(notes + _absent(path, stage, notes)),
        children=children,
    )


def last(points: Points) -> float | None:
    return points[-1][1] if points else None


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def is_number(value: Any) -> bool:
    """A number that can be drawn: differences and sums of such numbers stay finite."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e100


def _holds_run(path: Path) -> bool:
    return path.is_dir() and any((path / name).is_file() for name in FILES)


def _absent(path: Path, stage: str, notes: list[str]) -> list[str]:
    """Files every run of this kind writes; summary.json comes at the end, so its absence is no surprise."""
    needed = ["config.yaml", "manifest.json"] + (["metrics.jsonl"] if stage in ("sft", "dpo", "reward", "ppo") else [])
    return [f"{name} is missing" for name in needed if not (path / name).is_file()]


def _guess_stage(rows: list[dict[str, Any]]) -> str:
    names = {key for row in rows for key in row}
    if any(name.startswith(("kl/", "ratio/")) for name in names):
        return "ppo"
    if names & {"eval/accuracy", "accuracy", "margin"}:
        return "reward"
    return "sft" if "loss" in names else "run"


def _read_text(path: Path, notes: list[str]) -> str:
    if not path.is_file():
        return ""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        notes.append(f"{path.name} could not be read: {e}")
        return ""


def _read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    text = _read_text(path, notes)
    try:
        value = json.loads(text) if text else {}
    except (ValueError, RecursionError) as e:
        notes.append(f"{path.name} is damaged: {e}")
        return {}
    return value if isinstance(value, dict) else {}


def _parse_yaml(text: str, path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError):
        notes.append(f"{path.name} is not valid YAML")
        return {}
    return value if isinstance(value, dict) else {}


def _read_rows(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        return read_metrics(path)
    except RlhfRayError as e:
        notes.append(f"{path.name} is damaged: {e.problems[0].what} at {e.problems[0].where.rsplit(':', 1)[-1]}")
        return []
