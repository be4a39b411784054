"""Files that the service appends lines to: the access log, and the preferences of people. Several processes may write."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
import uuid
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from rlhf_ray.serve.openai_types import PreferenceRequest

ACCESS_LOG = "access.jsonl"
PREFERENCE_LOG = "preferences.jsonl"
TIE_LOG = "ties.jsonl"
"""Comparisons that nobody has won."""


class RequestLog:
    """JSON lines in `path`; each is written whole or not at all, whoever else writes.   durable: `append` flushes to disk.

    max_bytes: a file that would grow beyond is renamed to PATH.1, the one before to PATH.2, and so on; the last of `backups` goes.
    None: it is never renamed. A file that somebody else renames (logrotate) is begun again."""

    def __init__(self, path: Path, durable: bool = False, max_bytes: int | None = None, backups: int = 0) -> None:
        self.path, self.durable, self.max_bytes, self.backups = path, durable, max_bytes, backups
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = self._open()

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(self.path, flags, 0o600)

    def _lock(self, coming: int) -> None:
        """Lock the file that `path` names, with room for so many bytes."""
        while True:
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            try:
                status = os.fstat(self._fd)
                with contextlib.suppress(FileNotFoundError):
                    if os.stat(self.path).st_ino == status.st_ino:
                        if self.max_bytes is None or not status.st_size or status.st_size + coming <= self.max_bytes:
                            return
                        self._rotate()
                old, self._fd = self._fd, self._open()
            except BaseException:  # this file is still the one that is open: the next line tries again
                fcntl.flock(self._fd, fcntl.LOCK_UN)
                raise
            os.close(old)  # and so its lock

    def _rotate(self) -> None:
        names = [self.path, *(self.path.with_name(f"{self.path.name}.{i}") for i in range(1, self.backups + 1))]
        for old, new in reversed(list(pairwise(names))):
            if old.exists():
                old.replace(new)
        self.path.unlink(missing_ok=True)  # where no backup is kept

    def append(self, row: Mapping[str, Any]) -> None:
        line = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "replace")
        self._lock(len(line))
        try:
            size = os.fstat(self._fd).st_size
            if size and os.pread(self._fd, 1, size - 1) != b"\n":
                line = b"\n" + line  # a writer died in the middle of a line
            try:
                written = os.write(self._fd, line)
            except OSError:
                os.ftruncate(self._fd, size)
                raise
            if written != len(line):  # the disk is full: half a line would spoil the file
                os.ftruncate(self._fd, size)
                raise OSError("no room for the line")
            if self.durable:
                os.fsync(self._fd)
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def close(self) -> None:
        os.close(self._fd)


def preference_row(request: PreferenceRequest, prompt: Mapping[str, Any], key_name: str | None) -> dict[str, Any]:
    """A row of the format `preference` (prompt, chosen, rejected), which the reward stage reads; it ignores the other fields."""
    verdict = {} if request.verdict == "better" else {"verdict": request.verdict}
    return {
        **verdict,
        "prompt": prompt["text"] if "text" in prompt else prompt["messages"],
        "chosen": request.chosen,
        "rejected": request.rejected,
        "chosen_model": request.chosen_model,
        "rejected_model": request.rejected_model,
        "comparison": request.comparison,
        "id": f"pref-{uuid.uuid4().hex[:24]}",
        "created": int(time.time()),
        "key": key_name,
    }
