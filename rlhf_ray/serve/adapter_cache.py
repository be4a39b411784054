"""Adapters in the model's memory: loaded on demand, the least recently used one is evicted, one in use never is.

Lives on one event loop; only reading files and changing the model happen elsewhere.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, Protocol, Self, TypeVar

import torch
from peft import PeftModel

from rlhf_ray.errors import ArtifactError
from rlhf_ray.models.adapter_files import AdapterFiles
from rlhf_ray.models.adapters import adapter_parameters, adapter_sha256, add_from_files, remove_adapter
from rlhf_ray.serve.decode_thread import DecodeThread


class AdapterCheckpoint(Protocol):
    """What was read from disk, and passed its checks."""

    @property
    def files(self) -> AdapterFiles: ...

    def without_tensors(self) -> Self:
        """For an adapter whose tensors the model holds."""
        ...


C = TypeVar("C", bound=AdapterCheckpoint)


class CacheBusy(Exception):
    """The cache is full, and every adapter in it is in use."""


@dataclass(eq=False)
class CachedAdapter(Generic[C]):
    """An adapter that the model holds. adapter_name: in PEFT.  head: of a reward model.  users: requests that use it now."""

    key: str
    adapter_name: str
    checkpoint: C
    head: torch.Tensor | None = None
    users: int = 0


@dataclass
class AdapterCache(Generic[C]):
    """capacity: adapters in memory at once.  loads, evictions: how often each happened."""

    engine: DecodeThread
    capacity: int
    loads: int = 0
    evictions: int = 0
    _cached: OrderedDict[str, CachedAdapter[C]] = field(default_factory=OrderedDict)  # the least recently used first
    _loading: dict[str, asyncio.Task[CachedAdapter[C]]] = field(default_factory=dict)
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    _adding: asyncio.Lock = field(default_factory=asyncio.Lock)

    @asynccontextmanager
    async def use(self, key: str, read: Callable[[], C]) -> AsyncIterator[CachedAdapter[C]]:
        """The adapter `key`, which is not evicted while the block runs. read: gets it from disk, on a thread of its own.

        CacheBusy if no adapter can be evicted for it; whatever `read` raises; ArtifactError if it does not fit the model."""
        cached = await self._get(key, read)
        try:
            yield cached
        finally:
            cached.users -= 1

    async def load(self, key: str, read: Callable[[], C]) -> CachedAdapter[C]:
        """`use` for a moment: it is in memory afterwards, until it is evicted."""
        async with self.use(key, read) as cached:
            return cached

    def keys(self) -> list[str]:
        """The least recently used first."""
        return list(self._cached)

    async def _get(self, key: str, read: Callable[[], C]) -> CachedAdapter[C]:
        while True:
            cached = self._cached.get(key)
            if cached is None:
                task = self._loading.get(key)
                if task is None:
                    task = self._loading[key] = asyncio.create_task(self._load(key, read))
                    task.add_done_callback(lambda done: self._load_done(key, done))
                cached = await asyncio.shield(task)  # a request that is cancelled does not cancel it for the others
            if self._cached.get(key) is cached:  # else it was evicted before this request came to run
                cached.users += 1
                self._cached.move_to_end(key)
                return cached

    def _load_done(self, key: str, done: asyncio.Task[CachedAdapter[C]]) -> None:
        del self._loading[key]
        if not done.cancelled():
            done.exception()  # retrieved: it is raised to whoever waits, if anybody still does

    async def _load(self, key: str, read: Callable[[], C]) -> CachedAdapter[C]:
        checkpoint = await asyncio.to_thread(read)
        async with self._adding:
            await self._evict()
            name = f"ad_{next(self._numbers):04d}"
            await asyncio.wrap_future(self.engine.call(lambda model: _add(model, name, checkpoint.files)))
            head = checkpoint.files.head
            if head is not None:
                head = head.to(self.engine.backbone.device)
            cached = self._cached[key] = CachedAdapter(key, name, checkpoint.without_tensors(), head)
            self.loads += 1
            return cached

    async def _evict(self) -> None:
        while len(self._cached) >= self.capacity:
            idle = next((cached for cached in self._cached.values() if cached.users == 0), None)
            if idle is None:
                raise CacheBusy
            del self._cached[idle.key]
            self.evictions += 1
            await asyncio.wrap_future(self.engine.call(partial(remove_adapter, adapter_name=idle.adapter_name)))


def _add(model: PeftModel, name: str, files: AdapterFiles) -> None:
    """Add the adapter, and compare what the model now holds with the files."""
    add_from_files(model, name, files, trainable=False)
    model.eval()
    added = {key: parameter.detach().cpu() for key, parameter in adapter_parameters(model, name).items()}
    sha256 = adapter_sha256(added, files.head) if files.tensors.keys() == added.keys() else files.sha256
    if sha256 != files.sha256:
        remove_adapter(model, name)
        raise ArtifactError.at(files.path, "the model does not hold the adapter that was read", files.sha256, sha256)
