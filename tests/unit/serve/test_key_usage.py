"""Replies at a time, and tokens in a minute, of each key."""

from __future__ import annotations

import asyncio

import pytest

from rlhf_ray.serve import key_usage
from rlhf_ray.serve.api_errors import ApiError
from rlhf_ray.serve.api_keys import ApiKey
from rlhf_ray.serve.key_usage import KeyUsage


def refusal(usage: KeyUsage, key: ApiKey, rows: int) -> tuple[int, int | None]:
    with pytest.raises(ApiError) as refused:
        usage.begin(key, rows)
    return refused.value.status, refused.value.retry_after


def test_max_concurrent_counts_replies() -> None:
    """It counted requests: one of 64 replies was one."""
    usage, key, other = KeyUsage(3), ApiKey("a", "", (), 4), ApiKey("b", "")
    usage.begin(key, 3)
    assert refusal(usage, key, 2) == (429, 3)
    assert refusal(usage, key, 5)[0] == 400, "it could never be"
    usage.begin(key, 1)
    usage.begin(other, 1000)
    usage.end(key, 3)
    usage.begin(key, 2)
    for rows in (1, 2):
        usage.end(key, rows)
    usage.end(other, 1000)
    assert not usage.rows


def test_tokens_fill_up_again_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(key_usage.time, "monotonic", lambda: now[0])
    usage, key = KeyUsage(1), ApiKey("a", "", (), None, 600)
    usage.begin(key, 1)
    usage.charge(key, 500)
    usage.begin(key, 1)
    usage.charge(key, 300)  # more than were left
    assert refusal(usage, key, 1) == (429, 21), "201 tokens at 10 a second"
    now[0] += 19.9
    assert refusal(usage, key, 1)[0] == 429
    now[0] += 0.3
    usage.begin(key, 1)
    now[0] += 10_000
    usage.charge(key, 599)
    usage.begin(key, 1)


def test_requests_that_wait_come_in_as_they_came_and_leave_nothing_behind() -> None:
    usage, key = KeyUsage(3, most_waiting=5), ApiKey("a", "", (), 2)

    async def run() -> None:
        usage.begin(key, 2)
        order = list[int]()

        async def ask(number: int, seconds: float = 60) -> None:
            await usage.wait(key, seconds)
            order.append(number)

        tasks = [asyncio.create_task(ask(number)) for number in range(4)]
        late = asyncio.create_task(ask(9, 0.01))
        with pytest.raises(ApiError) as refused:
            await late
        assert (refused.value.status, refused.value.retry_after, order) == (429, 3, [])
        tasks[1].cancel()
        usage.end(key, 1)
        assert refusal(usage, key, 1)[0] == 429, "the room is of the one that waits"
        await asyncio.sleep(0.01)
        assert order == [0] and usage.rows["a"] == 2
        usage.end(key, 1)  # handed on to the third, which goes before it learns of that: then the fourth's
        tasks[2].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert order == [0, 3] and usage.rows["a"] == 2
        usage.end(key, 2)
        assert not usage.rows and not usage._waiting

    asyncio.run(run())


def test_not_without_end_and_not_without_tokens() -> None:
    usage, key = KeyUsage(3, most_waiting=1), ApiKey("a", "", (), 1, 60)

    async def run() -> None:
        await usage.wait(key, 1)
        waits = asyncio.create_task(usage.wait(key, 60))
        await asyncio.sleep(0)
        with pytest.raises(ApiError) as refused:
            await usage.wait(key, 60)
        assert refused.value.status == 429
        usage.charge(key, 100)
        usage.end(key, 1)
        with pytest.raises(ApiError) as refused:
            await waits
        assert refused.value.status == 429 and refused.value.retry_after > 3 and not usage.rows
        with pytest.raises(ApiError):
            await usage.wait(key, 60)

    asyncio.run(run())


def test_what_is_counted_where_there_is_room_for_less() -> None:
    usage, key, other = KeyUsage(3), ApiKey("a", "", (), 4), ApiKey("b", "")
    usage.begin(key, 1)
    assert [usage.begin_some(key, rows) for rows in (0, 2, 15, 1)] == [0, 2, 1, 0]
    assert usage.begin_some(other, 15) == 15 and usage.rows == {"a": 4, "b": 15}
