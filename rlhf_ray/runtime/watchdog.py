"""Notices work that hangs: says where every rank stands, then ends the process, so that the run goes on from its last checkpoint.

A phase hangs if it takes ten times the median of its earlier durations, and at least `least_s`. A rank that waits for one that
hangs is in a phase too; whichever notices first has all of them write their stacks.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import statistics
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from rlhf_ray.console import Console
from rlhf_ray.errors import Interrupted

FACTOR = 10.0
FIRST_S = 3600.0
"""The limit of a phase that nothing is known of yet."""
KEPT = 50
GATHER_S = 3.0
"""How long the rank that noticed waits for the stacks of the others."""
FOLDER = "stacks"


def forget_stacks(run: Path) -> None:
    """Nobody asks for stacks any more. Called where a run is entered, before any rank watches."""
    with contextlib.suppress(OSError):
        (run / FOLDER / "asked").unlink(missing_ok=True)


_asked_until: dict[object, float] = {}
"""When the requests that are under way have ended, by their own limits of time."""


@contextlib.contextmanager
def asking(longest_s: float) -> Iterator[None]:
    """A request to a server that ends within so many seconds, tries and pauses included: who waits for it does not hang, and the
    time does not count for any phase of this process. On any thread."""
    request = object()
    _asked_until[request] = time.monotonic() + longest_s
    try:
        yield
    finally:
        del _asked_until[request]


def is_asking() -> bool:
    """Whether a request is under way, within its time."""
    now = time.monotonic()
    return any(now < until for until in list(_asked_until.values()))


class Watchdog:
    """One rank's. run: the run folder, which gets stacks/.  least_s: 0 switches it off.  resume: the command that goes on.

    patience: seconds that a phase may take in any case, by its name.   waits: whether other runs of this process have their turn
    now, whose time does not count."""

    def __init__(
        self,
        run: Path,
        rank: int,
        world_size: int,
        least_s: float,
        console: Console,
        resume: str,
        patience: Mapping[str, float] | None = None,
        waits: Callable[[], bool] | None = None,
    ) -> None:
        self.waits = waits or (lambda: False)
        self.run, self.rank, self.world_size, self.least_s = run, rank, world_size, least_s
        self.patience = patience or {}
        self.console, self.resume = console, resume
        self.poll_s = min(max(least_s / 20, 0.05), 1.0)
        self._took: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=KEPT))
        self._phase, self._step, self._spent, self._since = "", 0, 0.0, 0.0
        self._lock = threading.Lock()
        self._end = threading.Event()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch for as long as this lasts."""
        if self.least_s <= 0:
            yield
            return
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._end.set()
            thread.join()

    def enter(self, phase: str, step: int) -> None:
        """The work of `phase` begins, which ends the phase before; an empty name: nothing is watched."""
        now = time.monotonic()
        with self._lock:
            if self._phase:
                self._took[self._phase].append(now - self._since)
            self._phase, self._step, self._spent, self._since = phase, step, 0.0, now

    def limit(self, phase: str) -> float:
        """Seconds after which `phase` counts as hanging."""
        took, least = self._took.get(phase), max(self.least_s, self.patience.get(phase, 0.0))
        return max(FACTOR * statistics.median(took) if took else FIRST_S, least)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._end.wait(self.poll_s):
            now = time.monotonic()
            with self._lock:
                # A process that was stopped and continued has not hung: at most two polls count for one.
                self._spent += 0.0 if self.waits() or is_asking() else min(now - last, 2 * self.poll_s)
                phase, step, spent, limit = self._phase, self._step, self._spent, self.limit(self._phase)
            last = now
            if (self.run / FOLDER / "asked").exists():
                self._write_stacks(phase, step, spent)
                self._end.wait(FIRST_S)  # whoever asked ends the group
            elif phase and spent > limit:
                self._bark(phase, step, spent, limit)

    def _bark(self, phase: str, step: int, spent: float, limit: float) -> None:
        folder = self.run / FOLDER
        with contextlib.suppress(OSError):
            folder.mkdir(exist_ok=True)
            (folder / "asked").touch()
        self._write_stacks(phase, step, spent)
        deadline = time.monotonic() + GATHER_S
        while self.world_size > 1 and time.monotonic() < deadline:
            time.sleep(0.1)
        what = f"{phase} has taken {spent:.0f} s; stacks of all ranks are in {folder}"
        error = Interrupted.at(f"step {step}, rank {self.rank}", what, f"at most {limit:.0f} s", fix=self.resume)
        with contextlib.suppress(OSError):
            self.console.warn(str(error))
            os.write(2, ("\n".join(error.lines()) + "\n").encode())
        os._exit(Interrupted.exit_code)

    def _write_stacks(self, phase: str, step: int, spent: float) -> None:
        with contextlib.suppress(OSError), open(self.run / FOLDER / f"rank_{self.rank}.txt", "w") as file:
            file.write(f"rank {self.rank}, pid {os.getpid()}, step {step}, {phase or 'no phase'} for {spent:.1f} s\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
