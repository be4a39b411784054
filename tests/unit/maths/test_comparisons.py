"""The studentized range against closed forms and the printed tables, and comparisons with the best by hand."""

from __future__ import annotations

import math

import pytest

from rlhf_ray.maths.comparisons import range_p_value, worse_than_best, worse_than_best_by_errors


@pytest.mark.parametrize("t", [0.5, 2.0, 12.706])
def test_the_range_of_two_is_students_t(t: float) -> None:
    """|t| = q / sqrt(2). P(|t| >= x) is 1 - 2 atan(x) / pi for one degree of freedom, 1 - x / sqrt(2 + x^2) for two."""
    q = math.sqrt(2) * t
    assert range_p_value(q, 2, 1) == pytest.approx(1 - 2 * math.atan(t) / math.pi, abs=1e-9)
    assert range_p_value(q, 2, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-9)
    assert range_p_value(q, 2, math.inf) == pytest.approx(math.erfc(t / math.sqrt(2)), abs=1e-9)


def test_the_range_of_three_without_a_spread_to_estimate() -> None:
    """The mean range of three standard normals is 3 / sqrt(pi), and the mean is the integral of P(range >= w) over w >= 0."""
    step = 0.01
    mean = step * sum(range_p_value(step * (i + 0.5), 3, math.inf) for i in range(1000))
    assert mean == pytest.approx(3 / math.sqrt(math.pi), abs=1e-5)


@pytest.mark.parametrize(
    ("groups", "freedom", "q"),
    [(3, 10, 3.877), (10, 10, 5.598), (10, 20, 5.008), (3, math.inf, 3.314), (10, math.inf, 4.474), (20, 5, 8.208)],
)
def test_upper_five_per_cent_points_of_the_printed_tables(groups: int, freedom: float, q: float) -> None:
    """Printed to half a unit of the third decimal, which is up to 5e-5 of the share."""
    assert range_p_value(q, groups, freedom) == pytest.approx(0.05, abs=6e-5)


def test_edges() -> None:
    assert range_p_value(0.0, 3, 4) == 1.0 and range_p_value(math.inf, 3, 4) == 0.0
    assert range_p_value(1e6, 11, 1) < 1e-4 and math.isnan(range_p_value(math.nan, 3, 4))
    for groups, freedom in ((1, 4), (3, 0)):
        with pytest.raises(ValueError, match="studentized range"):
            range_p_value(1.0, groups, freedom)


def test_what_a_block_adds_to_all_is_taken_out() -> None:
    """Two groups of two: the differences 1 and 3 have the mean 2 and the error 1: t = 2 with one degree of freedom, the
    paired t test. Blocks of 0 and 100 change nothing. Without blocks the spread of 100 hides all."""
    paired = 1 - 2 * math.atan(2.0) / math.pi
    for shift in (0.0, 100.0):
        found = worse_than_best([[0.0, shift], [1.0, shift + 3.0]], blocks=True)
        assert found == pytest.approx([paired, 1.0], abs=1e-9)
    assert worse_than_best([[0.0, 100.0], [1.0, 103.0]], blocks=False)[0] > 0.9


def test_without_blocks_two_groups_are_the_t_test() -> None:
    """(0, 2) and (4, 6): difference 4, s^2 = 2, error sqrt(2): t = 2 sqrt(2) with two degrees of freedom."""
    t = 2 * math.sqrt(2)
    found = worse_than_best([[4.0, 6.0], [0.0, 2.0]], blocks=False)
    assert found == pytest.approx([1.0, 1 - t / math.sqrt(2 + t * t)], abs=1e-9)


def test_a_group_that_scatters_more_is_judged_by_its_own_spread() -> None:
    """Differences (0, 0, 30) to the best have the mean 10 and the error 10, however quiet nine other groups are."""
    quiet = [[99.0 + i / 1000, 99.0 - i / 1000, 99.0] for i in range(9)]
    found = worse_than_best([[100.0, 100.0, 100.0], [100.0, 100.0, 70.0], *quiet], blocks=True)
    assert found[1] == pytest.approx(range_p_value(math.sqrt(2), 11, 20), abs=1e-9)


def test_known_errors() -> None:
    """Errors 3 and 4 make 5: a difference of 10 is two of it."""
    found = worse_than_best_by_errors([10.0, 20.0], [3.0, 4.0], math.inf)
    assert found == pytest.approx([math.erfc(2 / math.sqrt(2)), 1.0])
    assert math.isnan(worse_than_best_by_errors([10.0, 20.0], [math.nan, 4.0], math.inf)[0])


def test_no_spread_at_all() -> None:
    assert worse_than_best([[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]], blocks=True) == [0.0, 1.0, 1.0]


@pytest.mark.parametrize("groups", [[[1.0, 2.0]], [[1.0], [2.0]], [[1.0, 2.0], [3.0]]])
def test_what_cannot_be_compared(groups: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="two groups or more"):
        worse_than_best(groups, blocks=True)
