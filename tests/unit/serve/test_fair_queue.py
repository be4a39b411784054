"""Who waits takes turns: over keys, then adapters, then requests, by the tokens that each was given."""

from __future__ import annotations

from itertools import count

import pytest

from rlhf_ray.serve.fair_queue import FairQueue


def drained(queue: FairQueue[str]) -> str:
    return "".join(queue.pop()[1] for _ in range(len(queue)))


def test_a_late_and_small_key_is_next_and_not_last() -> None:
    queue, tickets = FairQueue[str](), count()
    for i in range(6):
        for _ in range(4):
            queue.push(next(tickets), ("a", "m", str(i)), 1000, "a")
    assert [queue.pop()[1] for _ in range(5)] == ["a"] * 5
    for _ in range(2):
        queue.push(next(tickets), ("b", "m", "x"), 10, "b")
    assert drained(queue)[:3] == "bba", "b starts level with a, is given 20 tokens, and a goes on"


def test_adapters_of_a_key_and_requests_of_an_adapter_take_turns() -> None:
    queue, tickets = FairQueue[str](), count()
    for _ in range(3):
        queue.push(next(tickets), ("", "one", "r1"), 10, "1")
    for _ in range(3):
        queue.push(next(tickets), ("", "one", "r2"), 10, "2")
    for _ in range(3):
        queue.push(next(tickets), ("", "two", "r3"), 10, "3")
    assert drained(queue) == "132313212"


def test_who_was_away_does_not_come_back_with_a_claim_on_the_past() -> None:
    queue, tickets = FairQueue[str](), count()
    for _ in range(8):
        queue.push(next(tickets), ("a", "m", "r"), 100, "a")
    for _ in range(4):
        queue.pop()
    queue.push(next(tickets), ("b", "m", "r"), 100, "b")
    queue.push(next(tickets), ("b", "m", "r"), 100, "b")
    assert drained(queue) in ("baabaa", "babaaa", "ababaa", "baba" + "aa")


def test_rows_that_leave_are_forgotten_and_counted_by_model() -> None:
    queue = FairQueue[str]()
    for ticket, model in enumerate(("one", "one", "two")):
        queue.push(ticket, ("k", model, str(ticket)), 5, model)
    assert dict(queue.waiting(1)) == {"one": 2, "two": 1}
    assert queue.remove(0) and not queue.remove(0) and not queue.remove(9)
    assert dict(queue.waiting(1)) == {"one": 1, "two": 1}
    assert drained(queue) == "onetwo" and not queue._root.below
    with pytest.raises(IndexError):
        queue.pop()
