"""Adapters ready for use, in three tiers: beside the model on its device, in the host's memory, and on disk.

Loaded on demand. What does not fit any more goes, the least recently used first: from the device those that no request uses, from
the host's memory any. A request gets all its adapters at once or waits for its turn, so that two can never wait for each other; and
while one waits for room, the adapter that is to go takes no new requests, so that its turn comes.

Lives on one event loop; reading, checking and copying happen on other threads, and none of it on the decode thread.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, Self, TypeVar

from rlhf_ray.errors import RlhfRayError
from rlhf_ray.models.adapter_files import AdapterFiles
from rlhf_ray.models.adapter_pool import PackedAdapter
from rlhf_ray.models.heads import ScalarHead
from rlhf_ray.serve.decode_thread import DecodeThread
from rlhf_ray.serve.metrics import Metrics, NoMetrics


class AdapterCheckpoint(Protocol):
    """What was read from disk, and passed its checks."""

    @property
    def files(self) -> AdapterFiles: ...

    def without_tensors(self) -> Self:
        """For an adapter whose tensors are kept elsewhere."""
        ...


C = TypeVar("C", bound=AdapterCheckpoint)
T = TypeVar("T")

READERS = 1
"""Adapters that are read and checked at a time. That takes Python's lock most of its time, which decoding needs some hundred times
in every step: a burst of new adapters is to make it slower for a while, not to stop it."""


class CacheTooSmall(Exception):
    """One request wants more adapters at once than the cache can ever hold."""


@dataclass(eq=False)
class HostAdapter(Generic[C]):
    """An adapter in the host's memory, checked. packed: None where it has to go into PEFT's modules; files then has tensors."""

    checkpoint: C
    packed: PackedAdapter | None
    files: AdapterFiles

    @property
    def nbytes(self) -> int:
        tensors = self.files.tensors.values()
        return sum(t.numel() * 4 for t in tensors) if self.packed is None else self.packed.nbytes


@dataclass(eq=False)
class CachedAdapter(Generic[C]):
    """An adapter beside the model. adapter_name: of the sampler.  head: of a reward model, frozen.  users: requests that use it
    now.  leaving: it takes no new ones, and goes when those are done."""

    key: str
    adapter_name: str
    checkpoint: C
    nbytes: int
    head: ScalarHead | None = None
    users: int = 0
    leaving: bool = False


class AdapterCache(Generic[C]):
    """capacity, max_bytes: adapters on the device at once, and what they may take there; None is no limit.
    host_bytes: what they may take of the host's memory; host_used: what they do.
    loads, evictions: how often an adapter came onto the device, and made room for another."""

    def __init__(
        self,
        engine: DecodeThread,
        capacity: int,
        max_bytes: int | None = None,
        host_bytes: int = 0,
        metrics: Metrics | None = None,
    ) -> None:
        self.engine, self.capacity, self.max_bytes, self.host_bytes = engine, capacity, max_bytes, host_bytes
        self.metrics = metrics or NoMetrics()
        self.on_refused: Callable[[str, RlhfRayError], None] = lambda key, error: None
        """Called with every adapter that could not be read, or does not fit the model."""
        self.loads = self.evictions = self.host_used = 0
        self._cached: OrderedDict[str, CachedAdapter[C]] = OrderedDict()  # the least recently used first
        self._host: OrderedDict[str, HostAdapter[C]] = OrderedDict()
        self._reading: dict[str, asyncio.Task[HostAdapter[C]]] = {}
        self._numbers = itertools.count(1)
        self._turn = asyncio.Lock()  # of requests that need room, first come, first served
        self._change: asyncio.Future[Any] | None = None  # the last one of what is on the device
        self._released = asyncio.Event()
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="adapters")

    @asynccontextmanager
    async def use(self, key: str, read: Callable[[], C]) -> AsyncIterator[CachedAdapter[C]]:
        """`use_all` of one."""
        async with self.use_all({key: read}) as cached:
            yield cached[key]

    @asynccontextmanager
    async def use_all(self, reads: Mapping[str, Callable[[], C]]) -> AsyncIterator[dict[str, CachedAdapter[C]]]:
        """Adapters by key, which stay while the block runs. reads: get them from disk, on threads of their own.

        Waits as long as others use what would have to go. CacheTooSmall if they can never be there together; whatever a `read`
        raises; ArtifactError if one does not fit the model."""
        cached = await self._acquire(reads)
        try:
            yield cached
        finally:
            self._release(cached.values())

    async def load(self, key: str, read: Callable[[], C]) -> CachedAdapter[C]:
        """`use` for a moment: it is beside the model afterwards, until it is evicted."""
        async with self.use(key, read) as cached:
            return cached

    async def verify(self, key: str, read: Callable[[], C]) -> C:
        """Read and checked, as far as the host's memory; without tensors."""
        return (await self._on_host(key, read)).checkpoint

    def keys(self) -> list[str]:
        """On the device, the least recently used first."""
        return list(self._cached)

    def __contains__(self, key: object) -> bool:
        return key in self._cached

    @property
    def is_full(self) -> bool:
        """Something would have to go for another adapter."""
        return len(self._cached) >= self.capacity

    @property
    def nbytes(self) -> int:
        """On the device."""
        return sum(cached.nbytes for cached in self._cached.values())

    # ---- the device ------------------------------------------------------------------------------------------------------

    async def _acquire(self, reads: Mapping[str, Callable[[], C]]) -> dict[str, CachedAdapter[C]]:
        if len(reads) > self.capacity:
            raise CacheTooSmall(f"{len(reads)} adapters are wanted at once, and {self.capacity} can be loaded")
        there = {key: self._cached.get(key) for key in reads}
        if all(cached is not None and not cached.leaving for cached in there.values()):
            self.metrics.count("adapter_lookups", len(reads), found="device")
            return {key: self._pin(cached) for key, cached in there.items() if cached is not None}
        missing = [key for key, cached in there.items() if cached is None]
        for key in missing:
            self.metrics.count("adapter_lookups", found="host" if key in self._host else "disk")
        self.metrics.count("adapter_lookups", len(reads) - len(missing), found="device")
        ready = dict(zip(missing, await asyncio.gather(*(self._on_host(key, reads[key]) for key in missing))))
        nbytes = sum(one.nbytes for one in ready.values()) + sum(
            one.nbytes for one in there.values() if one is not None
        )
        if self.max_bytes is not None and nbytes > self.max_bytes:
            raise CacheTooSmall(f"they take {nbytes:,} bytes together, and there is room for {self.max_bytes:,}")
        pinned: dict[str, CachedAdapter[C]] = {}
        async with self._turn:
            if self._change is not None:
                await asyncio.wait([self._change])
            try:
                for key in sorted(
                    reads, key=lambda k: k not in self._cached
                ):  # first those that must not be evicted for others
                    cached = self._cached.get(key)
                    if cached is None:
                        adapter = ready.get(key) or await self._on_host(key, reads[key])
                        cached = await self._add(key, adapter, reads)
                    cached.leaving = False
                    pinned[key] = self._pin(cached)
            except BaseException:
                self._release(pinned.values())
                raise
        return {key: pinned[key] for key in reads}

    def _pin(self, cached: CachedAdapter[C]) -> CachedAdapter[C]:
        cached.users += 1
        self._cached.move_to_end(cached.key)
        return cached

    def _release(self, adapters: Iterable[CachedAdapter[C]]) -> None:
        for cached in adapters:
            cached.users -= 1
        self._released.set()

    async def _add(self, key: str, adapter: HostAdapter[C], own: Container[str]) -> CachedAdapter[C]:
        """With the turn held. own: keys of the request."""
        await self._make_room(adapter.nbytes, own)
        return await self._to_its_end(self._put(key, adapter))

    async def _put(self, key: str, adapter: HostAdapter[C]) -> CachedAdapter[C]:
        backbone, head = self.engine.backbone, None
        if adapter.files.head is not None:
            head = adapter.files.scalar_head(backbone.hidden_size).requires_grad_(False).to(backbone.device)
        name = f"ad_{next(self._numbers):04d}"
        await asyncio.to_thread(self.engine.add_adapter, name, adapter.packed, adapter.files)
        cached = self._cached[key] = CachedAdapter(key, name, adapter.checkpoint, adapter.nbytes, head)
        self.loads += 1
        self.metrics.count("adapter_loads")
        return cached

    async def _to_its_end(self, work: Awaitable[T]) -> T:
        """A change of what is on the device, with the turn held. A request that is cancelled meanwhile goes at once; the change is
        finished and recorded all the same, and whoever has the turn next waits for that."""
        change = self._change = asyncio.ensure_future(work)
        return await asyncio.shield(change)

    async def _make_room(self, nbytes: int, own: Container[str]) -> None:
        """Those in use that are to go are marked one after the other, until there is room."""
        marked: list[CachedAdapter[C]] = []
        try:
            while len(self._cached) >= self.capacity or not self._has_bytes(nbytes):
                others = [cached for cached in self._cached.values() if cached.key not in own]
                idle = next((cached for cached in others if cached.users == 0), None)
                if idle is not None:
                    await self._evict(idle)
                    continue
                if not any(cached.leaving for cached in others):
                    others[0].leaving = True
                    marked.append(others[0])
                self._released.clear()
                await self._released.wait()
        finally:
            for cached in marked:
                cached.leaving = False

    def _has_bytes(self, nbytes: int) -> bool:
        return self.max_bytes is None or self.nbytes + nbytes <= self.max_bytes

    async def _evict(self, cached: CachedAdapter[C]) -> None:
        del self._cached[cached.key]
        self.evictions += 1
        self.metrics.count("adapter_evictions")
        await self._to_its_end(asyncio.wrap_future(self.engine.remove_adapter(cached.adapter_name)))

    # ---- the host's memory -----------------------------------------------------------------------------------------------

    async def _on_host(self, key: str, read: Callable[[], C]) -> HostAdapter[C]:
        adapter = self._host.get(key)
        if adapter is not None:
            self._host.move_to_end(key)
            return adapter
        task = self._reading.get(key)
        if task is None:
            task = self._reading[key] = asyncio.create_task(self._read(key, read))
            task.add_done_callback(lambda done: self._read_done(key, done))
        return await asyncio.shield(task)  # a request that is cancelled does not cancel it for the others

    def _read_done(self, key: str, done: asyncio.Task[HostAdapter[C]]) -> None:
        del self._reading[key]
        if not done.cancelled():
            done.exception()  # retrieved: it is raised to whoever waits, if anybody still does

    async def _read(self, key: str, read: Callable[[], C]) -> HostAdapter[C]:
        def prepared() -> HostAdapter[C]:
            checkpoint = read()
            packed, light = self.engine.pack(checkpoint.files), checkpoint.without_tensors()
            return HostAdapter(light, packed, checkpoint.files if packed is None else light.files)

        try:
            loop = asyncio.get_running_loop()
            adapter = self._host[key] = await loop.run_in_executor(self._readers, prepared)
        except RlhfRayError as error:
            self.on_refused(key, error)
            raise
        self.host_used += adapter.nbytes
        while self.host_used > self.host_bytes:
            self.host_used -= self._host.popitem(last=False)[1].nbytes
        return adapter
