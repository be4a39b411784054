"""Who may write into a run folder, or into the adapter registry: one process at a time.

A lock that the kernel frees at the holder's death keeps a second writer out. Where locks do not reach (some network file systems),
a token does: each start writes a new one, and who held the run before finds at its next rename that it is no longer its own.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from rlhf_ray.errors import ConfigError

LOCK, TOKEN = ".lock", ".owner"
HELD = (errno.EWOULDBLOCK, errno.EACCES)
"""What flock says where another process has the lock, as against where there are no locks (ENOLCK, ENOSYS)."""
WAIT_S = 30.0
"""How long a run that goes on waits for a process that is about to die."""

_owned: dict[Path, str] = {}
"""Run folders that this process writes to, with its token."""


@contextlib.contextmanager
def locked(
    folder: Path, wait_s: float = 0.0, tell: Callable[[str], None] | None = None, kind: str = "run"
) -> Iterator[None]:
    """Hold the run for writing, under a token of one's own. ConfigError naming the holder if another process has it for `wait_s`
    seconds more.

    tell: called once with a line if there is something to wait for.   kind: what the folder is, for the error."""
    folder = folder.absolute()
    with held(folder / LOCK, wait_s, tell, kind):
        token = uuid.uuid4().hex
        _write_token(folder, token)
        before = _owned.get(folder)
        _owned[folder] = token
        try:
            yield
        finally:
            if before is None:
                _owned.pop(folder, None)
            else:
                _owned[folder] = before


@contextlib.contextmanager
def held(
    path: Path, wait_s: float = 0.0, tell: Callable[[str], None] | None = None, kind: str = "run"
) -> Iterator[None]:
    """Hold the lock file `path`, which says who does."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        if kind != "run":
            raise
        raise ConfigError.at(
            str(path.parent), f"cannot be written to: {error.strerror}", "a run of one's own"
        ) from error
    with os.fdopen(fd, "r+", encoding="utf-8") as file:
        deadline, told = time.monotonic() + wait_s, False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in HELD:  # a file system without locks: the token has to do
                    break
                file.seek(0)
                holder = _holder(file.read())
            if time.monotonic() >= deadline:
                waited = f" (waited {wait_s:g} s)" if wait_s else ""
                raise ConfigError.at(
                    str(path.parent), f"another process is writing to this {kind}{waited}", "", holder, "wait for it"
                ) from None
            if tell is not None and not told:
                tell(f"waiting up to {wait_s:g} s for {path.parent}: {holder} is writing to it")
                told = True
            time.sleep(0.1)
        file.seek(0)
        file.truncate(0)
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}, file)
        file.flush()
        yield


def check_owner(target: Path) -> None:
    """Called before anything is renamed. ConfigError if `target` lies in a run of this process that another one has taken."""
    for folder, token in _owned.items():
        if target.absolute().is_relative_to(folder):
            try:
                found = (folder / TOKEN).read_text()
            except OSError:
                found = ""
            if found != token:
                raise ConfigError.at(
                    str(folder),
                    "another process has taken over this run; nothing more is written",
                    f"owner {token[:8]}, pid {os.getpid()}",
                    f"owner {found[:8] or 'unknown'}",
                    "leave it to that process",
                )


def _write_token(folder: Path, token: str) -> None:
    temporary = folder / f"{TOKEN}.tmp-{token[:12]}"
    with open(temporary, "w") as file:
        file.write(token)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / TOKEN)


def _holder(text: str) -> str:
    try:
        info = json.loads(text)
        return f"host {info['host']}, pid {info['pid']}, for {time.time() - info['since']:.0f} s"
    except (ValueError, KeyError, TypeError):
        return "a holder that left no name"
