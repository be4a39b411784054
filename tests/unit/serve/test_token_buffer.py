"""When tokens are handed over: the first and the last at once, the others together."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from rlhf_ray.serve import token_buffer as module
from rlhf_ray.serve.token_buffer import PAUSE_S, TokenBuffer


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    class Clock:
        now = 100.0

        def monotonic(self) -> float:
            return self.now

    found = Clock()
    monkeypatch.setattr(module, "time", found)
    return found


async def taken(box: TokenBuffer) -> list[Any] | None:
    try:
        return await asyncio.wait_for(box.take(), 0.01)
    except TimeoutError:
        return None


def test_the_first_and_the_last_at_once_and_the_others_together(clock: Any) -> None:
    async def story() -> None:
        box = TokenBuffer()
        box.put("a", urgent=False)
        assert await taken(box) == ["a"]
        box.put("b", urgent=False)
        assert await taken(box) is None
        clock.now += PAUSE_S
        box.put("c", urgent=False)
        assert await taken(box) == ["b", "c"]
        box.put("d", urgent=False)
        box.put("e", urgent=True)
        assert await taken(box) == ["d", "e"]

    asyncio.run(story())


def test_the_pause_grows_with_the_asks_that_are_answered(clock: Any) -> None:
    async def story() -> None:
        box = TokenBuffer()
        box.put("a", urgent=False)
        await box.take()
        clock.now += 0.25
        box.put("b", urgent=False, requests=100)
        assert await taken(box) is None
        clock.now += 0.06
        box.put("c", urgent=False, requests=100)
        assert await taken(box) == ["b", "c"]

    asyncio.run(story())


def test_where_nobody_reads_along_the_end_alone_counts(clock: Any) -> None:
    async def story() -> None:
        box = TokenBuffer(whole=True)
        box.put("a", urgent=False)
        assert await taken(box) == ["a"]
        clock.now += 60
        box.put("b", urgent=False)
        assert await taken(box) is None
        box.put("c", urgent=True)
        assert await taken(box) == ["b", "c"]

    asyncio.run(story())
