"""Intervals of means: Student's by the printed table, the bootstrap by what it covers."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_ray.maths.intervals import bootstrap_interval, mean_interval, skewness, student_quantile
from rlhf_ray.maths.standard_errors import standard_error


@pytest.mark.parametrize(
    ("freedom", "t"), [(1, 12.706), (2, 4.303), (5, 2.571), (10, 2.228), (30, 2.042), (120, 1.980)]
)
def test_students_quantiles_of_the_printed_table(freedom: int, t: float) -> None:
    assert student_quantile(0.95, freedom) == pytest.approx(t, abs=6e-4)


def test_values_that_are_not_skewed_have_students_interval() -> None:
    """1, 2, 3, 4: mean 2.5, error sqrt(5 / 3 / 4), t(3) = 3.182."""
    found = mean_interval([1.0, 2.0, 3.0, 4.0], 0.95, 0)
    half = 3.1824 * math.sqrt(5 / 12)
    assert (found.low, found.high, found.by) == (
        pytest.approx(2.5 - half, abs=1e-4),
        pytest.approx(2.5 + half, abs=1e-4),
        "student",
    )


def test_the_rule_for_resampling() -> None:
    """A share p has the skewness (1 - 2 p) / sqrt(p (1 - p)): 10 of 100 have 8/3, and 25 x 64/9 is above 100; 20 of 100 have 3/2,
    and 25 x 9/4 is below."""
    assert skewness([1.0] * 10 + [0.0] * 90) == pytest.approx(8 / 3)
    assert mean_interval([1.0] * 10 + [0.0] * 90, 0.95, 0).by == "bootstrap"
    assert mean_interval([1.0] * 20 + [0.0] * 80, 0.95, 0).by == "student"
    assert mean_interval([0.0] * 8 + [9.0], 0.95, 0).by == "student", "too few to resample"


def test_what_cannot_be_said() -> None:
    for values in ([], [1.0], [1.0] * 5):
        assert math.isnan(mean_interval(values, 0.95, 0).low)
    assert (mean_interval([1.0] * 6, 0.95, 0).low, mean_interval([1.0] * 6, 0.95, 0).high) == (1.0, 1.0)


def test_resampling_is_that_of_the_seed() -> None:
    values = [0.0] * 30 + [1.0, 5.0]
    assert (
        bootstrap_interval(values, 0.95, 3)
        == bootstrap_interval(values, 0.95, 3)
        != bootstrap_interval(values, 0.95, 4)
    )


def test_skewed_means_are_missed_less_often_and_on_both_sides() -> None:
    """Samples of 40 log-normal values, whose mean is exp(1/2), beside mean -+ 1.96 s / sqrt(n): [misses below, above] of each."""
    generator, true, count = torch.Generator().manual_seed(0), math.exp(0.5), 400
    ours, plain = [0, 0], [0, 0]
    for seed in range(count):
        values = torch.randn(40, generator=generator, dtype=torch.float64).exp().tolist()
        found, half, mean = mean_interval(values, 0.95, seed), 1.96 * standard_error(values), sum(values) / 40
        for misses, low, high in ((ours, found.low, found.high), (plain, mean - half, mean + half)):
            misses[0] += high < true
            misses[1] += low > true
    assert sum(ours) < sum(plain) and ours[0] < 0.8 * plain[0] and ours[1] > plain[1], (ours, plain)
    assert sum(ours) <= 0.11 * count
