"""aliases/NAME.json: which versions a name has, which one is live, and everything that ever changed about it.

{schema, name, live, versions: {"1": {id, kind, adapter_sha256, manifest_sha256, base, created}}, history: [{action, version, ...}]}

The file is replaced in one rename, so that a reader needs no lock. `history` only grows.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from getpass import getuser
from pathlib import Path
from typing import Any

from rlhf_ray.errors import ArtifactError
from rlhf_ray.registry.names import adapter_id
from rlhf_ray.storage.checkpoints import check_schema
from rlhf_ray.storage.files import atomic_write_json, read_json

SCHEMA = 1
_HASHES = ("adapter_sha256", "manifest_sha256")


@dataclass(frozen=True)
class Alias:
    """live: None until the first version is there.
    versions: number -> {id, kind, adapter_sha256, manifest_sha256, base: {path, weights_sha256, config_sha256}, created}.
    history: {action: promote or rollback, version, from, when, by, reason, forced: gates that were overridden}."""

    name: str
    live: int | None = None
    versions: dict[int, dict[str, Any]] = field(default_factory=dict)
    history: tuple[dict[str, Any], ...] = ()

    def then(self, action: str, version: int, reason: str = "", forced: Sequence[str] = ()) -> Alias:
        """With `version` live, and the history saying so."""
        event = {
            "action": action,
            "version": version,
            "from": self.live,
            "when": now(),
            "by": whoami(),
            "reason": reason,
            "forced": list(forced),
        }
        return replace(self, live=version, history=(*self.history, event))

    def next_version(self) -> int:
        return max(self.versions, default=0) + 1

    def before_live(self) -> int | None:
        """What a rollback goes back to; None if there is nothing."""
        stack = lived(self.history)
        return stack[-2] if len(stack) > 1 else None

    def write(self, path: Path) -> None:
        values = {"schema": SCHEMA, **asdict(self)}
        atomic_write_json(path, values | {"versions": {str(n): v for n, v in self.versions.items()}})


def lived(history: Sequence[dict[str, Any]]) -> list[int]:
    """The versions that were live one after the other, without those that were taken back; the live one is last.

    >>> lived([{"action": "promote", "version": v} for v in (1, 2, 3)] + [{"action": "rollback", "version": 2}])
    [1, 2]
    """
    stack: list[int] = []
    for event in history:
        version = event["version"]
        if event["action"] == "rollback" and version in stack:
            del stack[len(stack) - stack[::-1].index(version) :]
        elif not stack or stack[-1] != version:
            stack.append(version)
    return stack


def read_alias(path: Path, name: str) -> Alias:
    """ArtifactError if the file is damaged: an alias that cannot be read is never taken for a new one."""
    found = read_json(path)
    check_schema(str(path), found)
    try:
        alias = Alias(
            str(found["name"]),
            found["live"],
            {int(number): dict(version) for number, version in found["versions"].items()},
            tuple(dict(event) for event in found["history"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError.at(str(path), f"is not the file of an alias: {type(error).__name__} {error}") from None
    if alias.name != name or not _makes_sense(alias):
        raise ArtifactError.at(str(path), "is damaged: versions, history and live version do not fit together")
    return alias


def _makes_sense(alias: Alias) -> bool:
    known = alias.versions.items()
    if not all(
        n > 0 and isinstance(v.get("base"), dict) and all(_is_hash(v.get(h)) for h in _HASHES) for n, v in known
    ):
        return False
    named = all(v.get("id") == adapter_id(alias.name, n, v["adapter_sha256"]) for n, v in known)
    events = [event.get("version") for event in alias.history]
    return named and set(events) <= alias.versions.keys() and alias.live == (events[-1] if events else None)


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def whoami() -> str:
    """user@host, for the record."""
    try:
        user = getuser()
    except (KeyError, OSError, ImportError):  # a container whose user has no name
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"
