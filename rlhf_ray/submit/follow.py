"""Following a submitted job: its log as it grows, Ctrl-C as a question, its end as an exit code."""

from __future__ import annotations

import asyncio
import queue
import re
import sys
import threading
import time
from typing import Any, Literal

from rlhf_ray.console import Console
from rlhf_ray.errors import Interrupted, ResourceError
from rlhf_ray.submit.client import Cluster

POLL_S = 0.2
RECONNECT_S = 1.0
LOST_S = 120.0
"""A cluster that cannot be reached for so long is given up on; its job goes on."""
DIED = "JOB_SUPERVISOR_ACTOR_DIED"
"""Ray's `error_type` of a job whose supervisor died, with its node say; a job that could not be started has others."""
Answer = Literal["detach", "stop", "follow"]
_PROGRESS = re.compile(r"(?P<stage>[\w-]+) (?P<step>\d+)/(?P<total>\d+)(?:   (?P<rest>.*))?")
_FIGURE = re.compile(r"(\S+) (-?[\d.]+(?:e[-+]?\d+)?)(?:  |$)")
_RAYS_OWN = re.compile(r"Running entrypoint for job .*|.* job_manager\.py:\d+ -- Runtime env is setting up\.")


def follow(cluster: Cluster, submission_id: str, console: Console, again: str, logs: str) -> int | None:
    """Show the job's log until it ends, and return its exit code; None if the user leaves it running.

    again: the command that goes on with it.   logs: the command that follows it.   Interrupted (75) if it was stopped or killed;
    ResourceError if it could not start or the cluster is lost."""
    shown, asked_to_stop = _Lines(console), False
    with _Tail(cluster, submission_id, logs) as tail:
        while True:
            try:
                piece = tail.get(POLL_S)
                if piece is None:
                    break
                shown.add(piece)
            except KeyboardInterrupt:
                console.done()
                answer: Answer = "detach" if asked_to_stop else _question()
                if answer == "detach":
                    console.log(f"{submission_id} keeps running; to follow it: {logs}")
                    return None
                if answer == "stop":
                    asked_to_stop = True
                    console.log(f"{submission_id}: stopping; it saves first")
                    cluster.stop(submission_id)
    shown.close()
    return outcome(cluster.details(submission_id), again)


def outcome(details: Any, again: str) -> int:
    """The exit code of a job that has ended; what it failed of stands in its log. Raises Interrupted, ResourceError."""
    status, code, name = str(details.status.value), details.driver_exit_code, str(details.submission_id)
    if status == "SUCCEEDED":
        return 0
    if status == "STOPPED":
        raise Interrupted.at(name, "was stopped", fix=f"to resume: {again}")
    if code is None:
        why = next((line.strip() for line in reversed(str(details.message).splitlines()) if line.strip()), "unknown")
        if details.error_type == DIED:
            fix = f"to resume: {again}"
            raise Interrupted.at(name, "its supervisor on the cluster died, or its node did", got=why[:300], fix=fix)
        raise ResourceError.at(name, "could not be started", got=why[:300], fix="rlhf-ray doctor")
    if code < 0 or code > 128:
        signal = -code if code < 0 else code - 128
        raise Interrupted.at(name, f"was killed by signal {signal}", fix=f"to resume: {again}")
    return int(code)


def _question() -> Answer:
    """What Ctrl-C means. Where nobody can answer, the job goes on."""
    if not sys.stdin.isatty():
        return "detach"
    answers: dict[str, Answer] = {"d": "detach", "s": "stop", "c": "follow"}
    try:
        while True:
            print(
                "[d]etach and let it run, [s]top it (it saves first), or [c]ontinue? ",
                end="",
                file=sys.stderr,
                flush=True,
            )
            line = sys.stdin.readline()
            if not line:
                return "detach"
            if (answer := answers.get(line.strip()[:1].lower())) is not None:
                return answer
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return "detach"


class _Tail:
    """The log from a thread of its own, so that Ctrl-C reaches the caller at once. Connects again where the connection is cut."""

    def __init__(self, cluster: Cluster, submission_id: str, logs: str) -> None:
        self._cluster, self._id, self._logs = cluster, submission_id, logs
        self._pieces: queue.Queue[str | BaseException | None] = queue.Queue()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="job-log", daemon=True)

    def __enter__(self) -> _Tail:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()

    def get(self, timeout_s: float) -> str | None:
        """The next piece, empty if there is none yet; None at the end. ResourceError if the cluster is lost."""
        try:
            piece = self._pieces.get(timeout=timeout_s)
        except queue.Empty:
            return ""
        if isinstance(piece, BaseException):
            raise piece
        return piece

    def _run(self) -> None:
        try:
            asyncio.run(self._follow())
        except BaseException as error:
            self._pieces.put(error)

    async def _follow(self) -> None:
        seen, since = 0, None  # length of the log that was told; when the cluster was lost, None while it answers
        while not self._stop.is_set():
            position = 0  # a new connection tells the log from its beginning
            try:
                async for piece in self._cluster.tail(self._id):
                    since = None
                    fresh, position = piece[max(seen - position, 0) :], position + len(piece)
                    if fresh:
                        seen += len(fresh)
                        self._pieces.put(fresh)
                    if self._stop.is_set():
                        return
                if self._cluster.details(self._id).status.is_terminal():
                    self._pieces.put(None)
                    return
                since = None
            except Exception as error:
                since = since or time.monotonic()
                if time.monotonic() - since > LOST_S:
                    what = f"has not been reached for {LOST_S:g} s; the job may still be running"
                    fix = f"to follow it again: {self._logs}"
                    raise ResourceError.at(self._cluster.url, what, got=str(error)[:200], fix=fix) from error
            await asyncio.sleep(RECONNECT_S)


class _Lines:
    """A job's log on a console: progress as progress, warnings as warnings, everything else as it is."""

    def __init__(self, console: Console) -> None:
        self._console, self._rest = console, ""

    def add(self, piece: str) -> None:
        *lines, self._rest = (self._rest + piece).split("\n")
        for line in lines:
            self._show(line.rstrip("\r"))

    def close(self) -> None:
        if self._rest:
            self._show(self._rest)
        self._rest = ""
        self._console.done()

    def _show(self, line: str) -> None:
        if _RAYS_OWN.fullmatch(line):
            return
        found = _PROGRESS.fullmatch(line)
        if found:
            figures = {name: float(value) for name, value in _FIGURE.findall(found["rest"] or "")}
            self._console.progress(found["stage"], int(found["step"]), int(found["total"]), figures)
        elif line.startswith("warning: "):
            self._console.warn(line.removeprefix("warning: "))
        else:
            self._console.log(line)
