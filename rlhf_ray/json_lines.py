"""A log of JSON rows that belong to steps, one per line, which a run that goes on cuts back to its checkpoint."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self


class JsonLines:
    """A file of JSON objects, one per line. A line is on disk when `append` returns; a torn last line is cut on opening."""

    def __init__(self, path: Path) -> None:
        self.path = path
        whole = path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        self._file.truncate(whole)

    @property
    def bytes(self) -> int:
        """Length of the file: what a checkpoint stores and `resume_at` takes."""
        return os.fstat(self._file.fileno()).st_size

    def append(self, row: Mapping[str, Any]) -> None:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
        # A lone surrogate cannot be UTF-8; inside a JSON string its escape \udXXX reads back as the same character.
        self._file.write(text.encode("utf-8", errors="backslashreplace"))
        os.fsync(self._file.fileno())

    def resume_at(self, length: int, step: int) -> str:
        """Forget everything after `length` bytes, where the file ended at the checkpoint of `step`.

        Returns what is to be warned of, "" for nothing: a file that has lost rows keeps those up to `step` that it has. It is an
        account of the run, and nothing that the run needs."""
        found = self.bytes
        fits = length <= found and (length == 0 or self.path.read_bytes()[length - 1 : length] == b"\n")
        if fits:
            self._file.truncate(length)
            os.fsync(self._file.fileno())
            return ""
        kept = [line for line in self.path.read_bytes().splitlines(keepends=True) if _step_of(line) <= step]
        self._file.truncate(0)
        self._file.write(b"".join(kept))
        os.fsync(self._file.fileno())
        return (
            f"{self.path}: does not match its checkpoint; expected {length} bytes at step {step}; got {found}; the {len(kept)} rows"
            f" up to there are kept, others are lost, and the run continues"
        )

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _step_of(line: bytes) -> float:
    """Of a row; infinite where the line is none."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf
