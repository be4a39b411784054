"""Replies at a time, and tokens in a minute, of each key."""

from __future__ import annotations

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
