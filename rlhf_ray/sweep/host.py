"""A process that trains several trials on one base: a Ray actor, whose driver is `bases.py`.

Each trial is the PPO stage on a thread of its own, in the turns of roles/turns.py. What happens to it is told as events, which the
driver fetches; after an evaluation the trial waits until the driver has said whether it goes on.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_ray.config.sweep import SweepConfig

Event = dict[str, Any]
"""trial, and report (of an evaluation) or end: "done", "stopped" or why it failed."""

GO_ON, STOP = "go on", "stop"


class Host:
    """folder: the driver's working directory.  threads: torch's, for whichever trial has its turn.

    turn: a file to say whose turn it is, empty while all sample: it tells whom to blame if this process dies."""

    def __init__(self, config: SweepConfig, threads: int, folder: str, turn: str) -> None:
        from rlhf_ray.roles.turns import Seats
        from rlhf_ray.runtime.session import enter

        enter(folder)
        self.config, self.threads, self.turn = config, threads, Path(turn)
        self.names: dict[str, str] = {}  # seat -> trial
        self.seats = Seats(lambda seat: self.turn.write_text(self.names.get(seat, "")))
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.answers: dict[str, queue.SimpleQueue[str]] = {}
        self.running: dict[str, tuple[Any, threading.Thread]] = {}
        self._taken = 0

    def start(self, trials: list[Mapping[str, Any]]) -> None:
        """Begin trials, {"settings", "seed"} each. Those that are begun together are in the first batch together."""
        from rlhf_ray.sweep.trials import trial_of

        for params in trials:
            trial = trial_of(self.config, dict(params["settings"]), params["seed"])
            self._taken += 1
            name = f"trial{self._taken}"
            self.names[name] = trial.id
            seat = self.seats.seat(name)
            self.answers[trial.id] = queue.SimpleQueue()
            thread = threading.Thread(target=self._run, args=(trial, seat), name=trial.id, daemon=True)
            self.running[trial.id] = seat, thread
        for params in trials:
            self.running[trial_of(self.config, dict(params["settings"]), params["seed"]).id][1].start()

    def news(self, answers: Mapping[str, str], timeout_s: float) -> list[Event]:
        """What has happened; waits for something for at most so long.   answers: trial -> GO_ON or STOP, for evaluations told
        before."""
        for trial, answer in answers.items():
            self.answers[trial].put(answer)
        events: list[Event] = []
        with contextlib.suppress(queue.Empty):
            events.append(self.events.get(timeout=timeout_s))
            while True:
                events.append(self.events.get_nowait())
        return events

    def close(self, timeout_s: float) -> None:
        """Have all trials save what is whole, and end."""
        deadline = time.monotonic() + timeout_s
        for trial, (seat, _) in list(self.running.items()):
            seat.stop.ask("the sweep was stopped")
            self.answers[trial].put(GO_ON)
        for _, thread in list(self.running.values()):
            thread.join(max(deadline - time.monotonic(), 0.0))

    def _run(self, trial: Any, seat: Any) -> None:
        end = "done"
        try:
            with seat.taken():
                end = self._train(trial, seat)
        except BaseException as error:  # a thread that ends without a word would leave the driver waiting
            end = _told(error)
        finally:
            del self.running[trial.id]
            self.events.put({"trial": trial.id, "end": end})

    def _train(self, trial: Any, seat: Any) -> str:
        from rlhf_ray.sweep.trial import alone, train_trial
        from rlhf_ray.sweep.trials import job_of

        def report(evaluation: dict[str, Any]) -> None:
            self.events.put({"trial": trial.id, "report": evaluation})
            if self.answers[trial.id].get() == STOP:
                raise SystemExit  # past everything that would take it for a failure

        try:
            train_trial(self.config, trial, alone(job_of(self.config, trial), self.threads), report, seat)
        except SystemExit:
            return "stopped"
        except Exception as error:
            return "stopped" if seat.stop.asked() else _told(error)
        return "done"


def _told(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
