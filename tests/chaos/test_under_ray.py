"""Processes of a Ray job that die, hang or are told to stop. One worker computes the bits of one process, so the run that nobody
touched is that of one process."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.metrics import read_metrics
from rlhf_ray.storage.run_folder import open_run

from .processes import LOST, ONE, SPLIT, alive, family, of_ray, steps

pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.fixture
def marks(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "marks"


def test_a_learner_that_is_killed_is_started_again(
    world: Any, untouched: Path, marks: Path, note: Any, same: Any
) -> None:
    """Fault 7: Ray Train starts the group again, and at most one step is done twice."""
    child = world.start("ppo", world.job("learner", **ONE), fault="learner:update:step=4:kill", marks=marks)
    assert child.wait(600) == 0, child.text
    assert LOST in child.text and "resuming from step 3 " in child.text
    note(7, same(untouched, world.run("learner")), "started again by itself, same weights and metrics")


def test_a_driver_that_is_killed(world: Any, untouched: Path, note: Any, same: Any, until: Any) -> None:
    """Fault 10: `resume` in the same second waits for the old worker's lock; nothing of the old Ray is left a while later."""
    child = world.start("ppo", world.job("driver", **ONE), fault="learner:update:step=4:sleep=5")  # not done too soon
    run = world.run("driver")
    until(lambda: steps(run) >= 3, 400)
    others = family(child.pid).keys() - {child.pid}
    os.kill(child.pid, signal.SIGKILL)
    killed = time.monotonic()
    child.wait(600)
    again = world.start("resume", "runs/driver")
    until(lambda: not alive(others), 150, "processes of the old Ray")
    gone = time.monotonic() - killed
    assert again.wait(600) == 0, again.text
    note(10, same(untouched, run), "resume 0 s later; no process of the old Ray left after {} s", gone)


@pytest.mark.long
def test_sigterm(world: Any, untouched: Path, note: Any, same: Any, until: Any) -> None:
    """Fault 11, the driver of a Ray job: as `ray job stop` and a batch system do it."""
    child = world.start("ppo", world.job("sigterm", **ONE))
    run = world.run("sigterm")
    until(lambda: steps(run) >= 3, 400)
    others = family(child.pid).keys() - {child.pid}
    os.kill(child.pid, signal.SIGTERM)
    told = time.monotonic()
    assert child.wait(600) == 75, child.text
    took = time.monotonic() - told
    last = child.text.splitlines()[-1]
    assert "SIGTERM; step " in last and last.endswith("rlhf-ray resume runs/sigterm"), last
    until(lambda: not alive(others), 150, "processes of the old Ray")
    assert not list(run.parent.glob(".rlhf-ray-*"))
    world.finish("sigterm")
    note(11, same(untouched, run), "under Ray: exit 75 after {} s, no step lost, same weights and metrics", took)


@pytest.mark.long
class TestAtLength:
    """A minute or more each."""

    def test_the_controller_is_killed(self, world: Any, untouched: Path, note: Any, same: Any, until: Any) -> None:
        """Fault 9: nobody starts it again, so the run ends with 75."""
        child = world.start("ppo", world.job("controller", **ONE))
        run = world.run("controller")
        until(lambda: steps(run) >= 2, 400)
        os.kill(of_ray(child.pid, "TrainController"), signal.SIGKILL)
        code, last = child.wait(600), child.text.splitlines()[-1]
        assert "its controller died" in last and last.endswith("rlhf-ray resume runs/controller"), child.text
        world.finish("controller")
        note(9, code == 75 and same(untouched, run), "exit 75, then same weights and metrics")

    def test_a_learner_that_hangs(self, world: Any, untouched: Path, marks: Path, note: Any, same: Any) -> None:
        """Fault 8: its stack is written, and the group starts again."""
        job = world.job("hang", watchdog_s=10.0, **ONE)
        child = world.start("ppo", job, fault="learner:update:step=5:sleep=3600", marks=marks)
        assert child.wait(600) == 0, child.text
        assert LOST in child.text and "step 5, rank 0: update has taken 1" in child.text
        assert "in reach" in (world.run("hang") / "stacks" / "rank_0.txt").read_text()
        note(8, same(untouched, world.run("hang")), "noticed, stacks written, same weights and metrics")

    def test_one_of_two_ranks_is_killed(self, world: Any, tmp_path: Path, note: Any, same: Any) -> None:
        """Fault 7. The other rank sees its peer go; both start again."""
        two = {"learner": {"num_workers": 2, "num_threads": 1}}
        plain = world.start("ppo", world.job("two", **two))
        assert plain.wait(600) == 0, plain.text
        fault = "learner:minibatch:step=4:rank=1:kill"
        child = world.start("ppo", world.job("two-killed", **two), fault=fault, marks=tmp_path / "marks")
        assert child.wait(600) == 0, child.text
        assert LOST in child.text
        note(7, same(world.run("two"), world.run("two-killed")), "started again by itself, same weights and metrics")

    def test_a_group_that_dies_again_and_again(self, world: Any, note: Any) -> None:
        child = world.start("ppo", world.job("doomed", **ONE), fault="learner:update:step=3:kill")
        code, last = child.wait(600), child.text.splitlines()[-1]
        assert "the learner group was lost 4 times" in last and last.endswith("rlhf-ray resume runs/doomed"), child.text
        kept = open_run(world.run("doomed"), verify=False).checkpoints()
        note(7, (code, kept[-1].step) == (75, 2), "after three restarts: exit 75")

    def test_an_error_that_would_come_again_is_not_tried_again(self, world: Any, note: Any) -> None:
        """A worker's own error ends the run at once, as it is, whatever the number of ranks."""
        two = {"learner": {"num_workers": 2, "num_threads": 1}}
        child = world.start("ppo", world.job("wrong", **two), fault="learner:update:step=2:rank=1:raise")
        code, text = child.wait(600), child.text
        assert "fault asked for by RLHF_RAY_FAULT" in text.splitlines()[-1] and LOST not in text, text
        assert code == 1

    @pytest.mark.parametrize(
        ("number", "fault", "says"),
        [
            (1, "actor:generate_with:call=3:kill", "generator 0: lost while sampling chunk"),
            (2, "actor:generate_with:call=3:stop", "no answer within 15 s while sampling chunk"),
            (5, "actor:score_at:call=3:kill", "scorer 0: lost while scoring chunk"),
        ],
        ids=["generator killed", "generator stopped", "scorer killed"],
    )
    def test_generators_and_scorers(
        self, world: Any, untouched: Path, marks: Path, number: int, fault: str, says: str, note: Any, same: Any
    ) -> None:
        """Faults 1, 2, 4, 5: only that actor starts again, its chunk is done again by the adapter that was asked for."""
        name = f"actor-{number}"
        child = world.start("ppo", world.job(name, **SPLIT), fault=fault, marks=marks)
        assert child.wait(600) == 0, child.text
        assert says in child.text and LOST not in child.text, child.text
        retries = sum(r.get("faults/retries", 0) for r in read_metrics(world.run(name) / "metrics.jsonl"))
        note(number, retries >= 1 and same(untouched, world.run(name)), "0 steps lost, same weights and metrics")

    def test_a_slow_scorer_is_left_in_peace(
        self, world: Any, untouched: Path, marks: Path, note: Any, same: Any
    ) -> None:
        """Fault 2 has a limit for each role: a scorer may take longer than what generators may."""
        child = world.start("ppo", world.job("slow", **SPLIT), fault="actor:score_at:call=3:sleep=25", marks=marks)
        assert child.wait(600) == 0, child.text
        assert "no answer within" not in child.text, child.text
        rows = read_metrics(world.run("slow") / "metrics.jsonl")
        assert sum(r.get("faults/retries", 0) for r in rows) == 0 and max(r.get("time/step", 0) for r in rows) > 25
        note(5, same(untouched, world.run("slow")), "slow: waited for, same weights and metrics")

    def test_no_generator_is_left(self, world: Any, note: Any, until: Any) -> None:
        """Fault 3: it dies at every call until its restarts are used up. Counted from its first death."""
        one = {**SPLIT, "generator": {"num_actors": 1, "num_gpus": 0.0, "num_threads": 1}}
        child = world.start("ppo", world.job("none", **one), fault="actor:generate_with:kill")
        until(lambda: "generator 0: lost while" in child.text, 400)
        died = time.monotonic()
        code, last = child.wait(600), child.text.splitlines()[-1]
        assert "generator 0" in last and last.endswith("rlhf-ray resume runs/none"), child.text
        took = time.monotonic() - died
        note(3, code == 75 and took < 60, "exit 75 naming actor and last error, {} s after the first death", took)
