"""console.py: what a run says, where it goes, and that a model's words cannot drive the terminal."""

from __future__ import annotations

import inspect
import io
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.console import Console, FileConsole, Follower, LocalConsole, NullConsole, duration, visible

HOSTILE = "[bold red]x[/bold red] :smile: \x1b[2J\x1b]0;title\x07 \u202eabc \x9b31m"


class Recorder(Console):
    """Keeps events, and says when it has `wanted` of them."""

    def __init__(self, wanted: int = 10**9) -> None:
        self.events: list[dict[str, Any]] = []
        self.wanted, self.enough = wanted, threading.Event()

    def emit(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        if len(self.events) >= self.wanted:
            self.enough.set()


def say_everything(console: Console) -> None:
    console.header("PPO runs/ppo", ["base: tiny", "policy: copy of sft"])
    console.log("step 1 begins")
    console.progress("ppo", 1, 2, {"reward/mean": 0.5, "kl/k1_per_response": 1.25})
    console.warn("reward std 0 at step 1")
    console.sample(1, "Once", " upon a time", {"reward": 0.25})
    console.progress("ppo", 2, 2, {"reward/mean": 0.75})
    console.done()
    console.table("Comparison", ["policy", "reward"], [["base", -1.5], ["ppo", 2]])


def plain(**options: Any) -> tuple[LocalConsole, io.StringIO]:
    stream = io.StringIO()
    return LocalConsole(file=stream, **options), stream


def test_everything_is_shown_in_plain_lines_where_stderr_is_no_terminal() -> None:
    console, stream = plain(interval_s=0)
    say_everything(console)
    lines = [line.strip() for line in stream.getvalue().splitlines() if line.strip()]
    assert lines[:3] == ["PPO runs/ppo", "base: tiny", "policy: copy of sft"]
    assert "ppo 1/2   reward/mean 0.500  kl/k1_per_response 1.25" in lines
    assert "warning: reward std 0 at step 1" in lines
    assert "upon a time" in lines and any(line.startswith("sample at step 1   reward 0.250") for line in lines)
    assert [line.split() for line in lines[-4:]] == [
        ["Comparison"],
        ["policy", "reward"],
        ["base", "-1.50"],
        ["ppo", "2"],
    ]


def test_quiet_leaves_only_warnings() -> None:
    console, stream = plain(quiet=True)
    say_everything(console)
    assert stream.getvalue() == "warning: reward std 0 at step 1\n"


def test_plain_progress_is_occasional_but_never_misses_the_end() -> None:
    console, stream = plain(interval_s=3600)
    for step in range(1, 101):
        console.progress("sft", step, 100, {"loss": 1.0})
    console.progress("reward", 1, 100, {"loss": 1.0})
    assert [line.split()[:2] for line in stream.getvalue().splitlines()] == [
        ["sft", "1/100"],
        ["sft", "100/100"],
        ["reward", "1/100"],
    ]


def test_at_most_four_metrics_are_shown_and_long_lines_stay_whole() -> None:
    console, stream = plain()
    console.progress("ppo", 1, 9, {f"reward/source_with_a_long_name_{i}": float(i) for i in range(6)})
    console.log("x" * 500)
    first, second = stream.getvalue().splitlines()
    assert first.count("reward/") == 4 and second == "x" * 500


def test_hostile_text_is_shown_as_it_is_and_drives_nothing() -> None:
    console, stream = plain(interval_s=0)
    console.log(HOSTILE)
    console.warn(HOSTILE)
    console.header(HOSTILE, [HOSTILE])
    console.sample(1, HOSTILE, HOSTILE, {HOSTILE: 1.0})
    console.table(HOSTILE, [HOSTILE], [[HOSTILE]])
    console.progress(HOSTILE, 1, 2, {HOSTILE: 1.0})
    text = stream.getvalue()
    assert text.count("[bold red]x[/bold red] :smile: \\x1b[2J\\x1b]0;title\\x07") >= 8
    assert not any(c in text for c in "\x1b\x07\x9b\u202e")


def test_visible_keeps_ordinary_text() -> None:
    assert visible("naïve 語 👩‍🚀\n\tend") == "naïve 語 👩‍🚀\n\tend"
    assert visible("\x00\r\x7f") == "\\x00\\x0d\\x7f"


def test_a_terminal_gets_a_bar_that_is_taken_down() -> None:
    import pty

    leader, follower = pty.openpty()
    with open(follower, "w", encoding="utf-8") as terminal:
        console = LocalConsole(file=terminal)
        console.progress("ppo", 1, 4, {"reward/mean": 0.5})
        console.log(HOSTILE)
        console.progress("ppo", 4, 4, {"reward/mean": 0.75})
        console.close()
        console.close()
        shown = b""
        while b"\x1b[?25h" not in shown:  # a terminal hands out what was written piece by piece
            shown += os.read(leader, 1 << 16)
    os.close(leader)
    text = shown.decode()
    assert "1/4" in text and "4/4" in text and "reward/mean 0.750" in text
    assert "\x1b[?25l" in text and text.index("\x1b[?25h") > text.index("4/4"), (
        "the cursor was hidden and must come back"
    )
    assert "\\x1b[2J" in text and "\x1b[2J" not in text


def test_nothing_goes_to_stdout() -> None:
    lines = ["from __future__ import annotations", "from rlhf_ray.console import Console, LocalConsole"]
    lines += [inspect.getsource(say_everything), "say_everything(LocalConsole())"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, check=True)
    assert done.stdout == b"" and b"Comparison" in done.stderr


def test_a_stderr_that_has_gone_away_does_not_stop_the_run() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w", buffering=1, encoding="utf-8")
    console = LocalConsole(file=stream)
    say_everything(console)
    console.close()
    with pytest.raises(BrokenPipeError):  # what rich had buffered is still in the stream
        stream.close()
    closed = io.StringIO()
    console = LocalConsole(file=closed)
    closed.close()
    say_everything(console)


def test_events_go_through_a_file_unchanged_and_in_order(tmp_path: Path) -> None:
    direct, followed = Recorder(), Recorder()
    say_everything(direct)
    path = tmp_path / "console.jsonl"
    with Follower(path, followed), FileConsole(path) as writer:  # the file does not exist yet when the follower starts
        time.sleep(0.15)
        say_everything(writer)
        writer.log(HOSTILE)
    assert followed.events == [*direct.events, {"kind": "log", "text": HOSTILE}]


def test_the_follower_shows_events_while_the_run_goes_on(tmp_path: Path) -> None:
    path, console = tmp_path / "console.jsonl", Recorder(wanted=1)
    follower = Follower(path, console).start()
    with FileConsole(path) as writer:
        writer.log("first")
        assert console.enough.wait(timeout=5)
        writer.log("last words")
    follower.stop()
    assert [event["text"] for event in console.events] == ["first", "last words"]


def test_the_follower_does_not_repeat_an_earlier_attempt(tmp_path: Path) -> None:
    path, console = tmp_path / "console.jsonl", Recorder()
    with FileConsole(path) as writer:
        writer.log("of an earlier attempt")
        with Follower(path, console):
            writer.log("new")
    assert [event["text"] for event in console.events] == ["new"]


def test_the_follower_survives_a_new_file(tmp_path: Path) -> None:
    path, console = tmp_path / "console.jsonl", Recorder()
    with FileConsole(path) as writer:
        writer.log("of an earlier attempt, long enough to notice that the file has shrunk")
    follower = Follower(path, console)
    path.unlink()
    with FileConsole(path) as writer:
        writer.log("new")
    follower.start().stop()
    assert [event["text"] for event in console.events] == ["new"]


def test_the_follower_waits_for_whole_lines_and_skips_broken_ones(tmp_path: Path) -> None:
    path, console = tmp_path / "console.jsonl", Recorder()
    follower = Follower(path, console)
    whole = json.dumps({"kind": "log", "text": "naïve"}, ensure_ascii=False).encode()
    path.write_bytes(b'{"kind": "lo\n[1]\n' + whole[:20])
    follower._drain()
    with open(path, "ab") as file:
        file.write(whole[20:] + b"\n")
    local, stream = plain()
    follower._console = local
    follower.start().stop()
    assert stream.getvalue() == "naïve\n"


def test_stopping_a_follower_that_never_started_still_drains(tmp_path: Path) -> None:
    path, console = tmp_path / "console.jsonl", Recorder()
    follower = Follower(path, console)
    with FileConsole(path) as writer:
        writer.log("x")
    follower.stop()
    assert len(console.events) == 1


def test_writers_in_two_threads_never_mix_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "console.jsonl"
    consoles = [FileConsole(path) for _ in range(2)]
    threads = [threading.Thread(target=lambda c=c: [c.log("y" * 2000) for _ in range(50)]) for c in consoles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for console in consoles:
        console.close()
        console.log("after closing: ignored")
    assert [json.loads(line)["text"] for line in path.read_text().splitlines()] == ["y" * 2000] * 100


def test_null_console_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    say_everything(NullConsole())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (4.2, "4.2 s"), (42.4, "42 s"), (59.97, "1 min 00 s"), (192, "3 min 12 s"), (7500, "2 h 05 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
