"""What Ray says of a node whose memory ran out, in one line that names the process and its megabytes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, WorkerCrashedError

from rlhf_ray.errors import Interrupted
from rlhf_ray.roles import out_of_memory
from rlhf_ray.roles.actor_pool import ActorHandles, ActorPool
from rlhf_ray.roles.out_of_memory import LastWords, is_out_of_memory, last_death, memory_of

SAID = (
    "2 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.7, ID: 78be) was 10.02GB used"
    " / 23.54GB limit (0.425) OOM kill reason: Memory usage 12012814336B exceeded threshold of 11369370624B Selected to kill:"
    " (Actor(42ab): job ID=01, lease ID=08, task name=RayTrainWorker.__init__, required resources={CPU: 0.4}, pid=25028,"
    " actual memory used=0.43GB, worker ID=3f) (Actor(43cd): job ID=01, lease ID=09, task name=RoleActor.__init__,"
    " required resources={}, pid=25300, actual memory used=7.81GB, worker ID=40)"
)
AWAY = ActorUnavailableError("The actor was restarted", None)


def a_pool() -> ActorPool:
    """One scorer, whose actor has the id 43cd."""
    handle = SimpleNamespace(_actor_id=bytes.fromhex("43cd"))
    return ActorPool(
        "scorer", ActorHandles({"scorer": (handle,)}, None, {"scorer": 1.0}, "rlhf-ray resume runs/x"), print, print
    )


def deaths(monkeypatch: pytest.MonkeyPatch, *found: tuple[int, str]) -> None:
    monkeypatch.setattr(out_of_memory, "_deaths", lambda: iter(found))
    monkeypatch.setattr("rlhf_ray.roles.actor_pool.TABLE_S", 0.2)


def test_the_largest_process_is_named() -> None:
    error = RuntimeError(SAID)
    assert is_out_of_memory(error) and not is_out_of_memory(RuntimeError("the actor died"))
    assert memory_of(SAID) == "10,260 of 24,105 MB on its node; 7,997 MB in RoleActor, pid 25300"
    assert memory_of("the node is low on memory") == ""


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (
            OutOfMemoryError(SAID),
            "out of memory in 3 attempts (10,260 of 24,105 MB on its node; 7,997 MB in RoleActor, pid 25300), while scoring",
        ),
        (
            AWAY,
            "out of memory in 3 attempts (10,260 of 24,105 MB on its node; 7,997 MB in RoleActor, pid 25300), while scoring",
        ),
        (WorkerCrashedError(), "lost in 3 attempts (WorkerCrashedError), while scoring"),
    ],
)
def test_work_that_was_lost_in_every_attempt(monkeypatch: pytest.MonkeyPatch, error: Exception, what: str) -> None:
    deaths(monkeypatch, (7, SAID))
    found = a_pool().exhausted(0, error, "scoring")
    assert isinstance(found, Interrupted)
    (line,) = found.lines()
    assert line.startswith(f"error: scorer 0: {what}") and "; fix: " in line and line.endswith("rlhf-ray resume runs/x")
    assert ("lower rollout_chunk_size" in line) == ("memory" in what)


def test_an_actor_that_was_away_for_another_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    deaths(monkeypatch, (7, SAID.replace("43cd", "99ef")))
    pool = a_pool()
    (line,) = pool.exhausted(0, AWAY, "scoring").lines()
    assert "scorer 0: lost in 3 attempts (ActorUnavailableError), while scoring" in line
    assert pool.kind(0, AWAY) == "ActorUnavailableError" and pool.kind(0, OutOfMemoryError(SAID)) == "out of memory"


def test_a_death_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """An actor that Ray killed for its memory may die of something else the next time."""
    words = LastWords()
    deaths(monkeypatch, (7, SAID))
    assert [words.of("43cd", AWAY) for _ in range(2)] == [SAID, ""]
    deaths(monkeypatch, (7, SAID), (9, SAID + " again"))
    assert words.of("43cd", AWAY) == SAID + " again"


def test_the_last_death_of_an_actor() -> None:
    said: Any = [(9, SAID), (12, SAID.replace("43cd", "99ef")), (3, SAID + " before")]
    assert (
        last_death("43cd", said) == (9, SAID)
        and last_death("99ef", said)[0] == 12
        and last_death("77", said) == (0, "")
    )
