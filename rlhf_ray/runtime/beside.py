"""Work that waits for others, done on a thread beside the one that computes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Beside:
    """One thread beside this one. What it is given is done in that order, one piece at a time; where nothing is left it ends.

    It does not keep its process alive: a server that does not answer must not hold up an exit."""

    def __init__(self) -> None:
        self._changed = threading.Lock()
        self._left: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._runs = False

    def begin(self, work: Callable[[], Any]) -> Future[Any]:
        """What `work` returns, or raises, to come."""
        future: Future[Any] = Future()
        with self._changed:
            self._left.append((work, future))
            if not self._runs:
                self._runs = True
                threading.Thread(target=self._run, name="beside", daemon=True).start()
        return future

    def drop(self) -> None:
        """Forget what has not begun."""
        with self._changed:
            self._left.clear()

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._left:
                    self._runs = False
                    return
                work, future = self._left.popleft()
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
            del work, future  # this thread may wait no longer, and must not hold what it has done
