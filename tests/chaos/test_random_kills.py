"""Twenty kills at random moments of a job under Ray whose roles are processes of their own."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from .processes import LOST, SPLIT, actor, of_ray, steps

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.long]
POINTS = ("save", "save_written", "save_sealed", "save_renamed")
NEXT_STEP_S = 60.0
ROWS = {"driver": 10, "learner": 7, "generator": 1, "scorer": 5, "save": 18}


def victim(who: str, driver: int, run: Path) -> int:
    """The process to kill."""
    if who == "driver":
        return driver
    return of_ray(driver, "RayTrainWorker") if who == "learner" else actor(run, f"{who} 0")


def killed(world: Any, until: Any, name: str, who: str, moment: float) -> Any:
    """The job NAME, a process killed `moment` seconds after its first step, and the step of that moment; None if done."""
    child, run = world.start("ppo", world.job(name, **SPLIT)), world.run(name)
    until(lambda: steps(run) >= 1 or child.process.exitcode is not None, 400)
    time.sleep(moment)
    with suppress(ProcessLookupError, ValueError):
        if (at := steps(run)) < 10:
            os.kill(victim(who, child.pid, run), signal.SIGKILL)
            return child, at
    child.wait(600)
    return None


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("who", ["driver", "learner", "generator", "scorer"])
def test_a_process_is_killed(
    world: Any, untouched: Path, who: str, seed: int, note: Any, same: Any, until: Any
) -> None:
    """Faults 1, 5, 7, 10. Only a killed driver needs `resume`; everybody else is started again by the job."""
    name, moment = f"{who}-{seed}", random.Random(f"{who} {seed}").uniform(0.0, 5.0)
    run = world.run(name)
    while (found := killed(world, until, name, who, moment)) is None:
        shutil.rmtree(run)  # the run had ended before that moment
        moment /= 2
    (child, at), started = found, time.monotonic()
    if who == "driver":
        assert child.wait(600) == -signal.SIGKILL, child.text
        child = world.start("resume", f"runs/{name}")
    until(lambda: steps(run) > at or child.process.exitcode is not None, 120, child.text)
    took, code = time.monotonic() - started, child.wait(600)
    assert code == 0, child.text
    assert (LOST in child.text) == (who == "learner"), child.text
    print(f"{who} killed after step {at}, {moment:.2f} s")
    figure = "at a random moment, split placement: the next step {} s later, same weights and metrics"
    note(ROWS[who], same(untouched, run) and took < NEXT_STEP_S, figure, took)


@pytest.mark.parametrize("seed", range(4))
def test_the_learner_is_killed_in_a_save(
    world: Any, untouched: Path, seed: int, tmp_path: Path, note: Any, same: Any
) -> None:
    """Fault 18, of the process that writes, while driver and actors live on."""
    name, step = f"save-{seed}", random.Random(seed).randrange(2, 10)
    fault = f"learner:{POINTS[seed]}:step={step}:kill"
    child = world.start("ppo", world.job(name, **SPLIT), fault=fault, marks=tmp_path / "marks")
    assert child.wait(600) == 0, child.text
    assert LOST in child.text, child.text
    note(18, same(untouched, world.run(name)), "under Ray, split placement: started again, same weights and metrics")
