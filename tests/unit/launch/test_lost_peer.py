"""What restarts a learner group: a peer that is gone, told by type and origin; not any error that says "connection"."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import ray.exceptions
import torch.distributed as dist

from rlhf_ray.errors import Interrupted
from rlhf_ray.launch.lost_peer import is_of_a_lost_peer

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
