"""What a rank learns of its surroundings: a wish to stop, a node that goes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf_ray.console import NullConsole
from rlhf_ray.runtime import session
from rlhf_ray.runtime.session import Preemption, Session
from rlhf_ray.runtime.signals import Stop


def alone(stop: Stop, preemption: Preemption) -> Session:
    return Session(0, 1, torch.device("cpu"), 1, NullConsole(), stop=stop, preemption=preemption)


def test_a_wish_is_told_by_its_name() -> None:
    stop = Stop()
    here = alone(stop, Preemption())
    assert here.must_stop() == "" and not here.is_preempted()
    stop.ask("SIGTERM")
    assert here.must_stop() == "SIGTERM"


def test_a_node_that_goes_is_told_once_and_asked_about_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 12: one checkpoint just in time, not one a step."""
    answers = iter([None, "node 1 goes in 120 s"])
    now = [100.0]
    monkeypatch.setattr(session.time, "monotonic", lambda: now[0])
    here = alone(Stop(), Preemption(lambda: next(answers)))
    seen = []
    for _ in range(8):
        now[0] += 3.0
        seen.append(here.is_preempted())
    assert seen == [False, False, False, True, False, False, False, False]


ALONE = """
import os
import torch.distributed as dist
from rlhf_ray.console import NullConsole
from rlhf_ray.runtime.session import process_session

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
process_session(NullConsole(), num_threads=1)
print(*(os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")))
"""


def test_a_group_that_somebody_else_has_made_in_this_process() -> None:
    """vLLM, say: DeepSpeed asks for the rank by the environment all the same (was: an assertion of DeepSpeed's)."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    done = subprocess.run([sys.executable, "-c", ALONE], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["0", "0", "1"], done.stderr[-1000:]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "300000 100000"}, 3),
        ({"cpu.max": "150000 100000"}, 1),
        ({"cpu.max": "5000 100000"}, 1),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "9900000 100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "50000"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({}, 8),
    ],
)
def test_a_container_s_cpu_time_is_its_number_of_cores(
    files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With docker's --cpus 2 on a machine of 64 cores there were 64 threads, which shared the time of two."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert session.usable_cores(str(tmp_path)) == expected
