"""What Ray says of a node whose memory ran out, in one line that names the process and its megabytes."""

from __future__ import annotations

import pytest
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, WorkerCrashedError

from rlhf_ray.errors import Interrupted
from rlhf_ray.roles.pool import Pool, Pools, is_out_of_memory, memory_of

SAID = (
    "2 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.7, ID: 78be) was 10.02GB used"
    " / 23.54GB limit (0.425) OOM kill reason: Memory usage 12012814336B exceeded threshold of 11369370624B Selected to kill:"
    " (Actor(42): job ID=01, lease ID=08, task name=RayTrainWorker.__init__, required resources={CPU: 0.4}, pid=25028,"
    " actual memory used=0.43GB, worker ID=3f) (Actor(43): job ID=01, lease ID=09, task name=RoleActor.__init__,"
    " required resources={}, pid=25300, actual memory used=7.81GB, worker ID=40)"
)


def test_the_largest_process_is_named() -> None:
    error = RuntimeError(SAID)
    assert is_out_of_memory(error) and not is_out_of_memory(RuntimeError("the actor died"))
    assert memory_of(error) == "10,260 of 24,105 MB on its node; 7,997 MB in RoleActor, pid 25300"


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (
            OutOfMemoryError(SAID),
            "out of memory in 3 attempts (10,260 of 24,105 MB on its node; 7,997 MB in RoleActor, pid 25300), while scoring",
        ),
        (WorkerCrashedError(), "lost in 3 attempts (WorkerCrashedError), while scoring"),
        (
            ActorUnavailableError("gone", None),
            "lost in 3 attempts (ActorUnavailableError), while scoring; fix: if its node ran out of memory, lower",
        ),
    ],
)
def test_work_that_was_lost_in_every_attempt(error: Exception, what: str) -> None:
    pool = Pool("scorer", Pools({"scorer": ()}, None, {"scorer": 1.0}, "rlhf-ray resume runs/x"), print)
    found = pool.exhausted(0, error, "scoring")
    assert isinstance(found, Interrupted)
    (line,) = found.lines()
    assert line.startswith(f"error: scorer 0: {what}") and "; fix: " in line and line.endswith("rlhf-ray resume runs/x")
    assert ("lower rollout_chunk_size" in line) == ("memory" in what)
