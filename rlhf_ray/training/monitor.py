"""What watches over a training loop: where it stands, whether it hangs, whether somebody wants it to stop, whether a guard does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from rlhf_ray.config import JobFields
from rlhf_ray.config.rewards import longest_reward_request_s
from rlhf_ray.errors import Interrupted, LimitReached, Problem
from rlhf_ray.roles.guards import Guards, StopTraining
from rlhf_ray.runtime.fault_injection import fault_point
from rlhf_ray.runtime.session import Session
from rlhf_ray.runtime.watchdog import Watchdog
from rlhf_ray.storage.run_folder import RunFolder, resume_command

WAITS = ("rollout", "settle", "heldout")
"""Phases in which a learner may wait for generators, scorers and other ranks' rewards, whose own timeouts end them first."""


def patience(config: JobFields, session: Session) -> dict[str, float]:
    """Seconds that these phases may take whatever they took before: an actor that is silent is ended and its work done again, and a
    reward server is asked again. The rank that asks does not count that time; another one, which waits for its rewards, may."""
    if session.actor_handles is not None:
        from rlhf_ray.roles.actor_pool import ATTEMPTS, RESTART_S  # brings Ray

        return dict.fromkeys(WAITS, ATTEMPTS * max(session.actor_handles.timeouts.values()) + RESTART_S)
    longest = longest_reward_request_s(config)
    return {} if session.world_size == 1 or not longest else dict.fromkeys(WAITS, longest)


class Phases:
    """seconds: that each phase took."""

    def __init__(self, monitor: TrainingMonitor, step: int) -> None:
        self._monitor, self._step = monitor, step
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._monitor.enter(name, self._step)
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started


class TrainingMonitor:
    """One rank's. guards: what the limits must remember; a checkpoint stores it."""

    def __init__(self, config: JobFields, session: Session, folder: RunFolder) -> None:
        self.session, self.folder = session, folder
        self.guards = Guards()
        self.resume = resume_command(config.output_dir)
        self.watchdog = Watchdog(
            folder.path,
            session.rank,
            session.world_size,
            config.watchdog_s,
            session.console,
            self.resume,
            patience(config, session),
        )

    def enter(self, phase: str, step: int) -> None:
        """The loop comes to `phase`: it is timed, and it is a point for faults."""
        self.watchdog.enter(phase, step)
        fault_point("learner", phase, step, self.session.rank)

    def phases(self, step: int) -> Phases:
        """Names the phases of a step, one after the other: `with phase("update"): ...`; see `enter`."""
        return Phases(self, step)

    def stopped(self, reason: str, step: int, save: Callable[[], None]) -> Interrupted:
        """The error for a run that somebody stopped after `step` whole steps. save: writes that step's checkpoint."""
        if step == 0:
            return Interrupted.at(str(self.folder.path), f"{reason} before the first step was done", fix=self.resume)
        save()
        return Interrupted.at(str(self.folder.path), f"{reason}; step {step} is saved", fix=self.resume)

    def stopped_by_guard(self, found: StopTraining, save: Callable[[], None]) -> Interrupted:
        """The error for a guard: what it found, which checkpoint is good, how to go on."""
        if found.saves:
            save()
        good = [c.path.name for c in self.folder.checkpoints()]
        last = f"the last checkpoint is {good[-1]}" if good else "there is no checkpoint yet"
        fix = "; ".join(filter(None, (found.problem.fix, last, self.resume)))
        problem: Problem = replace(found.problem, fix=fix)
        return LimitReached(problem) if found.is_limit else Interrupted(problem)
