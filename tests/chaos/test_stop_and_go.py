"""A run that is stopped anywhere goes on to the run that nobody touched: bit for bit, metric for metric."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.storage.run_folder import open_run

pytestmark = pytest.mark.integration

PHASES = "save_written evaluate heldout experience update minibatch publish save step_end rollout".split()
SAVES = [f"learner:{point}:step={step}" for step, point in enumerate(
    ("save", "save_written", "save_sealed", "save_renamed", "step_end"), start=3)]  # fmt: skip


def newest(run: Path) -> int:
    kept = open_run(run, verify=False).checkpoints()
    return kept[-1].step if kept else 0


def some(values: Any, short: tuple[Any, ...]) -> list[Any]:
    """All of `values`; but for those in `short`, they are left to the long run."""
    return [pytest.param(*v, marks=() if v[0] in short else pytest.mark.long) for v in values]


@pytest.mark.parametrize(("step", "phase"), some(enumerate(PHASES, start=1), (3, 6, 10)))
def test_sigterm_in_every_step_and_every_phase(
    world: Any, untouched: Path, step: int, phase: str, note: Any, same: Any
) -> None:
    """Fault 11. The step is finished, or abandoned in its rollout; it is saved, and 75 comes with the command that goes on."""
    name = f"term-{step}"
    marks = world.folder / f"marks-{step}"
    child = world.start("ppo", world.job(name), fault=f"learner:{phase}:step={step}:term", marks=marks)
    code, ended = child.wait(), time.time()
    took = ended - next(marks.iterdir()).stat().st_mtime
    last = child.text.splitlines()[-1]
    assert code == 75, child.text
    assert last.startswith("error: ") and last.endswith(f"rlhf-ray resume runs/{name}"), last
    assert newest(world.run(name)) == (step - 1 if phase == "rollout" else step), "no whole step is lost"
    world.finish(name)
    note(11, same(untouched, world.run(name)), "exit 75 after {} s, no step lost, same weights and metrics", took)


@pytest.mark.parametrize("point", some([(s,) for s in SAVES], (SAVES[1], SAVES[2])))
def test_killed_in_a_save(world: Any, untouched: Path, point: str, note: Any, same: Any) -> None:
    """Fault 18. kill -9 between two writes of a checkpoint."""
    name = point.split(":")[1]
    child = world.start("ppo", world.job(name), fault=f"{point}:kill")
    assert child.wait() == -signal.SIGKILL, child.text
    world.finish(name)
    note(18, same(untouched, world.run(name)), "same weights and metrics")


@pytest.mark.parametrize("seed", some([(n,) for n in range(10)], (0, 1)))
def test_killed_at_random(world: Any, untouched: Path, seed: int, note: Any, same: Any) -> None:
    """Fault 10, with driver, generator and learner in one process: kill -9 at any moment, `resume` in the next."""
    name = f"kill-{seed}"
    world.kill(("ppo", world.job(name)), name, random.Random(seed).uniform(0.0, 3.0))
    world.finish(name)
    note(10, same(untouched, world.run(name)), "same weights and metrics")
