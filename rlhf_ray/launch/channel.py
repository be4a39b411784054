"""The folder through which a driver and its learner group talk: events to show, the wish to stop, what failed, which start it is.

It lies beside the run folder, so whoever can reach the run can reach it. A driver holds a lock in its channel for as long as it
lives; the channel of a driver that was killed is cleared away by the next one.
"""

from __future__ import annotations

import builtins
import contextlib
import fcntl
import json
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_ray import errors
from rlhf_ray.errors import ConfigError, Problem, RlhfRayError
from rlhf_ray.runtime.signals import Stop
from rlhf_ray.storage.files import atomic_write_json

PREFIX = ".rlhf-ray-"
OTHERS_S = 3.0
"""How long a rank that failed waits to see whether all ranks have."""


class RunChannel:
    """One start of one job. path: the folder, which Ray Train uses as well."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.events = path / "events.jsonl"

    def stop(self) -> Stop:
        return Stop(self.path)

    def begin(self, rank: int) -> int:
        """Called by every rank when it starts. Which start of the group this is for it, from 0: Ray Train starts a group again."""
        for attempt in range(1000):
            try:
                (self.path / f"started-{rank}-{attempt}").touch(exist_ok=False)
            except FileExistsError:
                continue
            return attempt
        raise RuntimeError("the group was started a thousand times")

    def fail(self, rank: int, error: Exception) -> None:
        """Leave `error` for the driver: an error that the same work would meet again, so that starting again makes no sense."""
        problems = [vars(p) for p in error.problems] if isinstance(error, RlhfRayError) else []
        found = {"kind": type(error).__name__, "text": str(error), "problems": problems}
        atomic_write_json(self.path / f"failed-{rank}.json", {**found, "trace": traceback.format_exc()})

    def wait_for_others(self, world_size: int) -> bool:
        """Whether every rank has failed, so that none waits for another one."""
        deadline = time.monotonic() + OTHERS_S
        while len(list(self.path.glob("failed-*.json"))) < world_size:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def failure(self) -> Exception | None:
        """What a rank left, the lowest rank first."""
        for path in sorted(self.path.glob("failed-*.json")):
            return _revived(json.loads(path.read_text()))
        return None


def _revived(found: dict[str, Any]) -> Exception:
    kind = getattr(errors, found["kind"], None)
    if isinstance(kind, type) and issubclass(kind, RlhfRayError):
        error: Exception = kind([Problem(**p) for p in found["problems"]])
    else:
        plain = getattr(builtins, found["kind"], None)
        if not (isinstance(plain, type) and issubclass(plain, Exception)):
            plain = type(found["kind"], (RuntimeError,), {})
        try:
            error = plain(found["text"])
        except TypeError:  # an exception whose constructor wants more than a text
            error = RuntimeError(found["text"])
    error.add_note(f"in the worker:\n{found['trace']}")
    return error


@contextlib.contextmanager
def open_channel(beside: Path) -> Iterator[RunChannel]:
    """A channel of one's own in folder `beside`, gone at the end. ConfigError if it cannot be made there."""
    try:
        beside.mkdir(parents=True, exist_ok=True)
        _clear_up(beside)
        path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=beside))
        fd = os.open(path / "making", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError.at("output_dir", f"cannot write to {beside}: {error.strerror}") from error
    try:
        with contextlib.suppress(OSError):  # a file system without locks: nobody takes the channel for a dead one's
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.rename(path / "making", path / "driver")  # found by others only when it is locked
        yield RunChannel(path)
    finally:
        os.close(fd)
        shutil.rmtree(path, ignore_errors=True)


def _clear_up(beside: Path) -> None:
    """Delete the desks of drivers that are dead: the kernel has freed their locks."""
    for path in beside.glob(f"{PREFIX}*"):
        try:
            fd = os.open(path / "driver", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        else:
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(fd)
