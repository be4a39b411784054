"""Faults made on purpose, at named points, for tests and drills. Nothing happens unless the environment asks for it.

    RLHF_RAY_FAULT="learner:update:step=3:kill"           kill -9 of this process at that point
    RLHF_RAY_FAULT="scorer:score:step=2:nan, generator:sample:call=5:sleep=600"
    RLHF_RAY_FAULT_MARKS=/tmp/marks                       each fault fires once, over all processes and restarts

A fault is role:point, conditions (step=, rank=, call=: the n-th time that this process comes by), and an action: kill, stop
(SIGSTOP), term (SIGTERM), sleep=SECONDS, raise, full (the disk is), nan (where numbers pass by).

Points: learner: rollout, evaluate, experience, update, minibatch, gradient, publish, save, save_written, save_sealed, save_renamed,
step_end, heldout; generator: sample, adapter; scorer: score; actor: the method that is called, as in generate_with.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_ray.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

VARIABLE, MARKS = "RLHF_RAY_FAULT", "RLHF_RAY_FAULT_MARKS"
ACTIONS = ("kill", "stop", "term", "sleep", "raise", "full", "nan")
CONDITIONS = ("step", "rank", "call")

_calls: Counter[tuple[str, str]] = Counter()


@dataclass(frozen=True)
class Fault:
    """where: (role, point).  when: conditions that must all hold.  seconds: of a sleep."""

    where: tuple[str, str]
    when: tuple[tuple[str, int], ...]
    action: str
    seconds: float
    text: str


def fault_point(role: str, name: str, step: int = 0, rank: int = 0) -> None:
    """Say that this process is at a point. Returns, unless a fault is asked for here."""
    if VARIABLE in os.environ:
        _fire(_due(role, name, step, rank, numbers=False))


def inject_nan(role: str, name: str, numbers: Tensor, step: int = 0, rank: int = 0) -> Tensor:
    """`numbers`, the first of them NaN if that is asked for here."""
    if VARIABLE not in os.environ or _due(role, name, step, rank, numbers=True) is None:
        return numbers
    import torch

    factor = torch.ones_like(numbers)
    factor.view(-1)[0] = torch.nan
    return numbers * factor  # gradients are poisoned as well


def _due(role: str, name: str, step: int, rank: int, numbers: bool) -> Fault | None:
    faults = [f for f in parse(os.environ[VARIABLE]) if f.where == (role, name) and (f.action == "nan") == numbers]
    if not faults:
        return None
    _calls[role, name] += 1
    here = {"step": step, "rank": rank, "call": _calls[role, name]}
    return next((f for f in faults if all(here[k] == v for k, v in f.when) and _not_yet(f)), None)


def _not_yet(fault: Fault) -> bool:
    """Whether the fault may fire; notes that it did, where it may fire but once."""
    folder = os.environ.get(MARKS)
    if not folder:
        return True
    try:
        Path(folder, fault.text.replace("/", "_")).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _fire(fault: Fault | None) -> None:
    if fault is None:
        return
    signals = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}
    if fault.action in signals:
        os.kill(os.getpid(), signals[fault.action])
    elif fault.action == "sleep":
        time.sleep(fault.seconds)
    elif fault.action == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    else:
        raise RuntimeError(f"fault asked for by {VARIABLE}: {fault.text}")


@lru_cache
def parse(text: str) -> tuple[Fault, ...]:
    """The faults that `text` asks for. ConfigError if it cannot be read: a drill that does nothing proves nothing."""
    found = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        words = item.split(":")
        action, _, seconds = words[-1].partition("=")
        pairs = [word.partition("=") for word in words[2:-1]]
        good = len(words) >= 3 and action in ACTIONS and (action == "sleep") == bool(seconds)
        if not good or any(key not in CONDITIONS or not value.isdigit() for key, _, value in pairs):
            raise ConfigError.at(VARIABLE, "is not a fault", "role:point[:step=N][:rank=N][:call=N]:action", item)
        when = tuple((key, int(value)) for key, _, value in pairs)
        found.append(Fault((words[0], words[1]), when, action, float(seconds or 0), item))
    return tuple(found)
