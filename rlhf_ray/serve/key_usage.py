"""What each API key has taken: replies being written, and tokens of the last minute. Lives on the API's event loop."""

from __future__ import annotations

import math
import time
from collections import Counter

from rlhf_ray.serve.api_errors import ApiError, overloaded
from rlhf_ray.serve.api_keys import ApiKey


class KeyUsage:
    """rows: replies that a key's requests are for, by its name. A request that generates nothing counts as one."""

    def __init__(self, retry_after_s: int) -> None:
        self.rows: Counter[str] = Counter()
        self._retry_after_s = retry_after_s
        self._tokens: dict[str, tuple[float, float]] = {}  # left at a time

    def begin(self, key: ApiKey, rows: int) -> None:
        """Count `rows` more. ApiError 429 if they are too many now, or the key's tokens are used up; 400 if they always are."""
        most = key.max_concurrent
        if most is not None and rows > most:
            message = f"{rows} replies are asked for at once; this key may have {most} at a time."
            raise ApiError(400, message, "too_many_replies", "n")
        if most is not None and self.rows[key.name] + rows > most:
            raise overloaded(self._retry_after_s)
        if key.max_tokens_per_minute is not None and (left := self._left(key)) <= 0:
            raise overloaded(max(math.ceil((1 - left) * 60 / key.max_tokens_per_minute), self._retry_after_s))
        self.rows[key.name] += rows

    def end(self, key: ApiKey, rows: int) -> None:
        self.rows[key.name] -= rows
        if not self.rows[key.name]:
            del self.rows[key.name]

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
