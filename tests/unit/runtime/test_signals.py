"""The first signal is a wish, the second an order; what nobody can answer is an interruption at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rlhf_ray.console import NullConsole
from rlhf_ray.runtime.signals import Signals, Stop

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def signals(stop: Stop, grace_s: float = 60.0) -> Signals:
    return Signals(stop, NullConsole(), "runs/x", "rlhf-ray resume runs/x", grace_s)


@pytest.mark.parametrize("number", SIGNALS)
def test_it_is_noted_where_somebody_looks_and_interrupts_where_nobody_does(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    stop = Stop()
    with signals(stop):
        with stop.deferred():
            os.kill(os.getpid(), number)
            assert stop.asked() == number.name
        stop._reason = ""
        with pytest.raises(KeyboardInterrupt, match=number.name):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


def test_a_terminal_that_closes_may_say_so_twice_and_nohup_stays() -> None:
    stop = Stop()
    with signals(stop), stop.deferred():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.asked() == "SIGHUP"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals(Stop()) as taken, taken.stop.deferred():
            os.kill(os.getpid(), signal.SIGHUP)
            assert taken.stop.asked() == ""
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_processes_see_the_wish_and_whether_it_is_looked_at(tmp_path: Path) -> None:
    driver, worker = Stop(tmp_path), Stop(tmp_path)
    assert not driver.is_deferred and worker.asked() == ""
    with worker.deferred():
        assert driver.is_deferred
        driver.ask("SIGTERM")
        assert worker.asked() == "SIGTERM"
    assert not driver.is_deferred


def test_elsewhere_than_in_a_main_thread_signals_are_left_alone() -> None:
    seen = []

    def work() -> None:
        with signals(Stop()):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


@pytest.mark.parametrize(
    ("second", "says"), [(True, "ended at once by a second signal"), (False, "not done within 1 s")]
)
def test_a_second_signal_or_the_end_of_the_grace_ends_the_process(second: bool, says: str) -> None:
    grace = 600.0 if second else 1.0  # which it would take without the second signal
    code = (
        "import time; from rlhf_ray.console import NullConsole; from rlhf_ray.runtime.signals import Signals, Stop\n"
        "stop = Stop()\n"
        f"with Signals(stop, NullConsole(), 'runs/x', 'rlhf-ray resume runs/x', {grace}), stop.deferred():\n"
        "    print('ready', flush=True)\n"
        "    while not stop.asked(): time.sleep(0.01)\n"
        "    print('asked', flush=True)\n"
        "    time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    if second:
        assert process.stdout.readline() == "asked\n"
        process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75 and says in said and said.splitlines()[-1].endswith("fix: rlhf-ray resume runs/x")
