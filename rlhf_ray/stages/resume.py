"""Go on with a run from its folder alone: its own configuration, its newest valid checkpoint."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf_ray.config import STAGES
from rlhf_ray.config.stored import config_class, load_stored
from rlhf_ray.config.yaml_reader import Override, parse_override
from rlhf_ray.console import Console, LocalConsole
from rlhf_ray.errors import ConfigError, Problem
from rlhf_ray.stages import start
from rlhf_ray.storage.lock import WAIT_S
from rlhf_ray.storage.run import Run
from rlhf_ray.storage.run_folder import RunFolder, is_run, open_run
from rlhf_ray.training.run_entry import KEPT


def resume(
    run: str | Path, console: Console | None = None, reset_data: bool = False, overrides: Sequence[str] = ()
) -> Run:
    """Finish the run in folder `run`; a finished one is returned as it is.

    reset_data: go on although data files are others than at the checkpoint.   overrides: `a.b=c`, from now on; once there is a
    checkpoint only what may change (`MAY_CHANGE` of the stage). Raises ConfigError, ArtifactError, and DataError for
    changed data files."""
    folder = open_run(run, verify=False)
    console = console or LocalConsole()
    changed = _parsed(overrides, folder)
    if reset_data:
        with folder.lock(WAIT_S, console.log):
            _forget_data(folder)
    if folder.stage == "demo":
        from rlhf_ray.stages.demo import demo

        return demo(folder.path, console=console)
    # The folder as it was named here: its job may name another one that has taken its place.
    values = {**folder.config(), "resume": "auto", "output_dir": named_here(folder)}
    with where_it_began(folder, console):
        config = load_stored(config_class(folder.stage), values, str(folder.path / "config.yaml"), changed)
        done: Run = getattr(start, folder.stage)(config, console)
    return done


def _parsed(overrides: Sequence[str], folder: RunFolder) -> list[Override]:
    """ConfigError for what nobody can change of this run."""
    parsed = [parse_override(text) for text in overrides]
    if parsed and folder.stage == "demo":
        raise ConfigError.at(str(folder.path), "a demo has no settings to change", "no FIELD=VALUE", overrides[0])
    ConfigError.raise_all(
        Problem(f"override {o.text}", "resume takes the run folder as it is", fix="leave it out")
        for o in parsed
        if o.path[0] in KEPT
    )
    return parsed


@contextlib.contextmanager
def where_it_began(folder: RunFolder, console: Console) -> Iterator[None]:
    """Relative paths of the run's job mean what they meant when it was started: if one is missing here but not there, all is done
    there."""
    began = folder.manifest().get("cwd")
    paths = _relative_paths({**folder.config(), "output_dir": None})
    if began is None or not any(not os.path.exists(p) and os.path.exists(os.path.join(began, p)) for p in paths):
        yield
        return
    console.log(f"{folder.stage}: relative paths of the job start from {began}, where it was started")
    with contextlib.chdir(began):
        yield


def named_here(folder: RunFolder) -> str:
    """The run folder as its job names it, if that is this folder from here and stays so; else its whole path."""
    name = str(folder.config().get("output_dir"))
    began = folder.manifest().get("cwd") or os.getcwd()
    places = {os.path.realpath(os.path.join(start, name)) for start in (os.getcwd(), began)}
    return name if places == {os.path.realpath(folder.path)} else str(folder.path)


def _relative_paths(value: Any) -> Iterator[str]:
    """Every text in a configuration that may be one; `mine.py:score` is the file of a function."""
    if isinstance(value, str):
        path = re.sub(r"(?<=\.py):\w+$", "", value)
        if path and not os.path.isabs(path):
            yield path
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
        yield from _relative_paths(inner)


def _forget_data(folder: RunFolder) -> None:
    """Drop what the run, and each stage in it, recorded of its data files: those that are there next are accepted."""
    for path in (folder.path, *(folder.path / stage for stage in STAGES)):
        if is_run(path) and open_run(path, verify=False).manifest()["status"] != "done":
            RunFolder(path).update_manifest(data=[])
