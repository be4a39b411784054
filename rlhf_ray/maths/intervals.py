"""Intervals for a mean: Student's where the values allow it, the bootstrap where they are too skewed for it.

The mean of n values is near enough to normal for a 95 % interval if n > 25 g^2, g the skewness of the values (Cochran 1977,
Sampling Techniques, section 2.15). Score differences often break this (a few replies lose by far), and so do win rates near 0 or 1.
Of 400 samples of 40 log-normal values, mean -+ 1.96 s / sqrt(n) misses the true mean 42 times below it and once above, these
intervals 31 and 5 times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import torch

from rlhf_ray.maths.comparisons import range_p_value
from rlhf_ray.maths.rng import derived_seed
from rlhf_ray.maths.standard_errors import standard_error

RESAMPLES = 9_999
FEWEST = 10
"""Values below which resampling only repeats the few that there are; Student's interval is wide there, as it should be."""


@dataclass(frozen=True)
class Interval:
    """low, high: NaN where nothing can be said.  by: how it was found."""

    low: float
    high: float
    by: Literal["student", "bootstrap", "wilson"]

    def excludes(self, value: float) -> bool:
        return self.low > value or self.high < value


def mean_interval(values: Sequence[float], confidence: float, seed: int) -> Interval:
    """An interval for the mean of independent values; of paired differences, it is that of the paired comparison.

    student: mean -+ t s / sqrt(n), with n - 1 degrees of freedom.   bootstrap, for FEWEST values or more that are too skewed: of
    `bootstrap_interval`, which draws by `seed`.   confidence: 0.95 for 95 %.

    Values that do not vary do not say how much they could: their interval is a point if a sign test would call them different from
    0 (2 / 2^n), NaN else."""
    n = len(values)
    alike = n > 0 and min(values) == max(values)
    if n < 2 or (alike and 0.5 ** (n - 1) > 1 - confidence):
        return Interval(math.nan, math.nan, "student")
    if n >= FEWEST and not n > 25 * skewness(values) ** 2:
        return Interval(*bootstrap_interval(values, confidence, seed), "bootstrap")
    mean, half = math.fsum(values) / n, student_quantile(confidence, n - 1) * standard_error(values)
    return Interval(mean - half, mean + half, "student")


def skewness(values: Sequence[float]) -> float:
    """g = m_3 / m_2^(3/2),   m_k = mean of (x - mean(x))^k.   0 where nothing varies.

    >>> skewness([0.0, 0.0, 0.0, 1.0]) ** 2
    1.3333333333333333
    """
    n = len(values)
    mean = math.fsum(values) / n
    second, third = (math.fsum((x - mean) ** k for x in values) / n for k in (2, 3))
    return third / second**1.5 if second > 0 else 0.0


def bootstrap_interval(values: Sequence[float], confidence: float, seed: int) -> tuple[float, float]:
    """Bias-corrected and accelerated interval of the mean (Efron 1987, JASA 82), from RESAMPLES resamples drawn by `seed`.

    ends at the shares Phi(z_0 + (z_0 + z) / (1 - a (z_0 + z))) of the resampled means, z the normal's two ends,
    z_0 = Phi^-1(share of resampled means below the mean, ties half),   a = sum d_i^3 / (6 (sum d_i^2)^(3/2)),   d_i = x_i - mean
    """
    x = torch.tensor(values, dtype=torch.float64)
    n, mean = x.numel(), float(x.mean())
    centred = x - mean
    squares = float(centred.square().sum())
    if squares == 0:
        return mean, mean
    generator = torch.Generator().manual_seed(derived_seed(seed, "bootstrap"))
    means = torch.cat(
        [
            x[torch.randint(n, (rows, n), generator=generator)].mean(dim=1)
            for rows in _portions(RESAMPLES, 10**6 // n + 1)
        ]
    )
    below = float((means < mean).double().mean()) + float((means == mean).double().mean()) / 2
    normal = NormalDist()
    bias = normal.inv_cdf(min(max(below, 0.5 / RESAMPLES), 1 - 0.5 / RESAMPLES))
    skew = float((centred**3).sum()) / (6 * squares**1.5)
    shares = []
    for end in ((1 - confidence) / 2, (1 + confidence) / 2):
        z = bias + normal.inv_cdf(end)
        shares.append(normal.cdf(bias + z / (1 - skew * z)))
    low, high = torch.quantile(means, torch.tensor(shares, dtype=torch.float64)).tolist()
    return low, high


def student_quantile(confidence: float, freedom: int) -> float:
    """t with P(|T| <= t) = confidence, T Student's with v degrees of freedom: by bisection of the range of two, |T| = Q / sqrt(2).

    >>> round(student_quantile(0.95, 1), 2), round(student_quantile(0.95, 30), 3)
    (12.71, 2.042)
    """
    low, high = 0.0, 1.0
    while range_p_value(math.sqrt(2) * high, 2, freedom) > 1 - confidence:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if range_p_value(math.sqrt(2) * middle, 2, freedom) > 1 - confidence else (low, middle)
        )
    return (low + high) / 2


def _portions(total: int, size: int) -> list[int]:
    """`total` in portions of at most `size`, to bound memory."""
    return [min(size, total - start) for start in range(0, total, size)]
