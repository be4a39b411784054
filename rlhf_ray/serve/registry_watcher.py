"""A replica's names follow the registry: what is promoted or rolled back is served within a moment, without a restart.

A start reads no adapter: what the registry says is live is, and is read and checked with its first request. From then on a new
version is read and checked before it takes over the name, and put beside the old one where that is in use. A version that is
refused never does: the old one goes on. Requests keep the version that they began with. Each replica writes what it serves to its
status file, output_dir/replicas/<replica>.json.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from pathlib import Path
from typing import Any

from rlhf_ray.errors import RlhfRayError
from rlhf_ray.models.backbone import Backbone
from rlhf_ray.registry import Registry, RegistryFollower
from rlhf_ray.registry.alias import now
from rlhf_ray.serve.adapter_cache import AdapterCache
from rlhf_ray.serve.metrics import Metrics
from rlhf_ray.serve.model_index import ModelCheckpoint, ModelIndex, ModelVersion, registry_versions
from rlhf_ray.storage.files import atomic_write_json

log = logging.getLogger(__name__)

MAX_SERIES = 100
"""Names up to which Prometheus gets the live version of each."""


class RegistryWatcher:
    """registry: None where there is none.   status_file: where this replica writes `status`."""

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
        adapter_cache.on_refused = lambda id, error: self.refuse(model_index.versions[id], error)
        self._follower = None if registry is None else RegistryFollower(registry)
        self._started = self._applied = False

    async def run(self, interval_s: float) -> None:
        while True:
            await asyncio.sleep(interval_s)
            try:
                await self.poll()
            except Exception:  # a registry that cannot be read now may be readable again
                log.exception("the registry could not be followed; what is served stays as it is")

    async def poll(self) -> None:
        """Apply what has changed in the registry since the last poll."""
        if self._follower is None:
            return
        changes = await asyncio.to_thread(self._follower.changes)
        for name, problem in changes.problems.items():
            log.error("registry %s, %s: %s", self._follower.registry.path, name, problem)
        if changes or not self._applied:
            self._applied = False
            found = registry_versions(self._follower.registry, changes.aliases, self.backbone)
            await self.apply(found, unread=not self._started)
        self._started = self._applied = True

    async def apply(self, found: dict[str, tuple[list[ModelVersion], str]], unread: bool = False) -> None:
        """Serve these names. A version that was refused is tried again: something has changed, perhaps its files.

        unread: they are served before they are read."""
        for name in self.model_index.update(found):
            version = self.model_index.versions[self.model_index.desired[name]]
            if version.problem is not None:
                self.refuse(version, version.problem)
            elif unread:
                self.model_index.serve(version)
            else:
                await self._activate(version)
        self.export_gauges()
        await self.write_status()

    async def _activate(self, version: ModelVersion) -> None:
        try:
            checkpoint = await self.adapter_cache.verify(version.id, version.load)
            if self.model_index.live.get(version.name) in self.adapter_cache and not self.adapter_cache.is_full:
                await self.adapter_cache.load(version.id, version.load)
        except RlhfRayError:  # it has been refused, see __init__
            return
        self.model_index.loaded(version, checkpoint)
        self.model_index.serve(version)
        log.info("serving %s as %s, sha256 %s", version.id, version.name, checkpoint.sha256)

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
        atomic_write_json(self.status_file, self.status())

    def status(self) -> dict[str, Any]:
        """{replica, host, pid, when, live: {name: {id, version, sha256}}, refused: {id: why}}."""
        versions = self.model_index.versions
        return {
            "replica": self.status_file.stem,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "when": now(),
            "live": {
                name: {"id": id, "version": versions[id].number, "sha256": versions[id].sha256}
                for name, id in sorted(self.model_index.live.items())
                if id not in self.model_index.refused
            },
            "refused": dict(self.model_index.refused),
        }
