"""How far chance moves an estimate: every standard error of the project is computed here, from values or from other errors.

Without torch, so that reports can use it. An error that is not known (one value has no spread) is NaN, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SLOPE_SPREAD, NEWTON_STEPS = 10.0, 100
"""Of `logistic_intercept`."""


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


def logistic_intercept(x: Sequence[float] | Tensor, d: Sequence[float] | Tensor) -> tuple[float, float]:
    """(p, its standard error) at d = 0 of the logistic line

        p_i = sigma(a + b tanh(d_i / s)),   a, b = argmax sum_i [x_i log p_i + (1 - x_i) log(1 - p_i)] - b^2 / (2 c^2)

    x in [0, 1], a share counts as such;  s: sample standard deviation of d (n - 1);  c = SLOPE_SPREAD bounds b where d alone
    decides x, and is felt nowhere else.   se(p) = p (1 - p) sqrt(V_aa),   V = H^-1 (sum g_i g_i^T) H^-1, the sandwich.

    The control for length of AlpacaEval 2 (Dubois et al. 2024, arXiv:2404.04475), for one pair of models and without its terms for
    the difficulty of an instruction. NaN for fewer than three points, or if all d are equal; all x equal: that value, error 0.

    >>> [round(v, 3) for v in logistic_intercept([1.0, 1.0, 0.0, 0.0], [3.0, -3.0, 3.0, -3.0])]
    [0.5, 0.25]
    """
    x, d = _floats(x), _floats(d)
    n, spread = len(x), _squares(d) if d else 0.0
    if n < 3 or spread == 0:
        return math.nan, math.nan
    if min(x) == max(x) and x[0] in (0.0, 1.0):
        return x[0], 0.0
    scale = math.sqrt(spread / (n - 1))
    u = [math.tanh(value / scale) for value in d]
    ridge = SLOPE_SPREAD**-2
    a = b = 0.0
    for _ in range(NEWTON_STEPS):
        p = [_sigma(a + b * v) for v in u]
        g = [math.fsum(y - q for y, q in zip(x, p)), math.fsum((y - q) * v for y, q, v in zip(x, p, u)) - ridge * b]
        w = [q * (1 - q) for q in p]
        h = math.fsum(w), math.fsum(k * v for k, v in zip(w, u)), math.fsum(k * v * v for k, v in zip(w, u)) + ridge
        det = h[0] * h[2] - h[1] ** 2
        step = (h[2] * g[0] - h[1] * g[1]) / det, (h[0] * g[1] - h[1] * g[0]) / det
        shrink = min(1.0, 2.0 / max(abs(step[0]), abs(step[1]), 2.0))  # far from the top the parabola overshoots
        a, b = a + shrink * step[0], b + shrink * step[1]
        if max(map(abs, step)) < 1e-12:
            break
    row = h[2] / det, -h[1] / det  # first row of H^-1
    variance = math.fsum(((y - q) * (row[0] + row[1] * v)) ** 2 for y, q, v in zip(x, p, u))
    at_zero = _sigma(a)
    return at_zero, at_zero * (1 - at_zero) * math.sqrt(variance)


def _sigma(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))


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
