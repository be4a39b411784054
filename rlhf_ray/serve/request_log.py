"""Files that the service appends lines to: the access log, and the preferences of people. Several processes may write."""

from __future__ import annotations

import fcntl
import json
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_ray.serve.openai_types import PreferenceRequest

ACCESS_LOG = "access.jsonl"
PREFERENCE_LOG = "preferences.jsonl"


class RequestLog:
    """JSON lines in `path`; each is written whole or not at all, whoever else writes.   durable: `append` flushes to disk."""

    def __init__(self, path: Path, durable: bool = False) -> None:
        self.path, self.durable = path, durable
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def append(self, row: Mapping[str, Any]) -> None:
        line = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "replace")
        fcntl.flock(self._fd, fcntl.LOCK_EX)
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
    return {
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
