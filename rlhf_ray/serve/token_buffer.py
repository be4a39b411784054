"""What was decoded for one ask, on its way to whoever writes it out.

A token of 32 streams every few milliseconds, each on its own through the processes of a service, would cost more than to decode
them. So the first is handed over at once, and so is the end of a reply; what comes between waits for others to go with it.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

PAUSE_S = 0.03
"""Between two hand-overs of an ask: 30 a second look like writing."""
PAUSE_PER_REQUEST_S = 0.003
"""Grows with the asks that are being answered, so that together they make 300 hand-overs a second at most."""


class TokenBuffer:
    """Lives on one event loop. whole: hand over the first item and the ends alone; nobody reads along."""

    def __init__(self, whole: bool = False) -> None:
        self._whole = whole
        self._items: list[Any] = []
        self._wake = asyncio.Event()
        self._handed_over = float("-inf")

    def put(self, item: Any, urgent: bool, requests: int = 1) -> None:
        """urgent: hand over at once what there is.  asks: that are being answered now."""
        self._items.append(item)
        pause = float("inf") if self._whole and self._handed_over > 0 else max(PAUSE_S, PAUSE_PER_REQUEST_S * requests)
        if urgent or time.monotonic() - self._handed_over >= pause:
            self._wake.set()

    async def take(self) -> list[Any]:
        """Everything there is, once something is to be handed over."""
        await self._wake.wait()
        self._wake.clear()
        self._handed_over = time.monotonic()
        items, self._items = self._items, []
        return items
