"""Following a registry at a cost that does not grow with its names: only what has changed since the last look is read."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field

from rlhf_ray.errors import RlhfRayError
from rlhf_ray.registry.alias import Alias, read_alias
from rlhf_ray.registry.store import Registry, Stamp

SETTLED_S = 2.0
"""Two changes within one tick of a file system's clock leave the folder with one time. So the names are looked through until the
folder's time has been the same for so long; the coarsest clocks in use tick every second."""


@dataclass(frozen=True)
class Changes:
    """aliases: names that are new or have changed.   problems: of names whose files cannot be read; they are tried again when the
    files change."""

    aliases: dict[str, Alias] = field(default_factory=dict)
    problems: dict[str, RlhfRayError] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.aliases or self.problems)


class RegistryFollower:
    """What `changes` has not told yet is told by its next call."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self._told: dict[str, Stamp] = {}
        self._folder: tuple[int, int] | None = None
        self._seen_at = 0.0

    def changes(self) -> Changes:
        """Every change is one rename into the folder of names, which changes the folder's time: where that is as before, nothing
        else is looked at."""
        folder = self._folder_stamp()
        if folder is not None and folder == self._folder and time.monotonic() - self._seen_at > SETTLED_S:
            return Changes()
        if folder != self._folder:
            self._folder, self._seen_at = folder, time.monotonic()
        found = Changes()
        for name, stamp in self.registry.stamps().items():
            if self._told.get(name) == stamp:
                continue
            try:
                alias = read_alias(self.registry.path / "aliases" / f"{name}.json", name)
            except RlhfRayError as error:
                found.problems[name] = error
            else:
                found.aliases[name] = alias
            self._told[name] = stamp
        return found

    def _folder_stamp(self) -> tuple[int, int] | None:
        """Opened, since that makes a network file system ask its server."""
        try:
            handle = os.open(self.registry.path / "aliases", os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            return None
        try:
            status = os.fstat(handle)
        finally:
            os.close(handle)
        return status.st_mtime_ns, status.st_ino
