"""Checkpoints of a run: `checkpoints/step_NNNNNN/`, each whole or absent, hashed, and found again by looking, not by trusting.

A checkpoint is written under a temporary name, flushed, given a manifest with the sha256 of every file, and renamed. `LATEST` is a
hint for people; the loader scans, verifies, newest first, and falls back past a damaged one with a warning. If checkpoints were
made and none is valid, that is an error: never a silent fresh start.

A run that saves hashes each file once. Which files it has hashed, or verified, it knows by their size, inode and time of change, so
that checkpoints that are kept are not read again at each save; a process that starts reads and verifies what it loads.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import stat
import uuid
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import safe_open

from rlhf_ray.errors import DISK_FULL, ArtifactError, Interrupted, InvariantError, Problem, ResourceError
from rlhf_ray.runtime.fault_injection import fault_point
from rlhf_ray.storage.files import (
    atomic_write_json,
    atomic_write_text,
    describe_files,
    fsync_path,
    read_json,
    sha256_file,
    write_json,
)
from rlhf_ray.storage.lock import check_owner

SCHEMA = 1
FOLDER = "checkpoints"
MANIFEST = "manifest.json"
LATEST = "LATEST"
ROOM = 3
"""Checkpoints that there must be room for when a run begins."""
BYTES_EACH = 12
"""Of a parameter in a checkpoint: itself and two moments, in float32."""
_NAME = re.compile(r"step_(\d{6,})")
_LEFTOVER = re.compile(r"\.(tmp|old|trash)-[0-9a-f]+")


def resume_command(run_path: Path | str) -> str:
    return f"rlhf-ray resume {shlex.quote(str(run_path))}"


def check_schema(where: str, manifest: Mapping[str, Any]) -> None:
    """ArtifactError unless `schema` is one that this version reads."""
    schema = manifest.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise ArtifactError.at(where, "no schema number", "schema: 1", repr(schema))
    if schema > SCHEMA:
        raise ArtifactError.at(
            where, "written by a newer version", f"schema up to {SCHEMA}", str(schema), "update rlhf_ray"
        )


def verify_files(folder: Path | str, manifest: Mapping[str, Any]) -> None:
    """Compare every file of manifest["files"] with its recorded size and sha256.

    Raises ArtifactError with one line per file that is missing, unreadable, changed, not a plain file, or outside `folder`."""
    folder, problems = Path(folder), []
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise ArtifactError.at(str(folder / MANIFEST), "no table of files")
    for name, recorded in files.items():
        problem = _file_problem(folder, name, recorded)
        if problem is not None:
            problems.append(problem)
    ArtifactError.raise_all(problems)


def _file_problem(folder: Path, name: str, recorded: Any) -> Problem | None:
    where = str(folder / name)
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts:
        return Problem(where, "the manifest names a file outside its folder")
    if not isinstance(recorded, dict) or not isinstance(recorded.get("sha256"), str):
        return Problem(where, "the manifest records no sha256")
    try:
        mode = os.lstat(folder / name)
    except OSError:
        return Problem(where, "file is missing", f"sha256 {recorded['sha256']}")
    if not stat.S_ISREG(mode.st_mode):
        return Problem(where, "is not a plain file")
    if mode.st_size != recorded.get("bytes"):
        return Problem(where, "file has changed", f"{recorded.get('bytes')} bytes", f"{mode.st_size} bytes")
    try:
        found = sha256_file(folder / name)
    except OSError as error:
        return Problem(where, "cannot be read", f"sha256 {recorded['sha256']}", error.strerror or type(error).__name__)
    if found != recorded["sha256"]:
        return Problem(where, "file has changed", f"sha256 {recorded['sha256']}", f"sha256 {found}")
    return None


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on disk; nothing is read until `manifest` or `verify` is called."""

    step: int
    path: Path

    @property
    def adapter_dir(self) -> Path:
        return self.path / "adapter"

    def manifest(self) -> dict[str, Any]:
        return read_json(self.path / MANIFEST)

    def verify(self, run_id: str | None = None) -> None:
        """ArtifactError if a file is missing or changed, or the checkpoint belongs to another step or another run."""
        manifest = self.manifest()
        check_schema(str(self.path / MANIFEST), manifest)
        if manifest.get("step") != self.step:
            raise ArtifactError.at(str(self.path), "wrong step", str(self.step), str(manifest.get("step")))
        if run_id is not None and manifest.get("run_id") != run_id:
            raise ArtifactError.at(str(self.path), "belongs to another run", run_id, str(manifest.get("run_id")))
        verify_files(self.path, manifest)


Signature = dict[str, tuple[int, int, int]]
_verified: dict[Path, Signature] = {}
"""Checkpoints that this process wrote or read through -> their files as they were then."""


def _signature(folder: Path) -> Signature:
    """{path: (inode, bytes, time of change)} of every file under `folder`."""
    files = {str(p.relative_to(folder)): p.lstat() for p in folder.rglob("*") if not p.is_dir()}
    return {name: (found.st_ino, found.st_size, found.st_mtime_ns) for name, found in files.items()}


def list_checkpoints(run_path: Path) -> list[Checkpoint]:
    """All complete-looking checkpoints, by step; leftovers of interrupted writes are not among them."""
    folder = run_path / FOLDER
    if not folder.is_dir():
        return []
    found = [(m, p) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name)) and p.is_dir() and not p.is_symlink()]
    return sorted((Checkpoint(int(m.group(1)), p) for m, p in found), key=lambda c: c.step)


def newest_valid(run_path: Path, run_id: str | None = None) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and a warning line per newer one that does not or is gone. (None, []) if none was ever
    made.

    ArtifactError if there were checkpoints and not one is valid."""
    warnings: list[str] = []
    problems: list[Problem] = []
    there = list_checkpoints(run_path)
    named = _named_by_hint(run_path)
    if there and named is not None and named > there[-1].step:
        warnings.append(f"checkpoint step_{named:06d} is missing; it was the newest one")
    for checkpoint in reversed(there):
        try:
            checkpoint.verify(run_id)
        except ArtifactError as e:
            problems.extend(e.problems)
            warnings.extend(f"checkpoint {checkpoint.path.name} is not usable: {p}" for p in e.problems)
            continue
        return checkpoint, warnings
    if problems:
        raise ArtifactError([Problem(str(run_path), "no valid checkpoint is left"), *problems])
    hint = run_path / FOLDER / LATEST
    if hint.exists():
        raise ArtifactError.at(str(hint), "the checkpoint it names is missing, and there is no other")
    return None, []


def _named_by_hint(run_path: Path) -> int | None:
    """The step that LATEST names; None without it, or if it holds anything else."""
    try:
        found = _NAME.fullmatch((run_path / FOLDER / LATEST).read_text(encoding="utf-8").strip())
    except (OSError, ValueError):
        return None
    return int(found.group(1)) if found else None


def require_room(run_path: Path, parameters: int) -> None:
    """ResourceError unless there is room for ROOM checkpoints of so many parameters. Asked where a run begins: later it prunes."""
    each = parameters * BYTES_EACH
    free = shutil.disk_usage(run_path).free
    if free < ROOM * each:
        raise ResourceError.at(
            "output_dir",
            f"too little room for checkpoints in {run_path.parent}",
            f"{ROOM * each:,} bytes for {ROOM} checkpoints",
            f"{free:,} bytes free",
            "free some space, or choose an output_dir on another disk",
        )


def write_checkpoint_at(
    run_path: Path, run_id: str, step: int, writer: Callable[[Path], None], keep: int, protect: Set[int]
) -> Path:
    """Save what `writer(folder)` writes as checkpoint `step`, then delete older ones beyond the newest `keep`.

    protect: steps that are never deleted (the best one, steps the user listed).   Returns the checkpoint's folder.
    Raises Interrupted (exit 75) if the disk is full, InvariantError if a tensor is not finite; older checkpoints stay as they were.
    """
    folder = run_path / FOLDER
    target = folder / f"step_{step:06d}"
    temporary = folder / f"{target.name}.tmp-{uuid.uuid4().hex[:12]}"
    try:
        folder.mkdir(exist_ok=True)
        remove_leftovers(folder)
        temporary.mkdir(mode=0o700)
        writer(temporary)
        fault_point("learner", "save_written", step)
        _seal(temporary, step, run_id)
        written = _signature(temporary)
        fault_point("learner", "save_sealed", step)
        _take_name(temporary, target)
        fault_point("learner", "save_renamed", step)
        atomic_write_text(folder / LATEST, target.name + "\n")
    except OSError as e:
        if e.errno not in DISK_FULL:
            raise
        raise _disk_full(run_path, temporary, e) from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _verified[target] = written
    _prune(run_path, run_id, keep, protect)
    return target


def _seal(folder: Path, step: int, run_id: str) -> None:
    """Flush every file, check that tensors are finite, and write the manifest."""
    files = describe_files(folder, skip=(MANIFEST,))
    for name in files:
        if name.endswith(".safetensors"):
            check_finite(folder / name)
        fsync_path(folder / name)
    for path in folder.rglob("*"):
        if path.is_dir():
            fsync_path(path)
    manifest = {"schema": SCHEMA, "step": step, "run_id": run_id, "finite": True, "files": files}
    write_json(folder / MANIFEST, manifest)
    fsync_path(folder / MANIFEST)
    fsync_path(folder)


def check_finite(path: Path) -> None:
    """InvariantError naming the first tensor of a safetensors file that holds a NaN or an infinity."""
    import torch

    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  (safe_open is no dict)
            tensor = file.get_tensor(name)
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise InvariantError.at(str(path), f"tensor {name} is not finite and was not saved")


def _take_name(temporary: Path, target: Path) -> None:
    """Rename into place. A name in use (a damaged checkpoint that a resumed run reaches again) steps aside first."""
    old = target.with_name(f"{target.name}.old-{uuid.uuid4().hex[:12]}")
    check_owner(target)
    if target.exists():
        os.rename(target, old)
    os.rename(temporary, target)
    fsync_path(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _prune(run_path: Path, run_id: str, keep: int, protect: Set[int]) -> None:
    """Delete checkpoints beyond the newest `keep` valid ones: a damaged one does not count, and goes when it is older."""
    found = [c for c in reversed(list_checkpoints(run_path)) if c.step not in protect]
    if len(found) <= keep:
        return
    good = 0
    for checkpoint in found:
        if good >= max(keep, 1):
            delete_checkpoint(checkpoint)
        elif _is_valid(checkpoint, run_id):
            good += 1


def _is_valid(checkpoint: Checkpoint, run_id: str) -> bool:
    found = _signature(checkpoint.path)
    if _verified.get(checkpoint.path) != found:
        try:
            checkpoint.verify(run_id)
        except ArtifactError:
            return False
        _verified[checkpoint.path] = found
    return True


def delete_checkpoint(checkpoint: Checkpoint) -> None:
    """Rename, then delete: a half-deleted folder never looks like a checkpoint."""
    trash = checkpoint.path.with_name(f"{checkpoint.path.name}.trash-{uuid.uuid4().hex[:12]}")
    check_owner(checkpoint.path)
    os.rename(checkpoint.path, trash)
    _verified.pop(checkpoint.path, None)
    shutil.rmtree(trash, ignore_errors=True)


def drop_from_checkpoint(checkpoint: Checkpoint, subfolder: str) -> None:
    """Delete `subfolder` from a finished checkpoint. The manifest forgets it first, so a crash in between leaves it valid."""
    manifest = checkpoint.manifest()
    manifest["files"] = {n: f for n, f in manifest["files"].items() if not n.startswith(f"{subfolder}/")}
    atomic_write_json(checkpoint.path / MANIFEST, manifest)
    shutil.rmtree(checkpoint.path / subfolder, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Delete what interrupted writes left behind. Call it only as the one writer of the run."""
    for path in folder.iterdir():
        if _LEFTOVER.search(path.name):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _disk_full(run_path: Path, temporary: Path, error: OSError) -> Interrupted:
    written = sum(p.stat().st_size for p in temporary.rglob("*") if p.is_file()) if temporary.exists() else 0
    free = shutil.disk_usage(run_path).free
    return Interrupted.at(  # type: ignore[return-value]
        str(temporary.parent),
        f"a checkpoint cannot be saved: {error.strerror}; the previous one is intact",
        f"room for more than {written:,} bytes",
        f"{free:,} bytes free",
        f"free some space, then: {resume_command(run_path)}",
    )
