"""Coroutines from code that is not asynchronous: reward functions, requests to servers."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """What `coroutine` returns, or raises. Also where this thread runs an event loop already (an asynchronous actor): on another
    thread then."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1, "coroutine") as pool:
        return pool.submit(asyncio.run, coroutine).result()
