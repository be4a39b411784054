"""A phase that hangs ends the process with the stacks of every rank; a slow one, or a pause of the whole process, does not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from rlhf_ray.config import RewardSource
from rlhf_ray.console import NullConsole
from rlhf_ray.runtime.watchdog import FIRST_S, Watchdog, asking, is_asking
from rlhf_ray.training.monitor import WAITS, patience

RANK = """
import sys, time
from pathlib import Path
from rlhf_ray.console import NullConsole
from rlhf_ray.runtime.watchdog import Watchdog
rank, world = int(sys.argv[2]), 2
dog = Watchdog(Path(sys.argv[1]), rank, world, 0.5, NullConsole(), "rlhf-ray resume X")
def stuck_here(): time.sleep(60)
with dog.watching():
    for step in range(3):
        dog.enter("update" if rank == 0 else "rollout", step)
        time.sleep(0.02)
    dog.enter("", 0)
    print("ready", flush=True)
    if rank == 0:
        dog.enter("update", 7)
    stuck_here()
"""


def start(tmp_path: Path, rank: int) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", RANK, str(tmp_path), str(rank)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_stacks_of_all_ranks_then_the_end(tmp_path: Path) -> None:
    """Fault 8. Rank 0 hangs in step 7; rank 1, in no phase, is asked for its stacks all the same."""
    other = start(tmp_path, 1)
    assert other.stdout is not None and other.stdout.readline() == "ready\n"
    process = start(tmp_path, 0)
    _, said = process.communicate(timeout=60)
    other.kill()
    other.communicate()
    assert process.returncode == 75, said
    assert said.startswith("error: step 7, rank 0: update has taken ") and said.endswith("fix: rlhf-ray resume X\n")
    for rank in (0, 1):
        text = (tmp_path / "stacks" / f"rank_{rank}.txt").read_text()
        assert text.startswith(f"rank {rank}, pid ") and "stuck_here" in text


def test_a_process_that_was_stopped_has_not_hung(tmp_path: Path) -> None:
    process = start(tmp_path, 1)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(1.5)
    os.kill(process.pid, signal.SIGCONT)
    time.sleep(0.3)
    assert process.poll() is None
    process.kill()
    process.communicate()


def test_a_request_that_is_under_way_has_its_own_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward server that was away for three minutes, within the retries of the job, ended a colocated run: exit 75."""
    dog = Watchdog(tmp_path, 0, 1, 0.1, NullConsole(), "")
    barked = threading.Event()
    monkeypatch.setattr(dog, "_bark", lambda *_: barked.set())
    for step in (1, 2, 3):
        dog.enter("rollout", step)
    with dog.watching(), asking(0.8):
        assert not barked.wait(0.6), "it waits for an answer"
        assert barked.wait(5), "which should be there by now"
    assert not is_asking()


def test_ranks_that_wait_for_anothers_rewards_are_patient_as_its_requests() -> None:
    sources: Any = ({"url": "http://127.0.0.1:9/score"}, {"llm": {"base_url": "http://127.0.0.1:9/v1", "model": "m"}})
    for source, timeout_s in zip(sources, (60.0, 120.0)):
        config: Any = SimpleNamespace(rewards=(RewardSource(**source),))
        alone: Any = SimpleNamespace(actor_handles=None, world_size=1)
        together: Any = SimpleNamespace(actor_handles=None, world_size=2)
        found = patience(config, together)
        assert set(found) == set(WAITS) and min(found.values()) == 6 * timeout_s + 5 * 300
        assert patience(config, alone) == {} == patience(cast(Any, SimpleNamespace()), together)


def test_the_limit_is_ten_medians_and_never_below_the_least(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dog = Watchdog(tmp_path, 0, 1, 120.0, NullConsole(), "")
    assert dog.limit("update") == FIRST_S
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for took in (10.0, 30.0, 20.0):
        dog.enter("update", 1)
        now[0] += took
    dog.enter("", 0)
    assert dog.limit("update") == 200.0
    dog.enter("publish", 1)
    now[0] += 0.1
    dog.enter("", 0)
    assert dog.limit("publish") == 120.0
