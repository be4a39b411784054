"""Learning-rate schedules: never a wasted first or last step (failures F6, F28)."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest

from rlhf_ray.maths.schedules import KINDS, lr_multiplier, peak_multiplier, piecewise_linear, resolve_warmup


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 5), (7, 100), (20, 0), (20, 1), (20, 5), (20, 19), (20, 20)])
def test_f6_every_update_has_a_learning_rate_above_zero_and_at_most_one(kind, total, warmup) -> None:
    for step in range(total):
        assert 0 < lr_multiplier(kind, step, total, warmup, 0.0) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_warmup_rises_to_the_peak_and_decay_never_rises(kind) -> None:
    curve = [lr_multiplier(kind, s, 30, 5, 0.1) for s in range(31)]
    assert curve[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    assert all(a >= b for a, b in itertools.pairwise(curve[5:]))
    assert curve[30] == (1.0 if kind == "constant" else 0.1)
    assert lr_multiplier(kind, 99, 30, 5, 0.1) == curve[30]


def test_shapes() -> None:
    assert [lr_multiplier("linear", s, 5, 1, 0.0) for s in range(1, 6)] == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    cosine = [(1 + math.cos(math.pi * x)) / 2 for x in (0, 0.25, 0.5, 0.75, 1)]
    assert [lr_multiplier("cosine", s, 5, 1, 0.0) for s in range(1, 6)] == pytest.approx(cosine)
    assert [lr_multiplier("linear", s, 4, 0, 0.2) for s in (0, 2, 4)] == pytest.approx([1, 0.6, 0.2])


def test_f28_the_peak_of_a_warmup_longer_than_the_run_is_told() -> None:
    assert peak_multiplier("linear", 7, 100, 0.0) == pytest.approx(7 / 101)  # 2.1e-5 of 3e-4
    assert peak_multiplier("linear", 200, 100, 0.0) == 1
    assert peak_multiplier("constant", 0, 0, 0.0) == 0


@pytest.mark.parametrize("warmup", [0, 0.03, 0.1, 0.5, 0.999, 1, 5, 5.7, 100])
@pytest.mark.parametrize("total", [1, 7, 90, 1000])
def test_warmup_resolves_as_in_transformers(warmup, total) -> None:
    from transformers import TrainingArguments

    theirs = TrainingArguments.get_warmup_steps(
        SimpleNamespace(warmup_steps=warmup), total
    )  # reads that one field alone
    assert resolve_warmup(warmup, total) == theirs


def test_piecewise_linear() -> None:
    points = [(2, 1.0), (4, 3.0), (10, 0.0)]
    assert [piecewise_linear(s, points) for s in (0, 2, 3, 4, 7, 10, 11)] == pytest.approx([1, 1, 2, 3, 1.5, 0, 0])
    assert piecewise_linear(3, [(0, 7.0)]) == 7
    for bad in ([], [(1, 0.0), (1, 1.0)], [(2, 0.0), (1, 1.0)]):
        with pytest.raises(ValueError, match="points"):
            piecewise_linear(0, bad)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="expected one of linear, cosine, constant, got 'polynomial'"):
        lr_multiplier("polynomial", 0, 10, 0, 0.0)
    for step, warmup, floor in ((-1, 0, 0.0), (0, -1, 0.0), (0, 0, 1.5), (0, 0, -0.1)):
        with pytest.raises(ValueError, match="lr_multiplier"):
            lr_multiplier("linear", step, 10, warmup, floor)
    for bad in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match="warmup_steps"):
            resolve_warmup(bad, 10)
