"""What each replica says of itself, output_dir/replicas/<replica>.json, as others read it. Imports no model."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_statuses(folder: Path) -> dict[str, dict[str, Any]]:
    """By replica; what cannot be read is left out."""
    found = {}
    for path in folder.glob("*.json"):
        with contextlib.suppress(OSError, ValueError):
            found[path.stem] = json.loads(path.read_text())
    return found


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """What changes when a file does: with many names a file is long, and need not be read again and again."""
    found = {}
    for path in folder.glob("*.json"):
        with contextlib.suppress(OSError):
            status = path.stat()
            found[path.stem] = status.st_mtime_ns, status.st_ino
    return found


def remove_stale(folder: Path, statuses: Mapping[str, Mapping[str, Any]]) -> None:
    """Remove the files of replicas of this machine that are no more: a process that was killed cannot remove its own."""
    for replica, status in statuses.items():
        with contextlib.suppress(OSError, KeyError, TypeError, ValueError):
            if status["host"] == socket.gethostname() and not Path("/proc", str(int(status["pid"]))).exists():
                (folder / f"{replica}.json").unlink(missing_ok=True)
