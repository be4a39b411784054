"""A replica's names follow the registry: what is promoted or rolled back is served within a moment, without a restart.

A start reads no adapter: what the registry says is live is, and is read and checked with its first request. Of many names a start
does not even read what is live: that is read beside the requests, a few names at a time, and first what a request names. From then
on a new version is read and checked before it takes over the name, and put beside the old one where that is in use. A version that
is refused never does: the old one goes on. Requests keep the version that they began with. Each replica writes what it serves to
its status file, output_dir/replicas/<replica>.json.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlhf_ray.errors import ArtifactError, RlhfRayError
from rlhf_ray.models.backbone import Backbone
from rlhf_ray.registry import Registry, RegistryFollower
from rlhf_ray.registry.alias import now
from rlhf_ray.registry.follow import Changes
from rlhf_ray.serve.adapter_cache import AdapterCache, CacheTooSmall
from rlhf_ray.serve.metrics import Metrics
from rlhf_ray.serve.model_index import ModelCheckpoint, ModelIndex, ModelVersion, registry_versions
from rlhf_ray.storage.files import atomic_write_text

log = logging.getLogger(__name__)

MAX_SERIES = 100
"""Names up to which Prometheus gets the live version of each."""
AT_ONCE = 100
"""Names whose files are read in one go (about 15 ms of Python, which decoding waits for)."""
PAUSE_S = 0.01
"""Between two such goes."""
KNOWN_S = 8.0
"""How long a list of all names waits for those that have not been read."""


class RegistryWatcher:
    """registry: None where there is none.   status_file: where this replica writes `status`.
    serves_base: whether the base is served as well, as `status` tells."""

    def __init__(
        self,
        model_index: ModelIndex,
        adapter_cache: AdapterCache[ModelCheckpoint],
        backbone: Backbone,
        registry: Registry | None,
        status_file: Path,
        metrics: Metrics,
    ) -> None:
        self.model_index, self.adapter_cache, self.backbone = model_index, adapter_cache, backbone
        self.status_file, self.metrics = status_file, metrics
        self.serves_base = True
        adapter_cache.on_refused = lambda id, error: self.refuse(model_index.versions[id], error)
        self._follower = None if registry is None else RegistryFollower(registry)
        self._unread: set[str] = set()  # names that were there at the start, and of which nothing is known yet
        self._started = False
        self._applied = True
        self._turn = asyncio.Lock()  # of the follower
        self._all_read = asyncio.Event()

    async def start(self, runs: Mapping[str, tuple[list[ModelVersion], str]]) -> None:
        """Serve these and the names of the registry, as far as a start reads them."""
        self._serve_unread(runs)
        await self._poll_some()

    async def run(self, interval_s: float) -> None:
        while True:
            try:
                await self.poll()
            except Exception:  # a registry that cannot be read now may be readable again
                log.exception("the registry could not be followed; what is served stays as it is")
            await asyncio.sleep(interval_s)

    async def poll(self) -> None:
        """Apply what has changed in the registry since the last poll, and read what the start has left."""
        while await self._poll_some():
            await asyncio.sleep(PAUSE_S)

    async def know(self, models: Iterable[str]) -> None:
        """What these models' names stand for, if that has not been read yet."""
        names = {model.partition("@")[0] for model in models} & self._unread
        if names and self._follower is not None:
            await asyncio.shield(self._read(names, self._follower))

    async def _read(self, names: set[str], follower: RegistryFollower) -> None:
        """To its end, whoever asked and has gone: the follower tells of a change once."""
        async with self._turn:
            await self._follow(await asyncio.to_thread(follower.read, names))

    async def know_all(self) -> None:
        """What the names that were there at the start stand for; they have been read a few seconds later."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._all_read.wait(), KNOWN_S)

    async def _poll_some(self) -> bool:
        """Whether names are left to be read."""
        changes = Changes()
        async with self._turn:
            is_behind = not self._applied
            if self._follower is not None:
                changes = await asyncio.to_thread(self._follower.changes, AT_ONCE)
                if not self._started:
                    self._unread = {*changes.aliases, *changes.problems, *self._follower.due}
                await self._follow(changes)
        has_all, was_started, self._started = not self._unread, self._started, True
        if not was_started or (has_all and (changes or is_behind or not self._all_read.is_set())):
            self.export_gauges()
            await self.write_status()
        if has_all:
            self._all_read.set()
        return self._follower is not None and bool(self._follower.due)

    async def _follow(self, changes: Changes) -> None:
        assert self._follower is not None
        for name, problem in changes.problems.items():
            log.error("registry %s, %s: %s", self._follower.registry.path, name, problem)
        found = registry_versions(self._follower.registry, changes.aliases, self.backbone)
        first = {name: found.pop(name) for name in [*found] if name in self._unread}
        is_change = bool(changes.problems or changes.aliases.keys() - self._unread)
        self._unread.intersection_update(self._follower.due)
        self._serve_unread(first)
        if is_change or not self._applied:
            self._applied = False
            self.model_index.update(found)
            applied = True
            # Those that were refused, too: something has changed, perhaps their files.
            for version in self.model_index.behind():
                if version.problem is not None:
                    self.refuse(version, version.problem)
                elif is_change or self.model_index.may_be_read(version):
                    applied &= await self._activate(version)
                else:
                    applied = False
            self._applied = applied

    def _serve_unread(self, found: Mapping[str, tuple[list[ModelVersion], str]]) -> None:
        """Serve these names before their adapters are read."""
        self.model_index.update(found)
        for _, id in found.values():
            version = self.model_index.versions[id]
            if version.problem is not None:
                self.refuse(version, version.problem)
            else:
                self.model_index.serve(version)

    async def _activate(self, version: ModelVersion) -> bool:
        """Serve it, or refuse it, for whatever reason: the other names go on. False if it is to be tried again by itself."""
        try:
            checkpoint = await self.adapter_cache.verify(version.id, version.load)
            if self.model_index.live.get(version.name) in self.adapter_cache and not self.adapter_cache.is_full:
                await self.adapter_cache.load(version.id, version.load)
        except RlhfRayError:  # it has been refused, see __init__
            return True
        except CacheTooSmall as error:
            fix = "raise limits.max_adapter_bytes"
            self.refuse(version, ArtifactError.at(version.id, f"is too large for this service: {error}", fix=fix))
            return True
        except Exception as error:  # a disk or a device that fails now may be in order again
            log.exception("%s could not be loaded", version.id)
            self.refuse(version, ArtifactError.at(version.id, f"could not be loaded: {type(error).__name__}: {error}"))
            return False
        self.model_index.loaded(version, checkpoint)
        self.model_index.serve(version)
        log.info("serving %s as %s, sha256 %s", version.id, version.name, checkpoint.sha256)
        return True

    def export_gauges(self) -> None:
        """Again and again: Ray drops a gauge that is set once. Of many names, those in use: each one is a series of its own."""
        live = self.model_index.live
        named = [n for n, id in live.items() if id in self.adapter_cache] if len(live) > MAX_SERIES else list(live)
        for name in named:
            self.metrics.set("live_version", self.model_index.versions[live[name]].number, adapter=name)

    def refuse(self, version: ModelVersion, error: RlhfRayError) -> None:
        stays = self.model_index.live.get(version.name)
        self.model_index.refuse(version, "; ".join(map(str, error.problems)))
        self.metrics.count("adapters_refused", adapter=version.name)
        stands = f"{stays} stays" if stays not in (None, version.id) else "nothing is served as this name"
        log.error("refused %s, %s: %s", version.id, stands, error)

    async def write_status(self) -> None:
        await asyncio.to_thread(self._write_status)

    def _write_status(self) -> None:
        atomic_write_text(
            self.status_file, json.dumps(self.status(), ensure_ascii=False)
        )  # not indented: C writes that

    def status(self) -> dict[str, Any]:
        """{replica, host, pid, when, serves_base, live: {name: {id, version, sha256}}, refused: {id: why}}."""
        versions = self.model_index.versions
        return {
            "replica": self.status_file.stem,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "when": now(),
            "serves_base": self.serves_base,
            "unread": len(self._unread),
            "live": {
                name: {"id": id, "version": versions[id].number, "sha256": versions[id].sha256}
                for name, id in sorted(self.model_index.live.items())
                if id not in self.model_index.refused
            },
            "refused": dict(self.model_index.refused),
        }
