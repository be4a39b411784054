"""Faults on purpose: what is asked for happens, once, at its point; what is not asked for never does."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from rlhf_ray.errors import ConfigError
from rlhf_ray.runtime import fault_injection


@pytest.fixture(autouse=True)
def _nobody_came_by() -> None:
    fault_injection._calls.clear()


def test_nothing_happens_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(fault_injection.VARIABLE, raising=False)
    started = time.perf_counter()
    for _ in range(100_000):
        fault_injection.fault_point("learner", "update", 3)
    assert time.perf_counter() - started < 1.0, "a point costs microseconds"
    numbers = torch.ones(2)
    assert fault_injection.inject_nan("scorer", "score", numbers) is numbers


def test_conditions_must_all_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fault_injection.VARIABLE, "learner:update:step=3:rank=1:raise, scorer:score:call=2:nan")
    fault_injection.fault_point("learner", "update", 3, rank=0)
    fault_injection.fault_point("learner", "update", 2, rank=1)
    fault_injection.fault_point("learner", "publish", 3, rank=1)
    with pytest.raises(RuntimeError, match="learner:update:step=3:rank=1:raise"):
        fault_injection.fault_point("learner", "update", 3, rank=1)
    ones = torch.ones(2, 2)
    assert bool(torch.isfinite(fault_injection.inject_nan("scorer", "score", ones)).all())
    found = fault_injection.inject_nan("scorer", "score", ones)
    assert torch.isnan(found).tolist() == [[True, False], [False, False]] and bool(torch.isfinite(ones).all())
    fault_injection.fault_point("scorer", "score")  # numbers do not pass by here


def test_a_mark_lets_a_fault_fire_once_over_all_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(fault_injection.VARIABLE, "learner:save:full")
    monkeypatch.setenv(fault_injection.MARKS, str(tmp_path))
    with pytest.raises(OSError, match="No space left"):
        fault_injection.fault_point("learner", "save")
    fault_injection.fault_point("learner", "save")
    assert [p.name for p in tmp_path.iterdir()] == ["learner:save:full"]


@pytest.mark.parametrize("text", ["learner", "learner:update", "learner:update:boom", "learner:update:step=x:kill",
                                  "learner:update:when=3:kill", "learner:update:sleep", "learner:update:kill=3"])  # fmt: skip
def test_a_drill_that_would_do_nothing_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"RLHF_RAY_FAULT: is not a fault; expected role:point"):
        fault_injection.parse(text)
