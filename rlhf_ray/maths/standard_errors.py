"""How far chance moves an estimate: every standard error of the project is computed here, from values or from other errors.

Without torch, so that reports can use it. An error that is not known (one value has no spread) is NaN, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def standard_error(values: Sequence[float] | Tensor) -> float:
    """s / sqrt(n), s the sample standard deviation (n - 1).   values: of any shape.   NaN for fewer than two values.

    That of a tensor is torch's sum, to the bit, since runs that go on repeat their metrics."""
    if not isinstance(values, (list, tuple)):
        x = values.double().flatten()  # type: ignore[union-attr]
        return float(x.std(correction=1)) / math.sqrt(x.numel()) if x.numel() > 1 else math.nan
    return math.sqrt(_squares(values) / (len(values) - 1) / len(values)) if len(values) > 1 else math.nan


def deviation(error: float, n: float) -> float:
    """s = e sqrt(n): the standard deviation of values whose mean has the standard error e.

    >>> deviation(0.5, 16)
    2.0
    """
    return error * math.sqrt(n)


def error_of_difference(one: float, other: float) -> float:
    """sqrt(e_1^2 + e_2^2): standard error of the difference (or sum) of two independent estimates.

    >>> error_of_difference(3.0, 4.0)
    5.0
    """
    return math.hypot(one, other)


def error_of_mean(errors: Sequence[float]) -> float:
    """sqrt(sum_i e_i^2) / n: standard error of the mean of n independent estimates.   NaN for none."""
    return math.hypot(*errors) / len(errors) if errors else math.nan


def intercept(x: Sequence[float] | Tensor, d: Sequence[float] | Tensor) -> tuple[float, float]:
    """(w, its standard error) of the least-squares line

        x_i = w + b d_i + e_i,   se(w) = s sqrt(1/n + mean(d)^2 / S),   S = sum (d_i - mean(d))^2,   s^2 = sum e_i^2 / (n - 2)

    NaN for fewer than three points, or if all d are equal.

    >>> intercept([1.0, 3.0, 5.0], [0.0, 1.0, 2.0])
    (1.0, 0.0)
    """
    x, d = _floats(x), _floats(d)
    n, spread = len(x), _squares(d) if d else 0.0
    if n < 3 or spread == 0:
        return math.nan, math.nan
    mean_x, mean_d = math.fsum(x) / n, math.fsum(d) / n
    slope = math.fsum((b - mean_d) * (a - mean_x) for a, b in zip(x, d, strict=True)) / spread
    at_zero = mean_x - slope * mean_d
    left = math.fsum((a - at_zero - slope * b) ** 2 for a, b in zip(x, d))
    return at_zero, math.sqrt(left / (n - 2) * (1 / n + mean_d**2 / spread))


def pooled_deviation(groups: Sequence[Sequence[float]]) -> float | None:
    """sqrt(sum_g sum_i (x_gi - mean_g)^2 / sum_g (n_g - 1)): the spread within groups, taken as the same in all; None if no group
    has two values.

    >>> pooled_deviation([[1, 3], [2, 4]])
    1.4142135623730951
    """
    freedom = sum(len(g) - 1 for g in groups)
    return math.sqrt(math.fsum(_squares(g) for g in groups) / freedom) if freedom else None


def block_deviation(groups: Sequence[Sequence[float]]) -> float:
    """sqrt(sum_gb (x_gb - mean_g - mean_b + mean)^2 / ((k - 1) (n - 1))): the spread that is left in k groups of n values when what
    block b (value b of every group) adds to all groups is taken out: a two-way table without interaction (Fisher 1925).

    Raises ValueError for fewer than two groups or blocks, or groups of unequal length.

    >>> block_deviation([[0, 3], [1, 6]])
    1.0
    """
    lengths = [len(g) for g in groups]
    if len(groups) < 2 or len(set(lengths)) != 1 or lengths[0] < 2:
        raise ValueError(f"block_deviation: expected two groups or more, equally long, got lengths {lengths}")
    k, n = len(groups), lengths[0]
    of_block = [math.fsum(g[b] for g in groups) / k for b in range(n)]
    centred = [[x - of_block[b] for b, x in enumerate(g)] for g in groups]
    return math.sqrt(math.fsum(_squares(g) for g in centred) / ((k - 1) * (n - 1)))


def _squares(x: Sequence[float]) -> float:
    """sum (x_i - mean(x))^2"""
    mean = math.fsum(x) / len(x)
    return math.fsum((value - mean) ** 2 for value in x)


def _floats(values: Sequence[float] | Tensor) -> list[float]:
    return list(values) if isinstance(values, (list, tuple)) else values.flatten().tolist()  # type: ignore[union-attr]
