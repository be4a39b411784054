"""SIGTERM, Ctrl-C, a closed terminal and preemption as a wish that the work in hand may answer: finish or abandon the step, save,
end with 75.

A handler only takes note. Whoever can save looks at the note between two pieces of work, inside `Stop.deferred()`; outside of it
there is nothing to save, and the first signal is a KeyboardInterrupt like any other. A second signal, or the end of the grace
period, ends the process where it is; the run then goes on from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from rlhf_ray.console import Console
from rlhf_ray.errors import Interrupted

EXIT_CODE = Interrupted.exit_code


class Abandoned(Exception):
    """A step was left before it changed anything, because somebody asked to stop. Never leaves the stage."""


class Stop:
    """A wish to stop, and whether somebody is there to answer it.

    folder: where both are left as files for other processes to see, None: this process alone."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._reason = ""
        self._deferred = 0

    def ask(self, reason: str) -> None:
        """reason: what asked, e.g. SIGTERM."""
        self._reason = reason
        if self.folder is not None:
            with contextlib.suppress(OSError):
                (self.folder / "stop").write_text(reason)

    def asked(self) -> str:
        """What asked; empty if nobody did. Costs a stat call at most."""
        if not self._reason and self.folder is not None:
            with contextlib.suppress(OSError):
                self._reason = (self.folder / "stop").read_text() or "a signal"
        return self._reason

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, the wish is looked at between two pieces of work, and answered."""
        self._deferred += 1
        if self.folder is not None:
            with contextlib.suppress(OSError):
                (self.folder / "deferred").touch()
        try:
            yield
        finally:
            self._deferred -= 1
            if self.folder is not None and not self._deferred:
                with contextlib.suppress(OSError):
                    (self.folder / "deferred").unlink()

    @property
    def is_deferred(self) -> bool:
        return bool(self._deferred) or (self.folder is not None and (self.folder / "deferred").exists())


class Signals:
    """Turns SIGINT, SIGTERM and SIGHUP of this process into `stop`; the handlers from before come back at the end.

    resume: the command that goes on, told by the process that ends at once.  grace_s: seconds to answer in."""

    def __init__(self, stop: Stop, console: Console, where: str, resume: str, grace_s: float) -> None:
        self.stop, self.console, self.where, self.resume, self.grace_s = stop, console, where, resume, grace_s
        self._before: dict[signal.Signals, Any] = {}
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Signals:
        self.install()
        return self

    def install(self) -> None:
        """Take the signals, again if a library has taken them meanwhile. Only a main thread can; elsewhere nothing happens."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup
            before = signal.signal(number, self._handle)
            self._before.setdefault(number, before)

    def __exit__(self, *exc: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.stop.asked():
            if number == signal.SIGHUP:
                return  # shell and kernel both send one where a terminal closes
            self._leave(f"ended at once by a second signal ({name})")
        self.stop.ask(name)
        if not self.stop.is_deferred:
            raise KeyboardInterrupt(name)
        self.console.log(f"{name}: finishing what can be finished, then saving; a second signal ends the run at once")
        self._timer = threading.Timer(self.grace_s, self._leave, [f"{name}: not done within {self.grace_s:g} s"])
        self._timer.daemon = True
        self._timer.start()

    def _leave(self, what: str) -> None:
        error = Interrupted.at(self.where, what, fix=self.resume)
        with contextlib.suppress(OSError):
            os.write(2, ("\n".join(error.lines()) + "\n").encode())
        os._exit(EXIT_CODE)
