"""A request that is sent again under the same id is answered once: clients retry, and must not be charged or counted twice."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any

KEPT_S = 60.0
KEPT = 256


class IdempotencyCache:
    """Answers of the last minute by request id; a repeat of one that still runs waits for it."""

    def __init__(self) -> None:
        self._answers: OrderedDict[str, tuple[float, asyncio.Future[Any]]] = OrderedDict()

    async def once(self, key: str | None, work: Callable[[], Awaitable[Any]]) -> Any:
        """What `work` returns; for a key that was seen, what it returned then. A failure is not kept."""
        if key is None:
            return await work()
        self._forget()
        while (known := self._answers.get(key)) is not None:
            try:
                return await asyncio.shield(known[1])
            except asyncio.CancelledError:
                if not known[1].cancelled():  # it is this request that was cancelled, not the one it waits for
                    raise
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._answers[key] = time.monotonic(), future
        try:
            answer = await work()
        except BaseException as error:
            self._answers.pop(key, None)
            if isinstance(error, Exception):
                future.set_exception(error)
                future.exception()  # seen, also if nobody else waits for it
            else:
                future.cancel()
            raise
        future.set_result(answer)
        return answer

    def _forget(self) -> None:
        while self._answers:
            key, (when, future) = next(iter(self._answers.items()))
            if len(self._answers) <= KEPT and (time.monotonic() - when < KEPT_S or not future.done()):
                return
            del self._answers[key]
