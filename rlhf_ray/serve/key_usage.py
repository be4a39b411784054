"""What each API key has taken: replies being written, and tokens of the last minute. Lives on the API's event loop."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque

from rlhf_ray.serve.api_errors import ApiError, overloaded
from rlhf_ray.serve.api_keys import ApiKey


class KeyUsage:
    """rows: replies that a key's requests are for, by its name. A request that generates nothing counts as one.

    most_waiting: requests of one key that may wait for their turn (`wait`): each has a place in Serve's proxy, of which others want
    some too."""

    def __init__(self, retry_after_s: int, most_waiting: int = 4) -> None:
        self.rows: Counter[str] = Counter()
        self._retry_after_s, self._most_waiting = retry_after_s, most_waiting
        self._tokens: dict[str, tuple[float, float]] = {}  # left at a time
        self._waiting: dict[str, deque[tuple[int, asyncio.Future[None]]]] = {}  # for fewer rows than so many, by key

    def begin(self, key: ApiKey, rows: int) -> None:
        """Count `rows` more. ApiError 429 if they are too many now, or the key's tokens are used up; 400 if they always are."""
        most = key.max_concurrent
        if most is not None and rows > most:
            message = f"{rows} replies are asked for at once; this key may have {most} at a time."
            raise ApiError(400, message, "too_many_replies", "n")
        if most is not None and self.rows[key.name] + rows > most:
            raise overloaded(self._retry_after_s)
        self._check_tokens(key)
        self.rows[key.name] += rows

    async def wait(self, key: ApiKey, seconds: float) -> None:
        """Count one more where the key has room for it, else once it has: in the order in which requests come.

        ApiError 429 if its tokens are used up, too many wait, or no room has come in so many seconds."""
        self._check_tokens(key)
        most = key.max_concurrent
        if most is None or self.rows[key.name] < most:  # where any waits there is no room
            self.rows[key.name] += 1
            return
        queue = self._waiting.setdefault(key.name, deque())
        if len(queue) >= self._most_waiting:
            raise overloaded(self._retry_after_s)
        mine = most, asyncio.get_running_loop().create_future()
        queue.append(mine)
        try:
            async with asyncio.timeout(seconds):
                await mine[1]
            self._check_tokens(key)
        except BaseException as error:
            if mine in queue:
                queue.remove(mine)
            elif not mine[1].cancelled():  # the room was handed on, and is not wanted any more
                self.end(key, 1)
            if isinstance(error, TimeoutError):
                raise overloaded(self._retry_after_s) from None
            raise

    def begin_some(self, key: ApiKey, rows: int) -> int:
        """Count up to `rows` more, as many as the key has room for. How many that were."""
        room = rows if key.max_concurrent is None else key.max_concurrent - self.rows[key.name]
        taken = max(min(rows, room), 0)
        self.rows[key.name] += taken
        return taken

    def end(self, key: ApiKey, rows: int) -> None:
        self.rows[key.name] -= rows
        queue = self._waiting.get(key.name)
        while queue and self.rows[key.name] < queue[0][0]:
            _, turn = queue.popleft()
            if not turn.done():  # else its client has gone
                self.rows[key.name] += 1
                turn.set_result(None)
        if not self.rows[key.name]:
            del self.rows[key.name]
        if not queue:
            self._waiting.pop(key.name, None)

    def _check_tokens(self, key: ApiKey) -> None:
        if key.max_tokens_per_minute is not None and (left := self._left(key)) <= 0:
            raise overloaded(max(math.ceil((1 - left) * 60 / key.max_tokens_per_minute), self._retry_after_s))

    def charge(self, key: ApiKey, tokens: int) -> None:
        """Tokens of a request that has ended. They fill up again evenly (a token bucket of one minute); the request that uses up
        the last ones may take more than are left."""
        if key.max_tokens_per_minute is not None:
            self._tokens[key.name] = self._left(key) - tokens, time.monotonic()

    def _left(self, key: ApiKey) -> float:
        assert key.max_tokens_per_minute is not None
        now = time.monotonic()
        left, at = self._tokens.get(key.name, (key.max_tokens_per_minute, now))
        return min(left + (now - at) * key.max_tokens_per_minute / 60, key.max_tokens_per_minute)
