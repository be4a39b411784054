"""What a stage returns, and what `load_run` gives back later: the run's summary, as Python."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlhf_ray.errors import ArtifactError, Problem
from rlhf_ray.storage.run_folder import RunFolder, atomic_write_json, open_run

_FIELDS: dict[str, Any] = {
    "stage": str,
    "status": str,
    "run_dir": str,
    "steps": int,
    "seconds": (int, float),
    "metrics": dict,
    "artifacts": dict,
}


@dataclass(frozen=True)
class Run:
    """stage, status ("running" or "done").  run_dir: absolute path.  steps: done so far.  seconds: wall clock, resumes added up.
    metrics: name -> last value.  artifacts: name -> path, relative to run_dir where inside it.

    Run(stage="sft", status="done", run_dir="/runs/sft", steps=120, seconds=31.5, seed=0,
        metrics={"loss": 1.62}, artifacts={"adapter": "adapter"})
    """

    stage: str
    status: str
    run_dir: str
    steps: int
    seconds: float
    seed: int | None
    metrics: dict[str, float] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)

    @property
    def adapter_dir(self) -> Path:
        """The resulting adapter: a plain PEFT folder."""
        return Path(self.run_dir) / "adapter"

    @property
    def folder(self) -> RunFolder:
        return RunFolder(Path(self.run_dir))

    def to_json(self) -> dict[str, Any]:
        """The summary as plain JSON types. A metric that is not finite is None: JSON has no NaN."""
        values = asdict(self)
        values["metrics"] = {k: v if math.isfinite(v) else None for k, v in self.metrics.items()}
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any], where: str = "summary") -> Run:
        """The inverse of `to_json`. ArtifactError naming every field that is missing or of the wrong type."""
        wrong = [n for n, kind in _FIELDS.items() if not isinstance(values.get(n), kind)]
        ArtifactError.raise_all(Problem(where, f"field {n} is missing or has the wrong type") for n in wrong)
        metrics = {k: math.nan if v is None else float(v) for k, v in values["metrics"].items()}
        return cls(**{n: values[n] for n in _FIELDS} | {"seed": values.get("seed"), "metrics": metrics})

    def save(self) -> None:
        """Write summary.json into the run folder."""
        atomic_write_json(Path(self.run_dir) / "summary.json", self.to_json())

    @classmethod
    def load(cls, path: Path | str) -> Run:
        return load_run(path)


def load_run(path: Path | str) -> Run:
    """The run in folder `path`: a finished one with the results it recorded, checked against their hashes, or an unfinished one
    with status "running" and the step of its newest checkpoint.

    ConfigError if there is no such folder, ArtifactError if it is not a run or is damaged."""
    folder = open_run(path)
    manifest = folder.manifest()
    if not (folder.path / "summary.json").exists() and manifest["status"] == "running":
        checkpoints = folder.checkpoints()
        steps = checkpoints[-1].step if checkpoints else 0
        return Run(manifest["stage"], "running", str(folder.path), steps, 0.0, manifest.get("seed"))
    summary = folder.path / "summary.json"
    return Run.from_json({**folder.summary(), "run_dir": str(folder.path)}, str(summary))
