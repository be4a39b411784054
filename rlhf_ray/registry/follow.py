"""Following a registry at a cost that does not grow with its names: only what has changed since the last look is read."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

from rlhf_ray.errors import RlhfRayError
from rlhf_ray.registry.alias import Alias, read_alias
from rlhf_ray.registry.store import Registry, Stamp

LOOK_S = 0.5
"""While names are still to be read, the folder is looked at this often."""
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
    """What has not been told yet is told by one of the next calls. Not thread-safe."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.due: dict[str, None] = {}
        """Names whose files are to be read: at first all that the folder lists, of which nothing is looked at."""
        self._told: dict[str, Stamp] = {}
        self._folder: tuple[int, int] | None = None
        self._seen_at = self._looked_at = 0.0

    def changes(self, most: int | None = None) -> Changes:
        """Every change is one rename into the folder of names, which changes the folder's time: where that is as before, nothing
        else is looked at.

        most: names that are read in this call; the others stay `due`."""
        if not self.due or time.monotonic() - self._looked_at > LOOK_S:
            self._look()
            self._looked_at = time.monotonic()
        return self.read(list(islice(self.due, most)))

    def read(self, names: Iterable[str]) -> Changes:
        """What is due of these names."""
        found = Changes()
        for name in names:
            if name not in self.due:
                continue
            del self.due[name]
            if (stamp := self.registry.stamp(name)) is None:
                continue
            self._told[name] = stamp
            try:
                found.aliases[name] = read_alias(self.registry.path / "aliases" / f"{name}.json", name)
            except RlhfRayError as error:
                found.problems[name] = error
        return found

    def _look(self) -> None:
        folder, is_first = self._folder_stamp(), self._folder is None
        if folder is not None and folder == self._folder and time.monotonic() - self._seen_at > SETTLED_S:
            return
        if folder != self._folder:
            self._folder, self._seen_at = folder, time.monotonic()
        if is_first:
            self.due = dict.fromkeys(self.registry.listed())
            return
        changed = [name for name, stamp in self.registry.stamps().items() if self._told.get(name) != stamp]
        changed.sort(key=lambda name: name not in self._told)  # first what has changed: somebody waits for that
        self.due = dict.fromkeys(changed)

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
