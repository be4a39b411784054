"""Copies of a run on an object store (`copy_to`): every checkpoint once it is written, the finished run, and the way back.

    COPY_TO/checkpoints/step_000040/checkpoint/...   the checkpoint's files
    COPY_TO/checkpoints/step_000040/run/...          the run's manifest, configuration, metrics and samples as they were then
    COPY_TO/checkpoints/step_000040/COMMIT           last: sha256 and size of every file above
    COPY_TO/final/run/..., COPY_TO/final/COMMIT      the run when it was done

What has no COMMIT is not there: an upload that was cut off is never read, and the next one clears it away. The run folder stays the
truth; a copy is read only where there is no run folder (a new node, a lost disk) and the job says `resume: auto`. A place holds
the copies of one run, by the `run_id` of its manifest: another run is refused there, and told, and deletes nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from rlhf_ray.errors import ArtifactError, ConfigError, Problem, ResourceError
from rlhf_ray.storage.files import fsync_path

COMMIT = "COMMIT"
SCHEMA = 1
ATTEMPTS = 3
PIECE = 1 << 20
RUN_FILES = ("manifest.json", "config.yaml", "metrics.jsonl", "samples.jsonl", "rows.jsonl", "roles.log")
"""What a run needs beside a checkpoint to go on from it; `summary.json` and what the manifest seals come with the finished run."""
_STEP = re.compile(r"step_(\d{6,})")
Tell = Callable[[str], None]


class Store:
    """A folder on an object store, or on any file system that pyarrow knows. ConfigError if the URI names none."""

    def __init__(self, uri: str) -> None:
        from pyarrow import ArrowException, fs

        try:
            self.fs, root = fs.FileSystem.from_uri(uri)
        except (ArrowException, OSError, ValueError) as error:
            known = "s3://bucket/folder, gs://bucket/folder, hdfs://host/folder or file:///folder"
            raise ConfigError.at("copy_to", f"cannot be used: {_line(error)}", known, uri) from None
        self.uri, self.root = uri, root.rstrip("/")

    def put(self, source: Path, name: str) -> dict[str, Any]:
        """Upload a file; sha256 and size of what was sent."""
        digest, size = hashlib.sha256(), 0
        path = self._path(name)
        self.fs.create_dir(os.path.dirname(path), recursive=True)
        with open(source, "rb") as file, self.fs.open_output_stream(path) as out:
            while piece := file.read(PIECE):
                out.write(piece)
                digest.update(piece)
                size += len(piece)
        return {"sha256": digest.hexdigest(), "bytes": size}

    def put_text(self, name: str, text: str) -> None:
        with self.fs.open_output_stream(self._path(name)) as out:
            out.write(text.encode())

    def get(self, name: str, target: Path) -> dict[str, Any]:
        """Download a file; sha256 and size of what came."""
        digest, size = hashlib.sha256(), 0
        target.parent.mkdir(parents=True, exist_ok=True)
        with self.fs.open_input_stream(self._path(name)) as source, open(target, "wb") as file:
            while piece := source.read(PIECE):
                file.write(piece)
                digest.update(piece)
                size += len(piece)
        fsync_path(target)
        return {"sha256": digest.hexdigest(), "bytes": size}

    def text(self, name: str) -> str | None:
        """A small file, None if there is none."""
        from pyarrow import fs

        path = self._path(name)
        if self.fs.get_file_info(path).type != fs.FileType.File:
            return None
        with self.fs.open_input_stream(path) as file:
            return bytes(file.read()).decode()

    def folders(self, name: str) -> list[str]:
        """Names of the folders in a folder."""
        from pyarrow import fs

        found = self.fs.get_file_info(fs.FileSelector(self._path(name), allow_not_found=True))
        return sorted(entry.base_name for entry in found if entry.type == fs.FileType.Directory)

    def delete(self, name: str) -> None:
        """A folder, its COMMIT first, so that half of it is nothing."""
        from pyarrow import fs

        if self.fs.get_file_info(self._path(f"{name}/{COMMIT}")).type == fs.FileType.File:
            self.fs.delete_file(self._path(f"{name}/{COMMIT}"))
        if self.fs.get_file_info(self._path(name)).type != fs.FileType.NotFound:
            self.fs.delete_dir(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"


def copy_checkpoint(run: Path, checkpoint: Path, uri: str, tell: Tell) -> bool:
    """Copy a checkpoint that is whole, and delete copies of those that are gone here. False, and told, if the store is away, or
    holds another run: this one goes on, and tries again with its next checkpoint."""

    def work() -> None:
        store, name = Store(uri), f"checkpoints/{checkpoint.name}"
        _require_own(store, _run_id((run / "manifest.json").read_text()))
        store.delete(name)
        files = {f"checkpoint/{n}": p for n, p in _files(checkpoint)}
        files |= {f"run/{n}": run / n for n in RUN_FILES if (run / n).is_file()}
        _commit(store, name, files)
        here = {path.name for path in checkpoint.parent.iterdir() if _STEP.fullmatch(path.name)}
        for gone in set(store.folders("checkpoints")) - here:
            store.delete(f"checkpoints/{gone}")

    return _tried(work, f"{checkpoint.name} was not copied to {uri}", tell)


def copy_finished(run: Path, uri: str, tell: Tell, again: bool = True) -> bool:
    """Copy a run that is done: its manifest and every file that it seals.   again: also if a copy of a finished run is there."""

    def work() -> None:
        store, manifest = Store(uri), json.loads((run / "manifest.json").read_text())
        _require_own(store, manifest.get("run_id"))
        if not again and store.text(f"final/{COMMIT}") is not None:
            return
        store.delete("final")
        names = dict.fromkeys([*manifest["files"], *RUN_FILES, "summary.json", "report.html"])
        _commit(store, "final", {f"run/{n}": run / n for n in names if (run / n).is_file()})

    return _tried(work, f"the finished run was not copied to {uri}", tell)


def require_unused(uri: str) -> None:
    """ConfigError if copies of a run lie at `uri`, ResourceError if that cannot be told: asked where a new run is made."""
    with _answering(uri):
        _require_own(Store(uri), None)


def copied_config(uri: str) -> dict[str, Any] | None:
    """The configuration of the run that `restore` would take, None if there is no copy. ResourceError if the store is away."""
    with _answering(uri):
        store = Store(uri)
        for name, _ in _whole(store):
            with contextlib.suppress(ValueError, TypeError, yaml.YAMLError):  # `restore` passes over a damaged one too
                return dict(yaml.safe_load(store.text(f"{name}/run/config.yaml") or ""))
    return None


def restore(uri: str, target: Path) -> str | None:
    """Make the run folder `target` from its copy: the finished run, else the newest checkpoint that is whole. What was taken
    (`final`, `step_000040`), None if there is no copy.

    ArtifactError if there are copies and all are damaged: a run never starts afresh in silence. ResourceError if the store is
    away."""
    problems = []
    with _answering(uri):
        store = Store(uri)
        for name, commit in _whole(store):
            try:
                _download(store, name, commit, target)
            except (ArtifactError, OSError, ValueError, KeyError) as error:
                problems.append(Problem(f"{uri}: {name}", "the copy is damaged", got=_line(error)))
                continue
            return name.rpartition("/")[2]
    ArtifactError.raise_all(problems)
    return None


def _whole(store: Store) -> Iterator[tuple[str, str]]:
    """(name, COMMIT) of every copy that is whole: the finished run, then its checkpoints, the newest first."""
    steps = sorted((n for n in store.folders("checkpoints") if _STEP.fullmatch(n)), key=_number, reverse=True)
    for name in ("final", *(f"checkpoints/{step}" for step in steps)):
        if (commit := store.text(f"{name}/{COMMIT}")) is not None:
            yield name, commit


def _require_own(store: Store, run_id: str | None) -> None:
    """ConfigError if there is a copy of another run: it would be deleted, or be taken for one of this run when that is restored."""
    for name, _ in _whole(store):
        if (found := _run_id(store.text(f"{name}/run/manifest.json"))) not in (None, run_id):
            fix = "choose another folder for the copies, or delete those that are there"
            fix = f"to resume that run: resume=auto; else {fix}" if run_id is None else fix
            what = f"{store.uri} holds copies of another run"
            raise ConfigError.at("copy_to", what, got=f"{name} of run {found}", fix=fix)


def _run_id(manifest: str | None) -> str | None:
    """None also where a manifest is damaged, or of a version that gave runs no name."""
    with contextlib.suppress(ValueError, AttributeError):
        return json.loads(manifest or "").get("run_id")  # type: ignore[no-any-return]
    return None


@contextlib.contextmanager
def _answering(uri: str) -> Iterator[None]:
    """What a start asks a store that does not answer is a ResourceError in one line."""
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError) as error:
        fix = "check its address, the network and the credentials, then start again"
        raise ResourceError.at("copy_to", f"{uri} cannot be read: {_line(error)}", fix=fix) from error


def _download(store: Store, name: str, commit: str, target: Path) -> None:
    """All files, checked, into a folder of their own, which then takes the target's place."""
    files = json.loads(commit)["files"]
    scratch = target.with_name(f".{target.name}.restore-{uuid.uuid4().hex[:12]}")
    step = name.rpartition("/")[2]
    try:
        for inner, recorded in files.items():
            kind, _, rest = inner.partition("/")
            if (
                kind not in ("run", "checkpoint")
                or PurePosixPath(rest).is_absolute()
                or ".." in PurePosixPath(rest).parts
            ):
                raise ArtifactError.at(inner, "is outside of the run")
            place = scratch / rest if kind == "run" else scratch / "checkpoints" / step / rest
            found = store.get(f"{name}/{inner}", place)
            if found != recorded:
                raise ArtifactError.at(inner, "has changed", recorded["sha256"], found["sha256"])
        for hidden in target.iterdir() if target.is_dir() else ():
            os.rename(hidden, scratch / hidden.name)  # lock files of the job that is being started
        if target.is_dir():
            target.rmdir()
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(scratch, target)
        fsync_path(target.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _commit(store: Store, name: str, files: dict[str, Path]) -> None:
    sent = {inner: store.put(path, f"{name}/{inner}") for inner, path in files.items()}
    store.put_text(f"{name}/{COMMIT}", json.dumps({"schema": SCHEMA, "files": sent}))


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path


def _tried(work: Callable[[], None], failure: str, tell: Tell) -> bool:
    for attempt in range(1, ATTEMPTS + 1):
        try:
            work()
            return True
        except ConfigError as error:
            tell(f"{failure}: {error}")
            return False
        except Exception as error:
            if attempt == ATTEMPTS:
                tell(f"{failure}: {_line(error)}")
            else:
                time.sleep(2.0 ** (attempt - 1))
    return False


def _number(step: str) -> int:
    return int(step.removeprefix("step_"))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
