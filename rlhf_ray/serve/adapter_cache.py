"""Adapters in the engine's memory: loaded on demand, the least recently used one leaves first, one in use never does.

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


class AdapterReadout(Protocol):
    """What was read from disk, and passed its checks."""

    @property
    def files(self) -> AdapterFiles: ...

    def light(self) -> Self:
        """All but the tensors, which the model then has."""
        ...


L = TypeVar("L", bound=AdapterReadout)


class CacheBusy(Exception):
    """Every slot is in use by a request that runs."""


@dataclass(eq=False)
class CachedAdapter(Generic[L]):
    """An adapter that the model holds. name: in PEFT.  users: requests that run under it.  head: of a reward model."""

    key: str
    name: str
    loaded: L
    head: torch.Tensor | None = None
    users: int = 0


@dataclass
class AdapterCache(Generic[L]):
    """capacity: adapters in memory at once.  loads, evictions: how often each happened."""

    engine: DecodeThread
    capacity: int
    loads: int = 0
    evictions: int = 0
    _cached: OrderedDict[str, CachedAdapter[L]] = field(default_factory=OrderedDict)  # the least recently used first
    _loading: dict[str, asyncio.Task[CachedAdapter[L]]] = field(default_factory=dict)
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    _room: asyncio.Lock = field(default_factory=asyncio.Lock)

    @asynccontextmanager
    async def use(self, key: str, read: Callable[[], L]) -> AsyncIterator[CachedAdapter[L]]:
        """The adapter `key` in a slot that it keeps while the block runs. read: gets it from disk, on a thread of its own.

        CacheBusy if no slot can be freed; whatever `read` raises; ArtifactError if it does not fit the model."""
        cached = await self._get(key, read)
        try:
            yield cached
        finally:
            cached.users -= 1

    async def load(self, key: str, read: Callable[[], L]) -> CachedAdapter[L]:
        """`use`, without staying: it is there afterwards, unless others crowd it out."""
        async with self.use(key, read) as cached:
            return cached

    def held(self) -> list[str]:
        return list(self._cached)

    def holds(self, key: str) -> bool:
        return key in self._cached

    async def _get(self, key: str, read: Callable[[], L]) -> CachedAdapter[L]:
        while True:
            cached = self._cached.get(key)
            if cached is None:
                task = self._loading.get(key)
                if task is None:
                    task = self._loading[key] = asyncio.create_task(self._load(key, read))
                    task.add_done_callback(lambda done: self._loaded(key, done))
                cached = await asyncio.shield(task)  # who gives up waiting does not take it from the others
            if self._cached.get(key) is cached:  # else it was crowded out before this request came to run
                cached.users += 1
                self._cached.move_to_end(key)
                return cached

    def _loaded(self, key: str, done: asyncio.Task[CachedAdapter[L]]) -> None:
        del self._loading[key]
        if not done.cancelled():
            done.exception()  # seen: it is raised to whoever waits, if anybody still does

    async def _load(self, key: str, read: Callable[[], L]) -> CachedAdapter[L]:
        loaded = await asyncio.to_thread(read)
        async with self._room:
            await self._make_room()
            name = f"ad_{next(self._numbers):04d}"
            await asyncio.wrap_future(self.engine.call(lambda model: _add(model, name, loaded.files)))
            head = loaded.files.head
            cached = CachedAdapter(
                key, name, loaded.light(), None if head is None else head.to(self.engine.backbone.device)
            )
            self._cached[key] = cached
            self.loads += 1
            return cached

    async def _make_room(self) -> None:
        while len(self._cached) >= self.capacity:
            idle = next((cached for cached in self._cached.values() if cached.users == 0), None)
            if idle is None:
                raise CacheBusy
            del self._cached[idle.key]
            self.evictions += 1
            await asyncio.wrap_future(self.engine.call(partial(remove_adapter, adapter_name=idle.name)))


def _add(model: PeftModel, name: str, files: AdapterFiles) -> None:
    """Add the adapter, and read back what the model now holds."""
    add_from_files(model, name, files, trainable=False)
    model.eval()
    held = {key: parameter.detach().cpu() for key, parameter in adapter_parameters(model, name).items()}
    found = adapter_sha256(held, files.head) if files.tensors.keys() == held.keys() else files.sha256
    if found != files.sha256:
        remove_adapter(model, name)
        raise ArtifactError.at(files.path, "the model does not hold the adapter that was read", files.sha256, found)
