"""A replica's names follow the registry: what is promoted or rolled back is served within a moment, without a restart.

A new version is read, checked and loaded beside the old one, and only then takes over the name. A version that is refused never
does: the old one goes on. Requests keep the version that they began with. Each replica writes what it serves to its status file,
output_dir/replicas/<replica>.json.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from pathlib import Path
from typing import Any

from rlhf_ray.errors import RlhfRayError
from rlhf_ray.models.backbone import Backbone
from rlhf_ray.registry import Registry
from rlhf_ray.registry.alias import now
from rlhf_ray.serve.adapter_cache import AdapterCache, CacheBusy
from rlhf_ray.serve.metrics import Metrics
from rlhf_ray.serve.model_index import ModelCheckpoint, ModelIndex, ModelVersion, registry_versions
from rlhf_ray.storage.files import atomic_write_json, read_json

log = logging.getLogger(__name__)


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
        self.registry, self.status_file, self.metrics = registry, status_file, metrics
        self._applied: str | None = None
        """`Registry.poll` of the state that is served."""

    async def run(self, interval_s: float) -> None:
        while True:
            await asyncio.sleep(interval_s)
            try:
                await self.poll()
            except Exception:  # a registry that cannot be read now may be readable again
                log.exception("the registry could not be followed; what is served stays as it is")

    async def poll(self) -> None:
        """Apply what has changed in the registry since the last poll."""
        if self.registry is None:
            return
        token = await asyncio.to_thread(self.registry.poll)
        if token == self._applied:
            return
        try:
            found = await asyncio.to_thread(registry_versions, self.registry, self.backbone)
        except RlhfRayError as error:
            log.error("registry %s: %s", self.registry.path, error)
            return
        await self.apply(found)
        self._applied = token

    async def apply(self, found: dict[str, tuple[list[ModelVersion], str]]) -> None:
        """Serve these names. A version that was refused is tried again: something has changed, perhaps its files."""
        for name in self.model_index.update(found):
            await self._activate(self.model_index.versions[self.model_index.desired[name]])
        await asyncio.to_thread(self._write_status)

    async def _activate(self, version: ModelVersion) -> None:
        try:
            checkpoint = await self._load(version)
        except RlhfRayError as error:
            self._refuse(version, error)
            return
        self.model_index.checkpoints[version.id] = checkpoint
        self.model_index.refused.pop(version.id, None)
        self.model_index.live[version.name] = version.id
        self.export_gauges()
        log.info("serving %s as %s, sha256 %s", version.id, version.name, checkpoint.sha256)

    def export_gauges(self) -> None:
        """Again and again: Ray drops a gauge that is set once."""
        for name, live in self.model_index.live.items():
            self.metrics.set("live_version", self.model_index.versions[live].number, adapter=name)

    async def _load(self, version: ModelVersion) -> ModelCheckpoint:
        """Checked and loaded; where every adapter in memory is in use, only checked: the first request for it loads it."""
        try:
            return (await self.adapter_cache.load(version.id, version.load)).checkpoint
        except CacheBusy:
            return (await asyncio.to_thread(version.load)).without_tensors()

    def _refuse(self, version: ModelVersion, error: RlhfRayError) -> None:
        stays = self.model_index.live.get(version.name)
        self.model_index.refused[version.id] = "; ".join(map(str, error.problems))
        self.metrics.count("adapters_refused", adapter=version.name)
        log.error(
            "refused %s, %s: %s", version.id, f"{stays} stays" if stays else "nothing is served as this name", error
        )

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
            },
            "refused": dict(self.model_index.refused),
        }


def remove_stale_status(folder: Path) -> None:
    """Remove the status files of replicas of this machine that were killed."""
    for path in folder.glob("*.json"):
        with contextlib.suppress(RlhfRayError, OSError, KeyError, TypeError):
            found = read_json(path)
            if found["host"] == socket.gethostname() and not Path("/proc", str(int(found["pid"]))).exists():
                path.unlink(missing_ok=True)
