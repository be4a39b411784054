"""What restarts a learner group: a peer that is gone, told by type and origin; not any error that says "connection"."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray.exceptions
import torch.distributed as dist

from rlhf_ray.errors import Interrupted
from rlhf_ray.launch import launch
from rlhf_ray.launch.lost_peer import is_of_a_lost_peer
from rlhf_ray.roles.actor_pool import ActorHandles, ActorPool
from rlhf_ray.storage.run_folder import create_run, resume_command

KILLED = """
import datetime, os, sys, time
import torch, torch.distributed as dist
from rlhf_ray.launch.lost_peer import is_of_a_lost_peer

rank, store, collective = int(sys.argv[1]), sys.argv[2], sys.argv[3]
limit = datetime.timedelta(seconds=60)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=limit)
numbers = torch.ones(4)
dist.all_reduce(numbers)
if rank == 0:
    open(store + ".on", "w").close()
while not os.path.exists(store + ".on"):
    time.sleep(0.01)
if rank == 1:
    os.kill(os.getpid(), 9)
time.sleep(0.5)
try:
    if collective == "all_reduce":
        dist.all_reduce(numbers)
    elif collective == "asynchronous":
        dist.all_reduce(numbers, async_op=True).wait()
    else:
        dist.all_gather_object([None, None], {"a": 1})
except Exception as error:
    print(type(error).__name__, is_of_a_lost_peer(error))
"""


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    try:
        raise error from cause
    except BaseException as caught:
        return caught


@pytest.mark.parametrize("collective", ["all_reduce", "asynchronous", "all_gather_object"])
def test_a_killed_peer_is_recognised(tmp_path: Path, collective: str) -> None:
    command = [sys.executable, "-c", KILLED]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store"), collective], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said, _ = ranks[0].communicate(timeout=120)
    ranks[1].wait(timeout=120)
    assert said.split() == ["RuntimeError", "True"]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("connection to the reward server refused"),
        RuntimeError("the peer review of this reply failed"),
        RuntimeError("gloo and nccl are backends"),
        ConnectionError("reset by peer"),
        ValueError("anything"),
    ],
    ids=str,
)
def test_words_alone_restart_nothing(error: Exception) -> None:
    assert not is_of_a_lost_peer(raised(error))


def test_types_along_the_chain_of_causes() -> None:
    assert is_of_a_lost_peer(raised(dist.DistNetworkError("socket")))
    assert is_of_a_lost_peer(raised(ValueError("while saving"), cause=ray.exceptions.RayActorError()))
    assert not is_of_a_lost_peer(raised(Interrupted.at("a", "stopped"), cause=dist.DistNetworkError("socket")))


def of_a_task(cause: BaseException) -> BaseException:
    """As `ray.get` raises what a role raised."""
    return ray.exceptions.RayTaskError("call", "Traceback", cause).as_instanceof_cause()


def test_an_exception_in_an_actor_is_no_lost_process() -> None:
    """A KeyError there restarted the whole group three times. Where the actor itself met a process that is gone, it is one."""
    for cause in (KeyError("x"), OSError(errno.ENOSPC, "No space left on device")):
        error = of_a_task(cause)
        assert not is_of_a_lost_peer(raised(error)) and not is_of_a_lost_peer(raised(cause, cause=error))
    assert not is_of_a_lost_peer(raised(of_a_task(ray.exceptions.RayError("an exception that cannot be sent"))))
    assert is_of_a_lost_peer(raised(of_a_task(ray.exceptions.RayActorError())))
    assert is_of_a_lost_peer(raised(of_a_task(dist.DistNetworkError("socket"))))
    assert is_of_a_lost_peer(
        raised(ValueError("x"), cause=of_a_task(raised(KeyError("y"), dist.DistNetworkError("z"))))
    )


def test_a_disk_that_is_full_for_an_actor_ends_the_run_as_one_that_is_for_the_learner(tmp_path: Path) -> None:
    """It was a bug of ours, exit 1."""
    run = create_run(tmp_path / "ppo", "ppo", {"seed": 0}, "never")
    pool = ActorPool("scorer", ActorHandles({"scorer": (None,)}, None, {"scorer": 1.0}, ""), print, print)
    with pytest.raises(Interrupted) as caught, launch._with_the_way_on(SimpleNamespace(output_dir=str(run.path))):  # type: ignore[arg-type]
        error = of_a_task(OSError(errno.ENOSPC, "No space left on device"))
        raise pool.raised(0, error, "scoring chunk 1") from error  # type: ignore[arg-type]
    (line,) = caught.value.lines()
    assert "cannot be written: No space left on device" in line and line.endswith(resume_command(str(run.path)))
