"""A replica's names follow the registry: what is promoted or rolled back is served within a moment, without a restart.

A new version is read, checked and loaded beside the old one, and only then takes over the name. A version that is refused never
does: the old one goes on. Requests keep the version that they began with. What each replica serves it writes down, as its
acknowledgement: output_dir/replicas/<replica>.json.
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
from rlhf_ray.serve.model_index import ModelIndex, ModelReadout, Version, registry_versions
from rlhf_ray.storage.files import atomic_write_json, read_json

log = logging.getLogger(__name__)


class RegistryWatcher:
    """registry: None where there is none.   notes: the replica's own file of what it serves."""

    def __init__(
        self,
        model_index: ModelIndex,
        adapter_cache: AdapterCache[ModelReadout],
        backbone: Backbone,
        registry: Registry | None,
        notes: Path,
        metrics: Metrics,
    ) -> None:
        self.model_index, self.adapter_cache, self.backbone = model_index, adapter_cache, backbone
        self.registry, self.notes, self.metrics = registry, notes, metrics
        self._token: str | None = None

    async def forever(self, every_s: float) -> None:
        while True:
            await asyncio.sleep(every_s)
            try:
                await self.look()
            except Exception:  # a registry that cannot be read now may be readable again
                log.exception("the registry could not be followed; what is served stays as it is")

    async def look(self) -> None:
        """Take over what has changed in the registry since the last look."""
        if self.registry is None:
            return
        token = await asyncio.to_thread(self.registry.poll)
        if token == self._token:
            return
        try:
            found = await asyncio.to_thread(registry_versions, self.registry, self.backbone)
        except RlhfRayError as error:
            log.error("registry %s: %s", self.registry.path, error)
            return
        await self.take(found)
        self._token = token

    async def take(self, found: dict[str, tuple[list[Version], str]]) -> None:
        """Serve these names. A version that was refused is tried again: something has changed, perhaps its files."""
        for name in self.model_index.offer(found):
            await self._switch(self.model_index.versions[self.model_index.wanted[name]])
        await asyncio.to_thread(self._note)

    async def read(self, version: Version) -> ModelReadout:
        """For a request that names it: known already, else from disk."""
        readout = self.model_index.known.get(version.id)
        if readout is None:
            readout = self.model_index.known[version.id] = (await asyncio.to_thread(version.read)).light()
        return readout

    async def _switch(self, version: Version) -> None:
        try:
            readout = await self._fit(version)
        except RlhfRayError as error:
            self._refuse(version, error)
            return
        self.model_index.known[version.id] = readout
        self.model_index.refused.pop(version.id, None)
        self.model_index.live[version.name] = version.id
        self.metrics.set("live_version", version.number, adapter=version.name)
        log.info("serving %s as %s, sha256 %s", version.id, version.name, readout.sha256)

    async def _fit(self, version: Version) -> ModelReadout:
        """Checked and loaded; where every slot is in use, only checked: it is loaded when it is asked for."""
        try:
            return (await self.adapter_cache.load(version.id, version.read)).loaded
        except CacheBusy:
            return (await asyncio.to_thread(version.read)).light()

    def _refuse(self, version: Version, error: RlhfRayError) -> None:
        stays = self.model_index.live.get(version.name)
        self.model_index.refused[version.id] = "; ".join(map(str, error.problems))
        self.metrics.count("adapters_refused", adapter=version.name)
        log.error(
            "refused %s, %s: %s", version.id, f"{stays} stays" if stays else "nothing is served as this name", error
        )

    def _note(self) -> None:
        atomic_write_json(self.notes, self.status())

    def status(self) -> dict[str, Any]:
        """{replica, host, pid, when, live: {name: {id, version, sha256}}, refused: {id: why}}."""
        versions = self.model_index.versions
        return {
            "replica": self.notes.stem,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "when": now(),
            "live": {
                name: {"id": id, "version": versions[id].number, "sha256": versions[id].sha256}
                for name, id in sorted(self.model_index.live.items())
            },
            "refused": dict(self.model_index.refused),
        }


def forget_the_dead(folder: Path) -> None:
    """Remove what replicas on this machine left behind that were killed: they acknowledge nothing any more."""
    for path in folder.glob("*.json"):
        with contextlib.suppress(RlhfRayError, OSError, KeyError, TypeError):
            found = read_json(path)
            if found["host"] == socket.gethostname() and not Path("/proc", str(int(found["pid"]))).exists():
                path.unlink(missing_ok=True)
