"""What a run says while it works. Stages call the methods of a `Console`; where the words end up is the backend's business.

    LocalConsole      this process's stderr: a live progress bar on a terminal, an occasional plain line elsewhere
    FileConsole       a file of JSON events: for workers, whose own stderr Ray mixes and prefixes
    Follower          reads that file in the driver and shows the events on a LocalConsole, in order, as they come
    NullConsole       nowhere: for ranks other than 0

Nothing ever goes to stdout, which belongs to `--json`. Text is shown as it is: no markup is read from it, and control characters,
which could drive the terminal, are spelled out, since much of it was written by a model.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TextIO

from rlhf_ray.metrics import figure

PLAIN_INTERVAL_S = 5.0  # between progress lines where stderr is not a terminal
POLL_S = 0.1
SHOWN_METRICS = 4
SAMPLE_CHARACTERS = 600
LOG_WIDTH = 400  # of a table where stderr is not a terminal


def counted(number: int, thing: str) -> str:
    """`1 thread`, `2 threads`."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


class Console:
    """Each method makes one event, a dict that JSON can hold; backends implement `emit`."""

    def emit(self, event: dict[str, Any]) -> None:
        raise NotImplementedError

    def log(self, line: str) -> None:
        self.emit({"kind": "log", "text": str(line)})

    def warn(self, line: str) -> None:
        """Shown even with quiet=True."""
        self.emit({"kind": "warn", "text": str(line)})

    def header(self, title: str, lines: Sequence[str] = ()) -> None:
        self.emit({"kind": "header", "title": str(title), "lines": [str(line) for line in lines]})

    def progress(self, stage: str, step: int, total: int, shown: Mapping[str, float] | None = None) -> None:
        """`step` of `total` is done; `shown` holds the few metrics worth a glance (the first four are shown)."""
        figures = {str(name): float(value) for name, value in (shown or {}).items()}
        self.emit({"kind": "progress", "stage": str(stage), "step": int(step), "total": int(total), "shown": figures})

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """All figures of a step, for who follows a run from outside (a sweep); not shown."""
        self.emit({"kind": "metrics", "step": int(step), "values": dict(values)})

    def done(self) -> None:
        """The stage is over: take the progress bar down."""
        self.emit({"kind": "done"})

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Numbers are aligned right and shortened; other cells are shown as text."""
        cells = [
            [v if isinstance(v, (int, float)) and not isinstance(v, bool) else str(v) for v in row] for row in rows
        ]
        self.emit({"kind": "table", "title": str(title), "columns": [str(c) for c in columns], "rows": cells})

    def sample(self, step: int, prompt: str, response: str, shown: Mapping[str, float] | None = None) -> None:
        """One reply with its figures; long texts are cut to their end (prompt) or start (reply)."""
        figures = {str(name): float(value) for name, value in (shown or {}).items()}
        self.emit(
            {"kind": "sample", "step": int(step), "prompt": str(prompt), "reply": str(response), "shown": figures}
        )

    def close(self) -> None:
        """Idempotent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class NullConsole(Console):
    """Says nothing."""

    def emit(self, event: dict[str, Any]) -> None:
        pass


class FileConsole(Console):
    """Appends events to `path`, one JSON line each, written whole at once, so that a reader never sees two events mixed."""

    def __init__(self, path: str | Path) -> None:
        self._fd: int | None = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def emit(self, event: dict[str, Any]) -> None:
        if self._fd is not None:
            os.write(self._fd, (json.dumps(event) + "\n").encode())

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class LocalConsole(Console):
    """Shows events on stderr, or on `file`. Safe to call from several threads.

    quiet: only warnings.  A stderr that has gone away (closed pipe, lost session) silences the console, never the run.
    """

    def __init__(self, quiet: bool = False, file: TextIO | None = None, interval_s: float = PLAIN_INTERVAL_S) -> None:
        stream = file if file is not None else sys.stderr
        self._rich = _rich_console(stream)
        self._quiet = quiet
        self._interval_s = interval_s
        self._lock = threading.RLock()
        self._bar: Any = None
        self._stage = ""
        self._pace = _Pace()
        self._last_line_at = float("-inf")

    def emit(self, event: dict[str, Any]) -> None:
        show = getattr(self, f"_show_{event.get('kind')}", None)
        if show is None or (self._quiet and event["kind"] not in ("warn", "done")):
            return
        with self._lock:
            try:
                show(event)
            except (OSError, ValueError) as e:
                if isinstance(e, ValueError) and "closed file" not in str(e):
                    raise
                self._quiet = True

    def close(self) -> None:
        self.done()

    def _line(self, text: str, style: str = "") -> None:
        from rich.text import Text

        # The style is on the text, not on print(): there it would colour the progress bar below as well.
        self._rich.print(Text(text, style=style))

    def _show_log(self, event: dict[str, Any]) -> None:
        self._line(visible(event["text"]))

    def _show_warn(self, event: dict[str, Any]) -> None:
        self._line(f"warning: {visible(event['text'])}", "yellow")

    def _show_header(self, event: dict[str, Any]) -> None:
        self._line(visible(event["title"]), "bold")
        for line in event["lines"]:
            self._line(f"  {visible(line)}")

    def _show_sample(self, event: dict[str, Any]) -> None:
        prompt, response = visible(event["prompt"]).strip(), visible(event["reply"]).strip()
        cut_prompt = prompt if len(prompt) <= SAMPLE_CHARACTERS else "… " + prompt[-SAMPLE_CHARACTERS:]
        cut_response = response if len(response) <= SAMPLE_CHARACTERS else response[:SAMPLE_CHARACTERS] + " …"
        self._line(f"sample at step {event['step']}   {_figures(event['shown'])}".rstrip(), "bold")
        self._line(_indent(cut_prompt), "dim")
        self._line(_indent(cut_response))

    def _show_table(self, event: dict[str, Any]) -> None:
        from rich.table import Table
        from rich.text import Text

        self._line(visible(event["title"]), "bold")
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        numeric = [all(not isinstance(row[i], str) for row in event["rows"]) for i in range(len(event["columns"]))]
        for name, right in zip(event["columns"], numeric, strict=True):
            table.add_column(
                Text(visible(name)), justify="right" if right else "left", header_style="dim", overflow="fold"
            )
        for row in event["rows"]:
            table.add_row(*(Text(visible(v) if isinstance(v, str) else figure(v)) for v in row))
        self._rich.print(table)

    def _show_progress(self, event: dict[str, Any]) -> None:
        if event["stage"] != self._stage:
            self._show_done({})
            self._stage, self._pace, self._last_line_at = event["stage"], _Pace(), float("-inf")
        left = self._pace.left(event["step"], event["total"])
        figures, stage = _figures(event["shown"]), visible(event["stage"])
        if self._rich.is_terminal and not self._rich.is_dumb_terminal:
            self._draw_bar(stage, event["step"], event["total"], figures, left)
            return
        now = time.monotonic()
        if now - self._last_line_at >= self._interval_s or event["step"] >= event["total"]:
            self._last_line_at = now
            parts = [f"{stage} {event['step']}/{event['total']}", figures, left]
            self._line("   ".join(part for part in parts if part))

    def _draw_bar(self, stage: str, step: int, total: int, figures: str, left: str) -> None:
        """Two lines at the bottom of the terminal: the bar with the time left, and the figures."""
        from rich.console import Group
        from rich.live import Live
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        first = self._bar is None
        if first:
            # stdout is left alone: what a library prints there must not be moved.
            self._bar = Live(console=self._rich, redirect_stdout=False, refresh_per_second=4)
            self._bar.start()
        line = Table.grid(padding=(0, 2, 0, 0))
        bar = ProgressBar(total=max(total, 1), completed=step, width=32)
        line.add_row(Text(stage, style="bold"), bar, Text(f"{step}/{total}"), Text(left, style="dim"))
        self._bar.update(Group(line, Text(figures, no_wrap=True, overflow="ellipsis")), refresh=first)

    def _show_done(self, event: dict[str, Any]) -> None:
        bar, self._bar, self._stage = self._bar, None, ""
        if bar is not None:
            bar.stop()


def _rich_console(stream: TextIO) -> Any:
    from rich.console import Console as RichConsole

    class Quietable(RichConsole):
        def on_broken_pipe(self) -> None:
            self.quiet = True  # rich would end the process

    # Lines are wrapped on a terminal and left whole in a log file, tables as well.
    is_file = not stream.isatty()
    width = LOG_WIDTH if is_file and "COLUMNS" not in os.environ else None
    return Quietable(file=stream, markup=False, emoji=False, highlight=False, soft_wrap=is_file, width=width)


class Follower:
    """Shows on `console` what is appended to `path` from now on; the file may appear later.

    Construct it before the workers start: events already in the file, of an earlier attempt, are not shown again.
    """

    def __init__(self, path: str | Path, console: Console) -> None:
        self._path, self._console = Path(path), console
        self._offset = self._path.stat().st_size if self._path.exists() else 0
        self._rest = b""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="console-follower", daemon=True)

    def start(self) -> Self:
        self._thread.start()
        return self

    def stop(self) -> None:
        """Show everything that is in the file by now, then stop."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._drain()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _follow(self) -> None:
        while not self._stop.wait(POLL_S):
            self._drain()

    def _drain(self) -> None:
        try:
            with open(self._path, "rb") as file:
                if os.fstat(file.fileno()).st_size < self._offset:
                    self._offset, self._rest = 0, b""  # the file was started anew
                file.seek(self._offset)
                new = file.read()
        except OSError:
            return
        self._offset += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        for line in lines:
            try:
                self._console.emit(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # a line cut by a kill: not worth stopping for


class _Pace:
    """How long the remaining steps will take, from the last 20 steps seen in this process."""

    def __init__(self) -> None:
        self._seen: deque[tuple[int, float]] = deque(maxlen=20)

    def left(self, step: int, total: int) -> str:
        self._seen.append((step, time.monotonic()))
        steps, seconds = step - self._seen[0][0], self._seen[-1][1] - self._seen[0][1]
        return f"{duration((total - step) * seconds / steps)} left" if steps > 0 and step < total else ""


def duration(seconds: float) -> str:
    """`4.2 s`, `3 min 12 s`, `2 h 05 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def visible(text: str) -> str:
    """`text` with control and text-direction characters spelled out, so that it can neither drive nor mislead a terminal."""
    return "".join(c if c in "\n\t" or not _steers(c) else f"\\x{ord(c):02x}" for c in text)


def _steers(c: str) -> bool:
    code = ord(c)
    return code < 0x20 or 0x7F <= code < 0xA0 or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069


def _figures(shown: Mapping[str, float]) -> str:
    return "  ".join(f"{visible(name)} {figure(value)}" for name, value in list(shown.items())[:SHOWN_METRICS])


def _indent(text: str) -> str:
    return "\n".join("  " + line for line in text.split("\n"))


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """FutureWarnings are not shown inside; other warnings are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
