"""A request that is sent again under the same id runs once: clients retry, and must not be charged or counted twice.

Not of streams, which cannot be repeated from where they broke off: they are written anew. They are not refused, since clients send
the header with every request."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any

TTL_S = 60.0
MAX_ENTRIES = 256


class IdempotencyCache:
    """Responses of the last minute by request id; a repeat of a request that still runs waits for it."""

    def __init__(self) -> None:
        self._responses: OrderedDict[str, tuple[float, asyncio.Future[Any]]] = OrderedDict()

    async def get_or_run(self, key: str | None, work: Callable[[], Awaitable[Any]]) -> Any:
        """What `work` returns; for a key in the cache, what it returned then. A failure is not cached."""
        if key is None:
            return await work()
        self._evict()
        while (entry := self._responses.get(key)) is not None:
            try:
                return await asyncio.shield(entry[1])
            except asyncio.CancelledError:
                if not entry[1].cancelled():  # it is this request that was cancelled, not the one it waits for
                    raise
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._responses[key] = time.monotonic(), future
        try:
            response = await work()
        except BaseException as error:
            self._responses.pop(key, None)
            if isinstance(error, Exception):
                future.set_exception(error)
                future.exception()  # retrieved, also if nobody else waits for it
            else:
                future.cancel()
            raise
        future.set_result(response)
        return response

    def _evict(self) -> None:
        while self._responses:
            key, (when, future) = next(iter(self._responses.items()))
            if len(self._responses) <= MAX_ENTRIES and (time.monotonic() - when < TTL_S or not future.done()):
                return
            del self._responses[key]
