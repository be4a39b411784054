"""Run folders: what a run says of itself (manifest, configuration, summary), its checkpoints, and who may write to it.

config.yaml   manifest.json   summary.json   metrics.jsonl   samples.jsonl   checkpoints/step_NNNNNN/   adapter/   report.html
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from rlhf_ray.config.resolved import dump_yaml
from rlhf_ray.errors import ArtifactError, ConfigError
from rlhf_ray.storage import object_store
from rlhf_ray.storage.checkpoints import (
    SCHEMA,
    Checkpoint,
    check_schema,
    drop_from_checkpoint,
    list_checkpoints,
    newest_valid,
    resume_command,
    verify_files,
    write_checkpoint_at,
)
from rlhf_ray.storage.files import (
    atomic_replace_folder,
    atomic_save_tensors,
    atomic_write_bytes,
    atomic_write_json,
    atomic_write_text,
    describe_files,
    read_json,
    sha256_file,
    sha256_tensors,
    sha256_text,
)
from rlhf_ray.storage.lock import LOCK, TOKEN, locked

__all__ = [
    "Checkpoint",
    "RunFolder",
    "atomic_replace_folder",
    "atomic_save_tensors",
    "atomic_write_bytes",
    "atomic_write_json",
    "atomic_write_text",
    "check_place",
    "config_changes",
    "create_run",
    "describe_files",
    "drop_from_checkpoint",
    "git_commit",
    "is_run",
    "open_run",
    "read_json",
    "resume_command",
    "sha256_file",
    "sha256_tensors",
    "sha256_text",
    "verify_files",
    "versions",
    "write_checkpoint",
]

_PACKAGES = (
    "rlhf_ray",
    "ray",
    "torch",
    "transformers",
    "peft",
    "deepspeed",
    "datasets",
    "safetensors",
    "tokenizers",
    "bitsandbytes",
)


class RunFolder:
    """A run on disk. Made by `create_run` or `open_run`."""

    def __init__(self, path: Path, found: frozenset[str] | None = None) -> None:
        """found: names that lay at `path` before, if this start makes the run; None for a run that was there."""
        self.path, self.found = path, found

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    @property
    def adapter_dir(self) -> Path:
        """The result: a plain PEFT adapter."""
        return self.path / "adapter"

    @property
    def stage(self) -> str:
        return str(self.manifest()["stage"])

    @property
    def run_id(self) -> str:
        """Random name of this run, which its checkpoints carry: a copied-in checkpoint of another run is refused."""
        return str(self.manifest().get("run_id"))

    def manifest(self) -> dict[str, Any]:
        return read_json(self.path / "manifest.json")

    def update_manifest(self, **values: Any) -> None:
        atomic_write_json(self.path / "manifest.json", {**self.manifest(), **values})

    def summary(self) -> dict[str, Any]:
        return read_json(self.path / "summary.json")

    def result_step(self) -> int:
        """Of a finished run, the step whose adapter is its result: the best one with load_best_model_at_end, else the last."""
        summary = self.summary()
        best = summary["metrics"].get("best/step") if self.config().get("load_best_model_at_end") else None
        return int(summary["steps"] if best is None else best)

    def config(self) -> dict[str, Any]:
        """The resolved configuration the run was started with."""
        where = self.path / "config.yaml"
        try:
            value = yaml.safe_load(where.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as e:
            raise ArtifactError.at(str(where), f"cannot be read: {e}") from e
        if not isinstance(value, dict):
            raise ArtifactError.at(str(where), "wrong content", "a mapping", type(value).__name__)
        return value

    @property
    def copy_to(self) -> str | None:
        """Where on an object store this run is copied to, if it is."""
        return self.config().get("copy_to")

    def checkpoints(self) -> list[Checkpoint]:
        """By step; call `verify` on the one you use."""
        return list_checkpoints(self.path)

    def newest_checkpoint(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that verifies, and warnings about newer ones that do not; (None, []) if none was ever made.

        ArtifactError if there were checkpoints and none is valid: a run never starts afresh in silence."""
        return newest_valid(self.path, self.run_id)

    def checkpoint(self, step: int) -> Checkpoint:
        """The checkpoint of `step`, verified. ArtifactError naming the steps there are."""
        for found in self.checkpoints():
            if found.step == step:
                found.verify(self.run_id)
                return found
        steps = ", ".join(str(c.step) for c in self.checkpoints()) or "none"
        raise ArtifactError.at(str(self.path), f"no checkpoint of step {step}", f"one of {steps}")

    def seal(self, names: Iterable[str] = ("adapter", "value", "config.yaml", "summary.json")) -> None:
        """Record the sha256 of these files and folders in the manifest and mark the run as done."""
        files: dict[str, Any] = {}
        for name in names:
            path = self.path / name
            if path.is_dir():
                files.update({f"{name}/{inner}": entry for inner, entry in describe_files(path).items()})
            elif path.exists():
                files[name] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        self.update_manifest(status="done", files=files)

    def copy_finished(self) -> None:
        """Copy a finished run, its report included, where it says so (`copy_to`); told in the log if that fails."""
        if uri := self.copy_to:
            object_store.copy_finished(self.path, uri, _log)

    def discard(self) -> None:
        """Delete what this start has made: what lay there before stays, and the folder with it."""
        with contextlib.suppress(OSError):
            for path in self.path.iterdir():
                if path.name not in (self.found or ()):
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
            self.path.rmdir()

    def verify(self) -> None:
        """ArtifactError naming every file that differs from the manifest."""
        verify_files(self.path, self.manifest())

    @contextmanager
    def lock(self, wait_s: float = 0.0, tell: Callable[[str], None] | None = None) -> Iterator[None]:
        """Hold the run for writing; see `ownership.locked`. ConfigError naming the holder if another process has it."""
        with locked(self.path, wait_s, tell):
            yield


def is_run(path: Path | str) -> bool:
    """Whether `path` is a folder whose manifest.json is that of a run."""
    try:
        manifest = read_json(Path(path) / "manifest.json")
    except ArtifactError:
        return False
    return isinstance(manifest.get("stage"), str) and "status" in manifest


def create_run(output_dir: Path | str, stage: str, config: Mapping[str, Any], resume: str) -> RunFolder:
    """Make the run folder, or return the one that is there if `resume` is "auto".

    config: the resolved configuration, as plain JSON types.   resume: "never" or "auto": a run that is not here, and has a copy
    (`copy_to`), is restored from that.
    ConfigError if the folder holds a run (resume never: with the command that resumes it; auto: a run of another stage), holds
    anything else, is a file, or cannot be written, or if copies of another run lie at `copy_to`; ResourceError if that is away."""
    path = Path(output_dir).absolute()
    where = str(output_dir)
    uri = config.get("copy_to") if not is_run(path) else None
    if uri and resume == "auto" and (taken := object_store.restore(uri, path)) is not None:
        _log(f"{where} was restored from {uri}: {taken}")
    check_place(output_dir, resume)
    if is_run(path):
        return _existing_run(path, where, stage)
    if uri and resume != "auto":
        object_store.require_unused(uri)
    try:
        path.mkdir(parents=True, exist_ok=True)
        found = frozenset(entry.name for entry in path.iterdir()) - {LOCK, TOKEN}
        atomic_write_json(path / "manifest.json", _fresh_manifest(stage, config))
        atomic_write_text(path / "config.yaml", dump_yaml(json.loads(json.dumps(config))))
    except OSError as e:
        raise ConfigError.at("output_dir", f"cannot write to {where}: {e.strerror}") from e
    return RunFolder(path, found)


def check_place(output_dir: Path | str, resume: str) -> None:
    """ConfigError unless a run can be made at `output_dir`, or gone on with there if `resume` is "auto". Writes nothing."""
    path, where = Path(output_dir).absolute(), str(output_dir)
    if path.exists() and not path.is_dir():
        raise ConfigError.at("output_dir", f"{where} is a file", "a folder to write the run into")
    if is_run(path):
        if resume != "auto":
            fix = (
                f"to resume it, with the settings that it has: {resume_command(where)}; for others: another output_dir"
            )
            raise ConfigError.at("output_dir", f"{where} already holds a run", "a new folder, or resume=auto", fix=fix)
        return
    # Hidden entries are lock files and scratch folders of the job that is being started.
    inside = sorted(p.name for p in path.iterdir() if not p.name.startswith(".")) if path.is_dir() else []
    if inside:
        raise ConfigError.at(
            "output_dir",
            f"{where} is not empty and is not a run",
            "an empty or new folder",
            ", ".join(inside[:5]) + (", ..." if len(inside) > 5 else ""),
            "choose another folder",
        )


def _existing_run(path: Path, where: str, stage: str) -> RunFolder:
    run = open_run(path, verify=False)
    if run.stage != stage:
        raise ConfigError.at("output_dir", f"{where} holds a run of another stage", stage, run.stage)
    return run


def _fresh_manifest(stage: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "stage": stage,
        "status": "running",
        "run_id": uuid.uuid4().hex,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "parents": [],
        "base": None,
        "tokenizer_sha256": None,
        "template": None,
        "data": [],
        "seed": config.get("seed"),
        "cwd": os.getcwd(),
        "threads": None,
        "versions": dict(versions()),
        "git_commit": git_commit(),
        "files": {},
    }


def open_run(path: Path | str, verify: bool = True) -> RunFolder:
    """The run in folder `path`. ConfigError if there is no such folder, ArtifactError if it is no run or is damaged.

    verify: also compare the files of a finished run with their recorded sha256."""
    folder = Path(path).absolute()
    if not folder.exists():
        raise ConfigError.at(str(path), "no such folder", "a run folder")
    if not folder.is_dir() or not (folder / "manifest.json").exists():
        raise ArtifactError.at(str(path), "is not a run", "a folder with manifest.json")
    run = RunFolder(folder)
    manifest = run.manifest()
    where = str(folder / "manifest.json")
    check_schema(where, manifest)
    if not isinstance(manifest.get("stage"), str) or manifest.get("status") not in ("running", "done"):
        raise ArtifactError.at(where, "is not the manifest of a run", "stage, and status running or done")
    if verify and manifest["status"] == "done":
        run.verify()
    return run


def _log(line: str) -> None:
    logging.getLogger("rlhf_ray").warning(line)


def write_checkpoint(
    run: RunFolder,
    step: int,
    writer: Callable[[Path], None],
    keep: int,
    protect: Set[int] = frozenset(),
    tell: Callable[[str], None] | None = None,
) -> Path:
    """Save checkpoint `step` of `run`, and copy it where the run says so; see `checkpoints.write_checkpoint_at`.

    tell: called with a line if the copy failed; the run goes on.   Call it from one process only."""
    written = write_checkpoint_at(run.path, run.run_id, step, writer, keep, protect)
    if uri := run.copy_to:
        object_store.copy_checkpoint(run.path, written, uri, tell or _log)
    return written


def config_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{dotted field: (old, new)} of every field that differs; a field that one side lacks counts as None."""
    flat_old, flat_new = _flatten(json.loads(json.dumps(old))), _flatten(json.loads(json.dumps(new)))
    names = sorted(flat_old.keys() | flat_new.keys())
    return {n: (flat_old.get(n), flat_new.get(n)) for n in names if flat_old.get(n) != flat_new.get(n)}


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


@functools.cache
def versions() -> dict[str, str]:
    """Installed versions of what a result depends on; packages that are not installed are left out."""
    import platform

    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def git_commit() -> str | None:
    """Commit of the checkout that this package runs from; None for an installed package, and on any trouble."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists() or not (root / "pyproject.toml").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--verify", "HEAD"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
