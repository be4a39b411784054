"""Actors that die, hang, or never come back. Plain classes stand for the roles: the pool does not know what they do."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from rlhf_ray.errors import Interrupted, InvariantError

pytestmark = pytest.mark.integration


class Echo:
    """A role without models."""

    def describe(self) -> int:
        return os.getpid()

    def say(self, word: str) -> str:
        return word

    def sleep(self) -> str:
        time.sleep(3600)
        return "awake"

    def refuse(self) -> None:
        raise InvariantError.at("step 7", "two hashes differ", "aa", "bb")


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def pool(two_gpus: Any, lines: list[str]) -> Iterator[Any]:
    """Two actors."""
    from ray.util.placement_group import placement_group, remove_placement_group

    from rlhf_ray.roles.actor_pool import ActorPool, ActorSpec, start, stop

    two_gpus.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    group = placement_group([{"CPU": 0.1}] * 2)
    assert group.wait(20)
    actor_handles = start(
        [ActorSpec("generator", Echo, {"CPU": 0.1}, 1, range(2), 60.0)], group, False, "rlhf-ray resume X"
    )
    yield ActorPool("generator", actor_handles, lines.append, lambda line: lines.append(f"warning: {line}"))
    stop(actor_handles)
    remove_placement_group(group)


def test_actors_that_die_hang_or_are_gone(pool: Any, lines: list[str], two_gpus: Any) -> None:
    from rlhf_ray.roles.actor_pool import LOST

    pids = [pid for pid, _ in pool.answers(pool.ask_all("describe"), "starting")]
    assert len(set(pids)) == 2
    assert [pool.submit(n, "say", "x").index for n in range(4)] == [0, 1, 0, 1], "work n goes to actor n mod count"
    with pytest.raises(InvariantError, match="step 7: two hashes differ; expected aa; got bb"):
        pool.result(pool.submit(0, "refuse"), "asking")

    # one dies: its work goes to the other, and it gets work again once it is back
    call = pool.submit(0, "sleep")
    os.kill(pids[0], signal.SIGKILL)
    with pytest.raises(LOST):
        two_gpus.get(call.work, timeout=60)
    pool.lost(0)
    assert pool.submit(0, "say", "x").index == 1
    deadline = time.monotonic() + 60
    while (back := pool.submit(0, "say", "x")).index == 1 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert back.index == 0 and lines[-1].startswith("generator 0: is back, pid")

    # one hangs (fault 2): it is ended although it answers nobody, and comes back
    pool.timeout_s = 3.0
    os.kill(pids[1], signal.SIGSTOP)
    call = pool.submit(1, "say", "x")
    with pytest.raises(Interrupted, match=r"generator 1: no answer within 3 s, while testing"):
        pool.result(call, "testing")
    pool.end(1, "testing")
    pool.lost(1)
    pool.timeout_s = 60.0
    deadline = time.monotonic() + 60
    while pool.submit(1, "say", "x").index == 0 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert pool.result(pool.submit(1, "say", "again"), "testing")[0] == "again"

    # both are gone for good (fault 3): the error says who and how to go on
    for handle in pool.handles:
        two_gpus.kill(handle, no_restart=True)
    started = time.monotonic()
    with pytest.raises(Interrupted, match=r"generator [01]: no generator is left.*rlhf-ray resume X") as caught:
        while time.monotonic() - started < 60:
            call = pool.submit(0, "say", "x")
            try:
                two_gpus.get(call.work, timeout=10)
            except LOST:
                pool.lost(call.index)
    assert caught.value.exit_code == 75


def test_an_actor_that_hung_before_it_was_asked(pool: Any, lines: list[str]) -> None:
    """As a learner group meets it that was started again: it is ended, and its successor answers."""
    pids = [pid for pid, _ in pool.answers(pool.ask_all("describe"), "starting")]
    pool.timeout_s = 40.0
    os.kill(pids[0], signal.SIGSTOP)
    again = [pid for pid, _ in pool.answers(pool.ask_all("describe"), "starting")]
    assert again[1] == pids[1] and again[0] not in pids
    assert lines == ["warning: generator 0: no answer within 40 s while starting; it is restarted"]
