"""Comparing several means with the one that came out highest, without calling chance a difference.

The highest of k means was picked because it is the highest, so its distance to any other is stretched by the picking. All k being
equal, "some mean is worse than the highest" is the event that the *range* of the means is large. Its distribution is the
studentized range (Tukey 1953, "The problem of multiple comparisons"; for unequal counts Kramer 1956, proved by Hayter 1984, Annals
of Statistics 12).

Rules that are sharper are so because they claim less. Dunnett (1955) compares with a control that was named beforehand. Hsu's
comparisons with the best (1981, 1984) say "not better than the best of the others", which is true of equal means. Used for "worse
than the winner", their critical values err in 26 % (two seeds) to 31 % (five seeds) of sweeps over 11 equal settings. Two standard
errors of each difference err in 65 %, the studentized range in 5 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_ray.maths.standard_errors import block_deviation, error_of_difference, pooled_deviation, standard_error

OWN_SPREAD_FROM = 3
"""Values of a mean from which on its own spread says something; that of two is a single number."""


def range_p_value(q: float, groups: int, freedom: float) -> float:
    """P(Q >= q),   Q = (largest - smallest of k standard normals) / s,   s^2 ~ chi^2(v) / v

        = 1 - integral f_v(s) W(q s) ds,   W(w) = k integral phi(z) (Phi(z) - Phi(z - w))^(k-1) dz

    The distribution of the studentized range. Both integrals by the trapezoid rule (the outer one over log s), whose error falls
    exponentially for smooth integrands that vanish at both ends; below 1e-8 here.

    groups: k, at least 2.   freedom: v > 0, may be infinite.

    >>> round(range_p_value(3.877, 3, 10), 4)
    0.05
    """
    if not (groups >= 2 and freedom > 0):
        raise ValueError(f"studentized range: expected groups >= 2 and freedom > 0, got {groups}, {freedom}")
    if math.isnan(q) or q <= 0:
        return q if math.isnan(q) else 1.0
    z = torch.linspace(-8, 8, 97, dtype=torch.float64)
    density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi) * float(z[1] - z[0])

    def within(width: Tensor) -> Tensor:
        """W, entry by entry."""
        inside = (torch.erf(z / math.sqrt(2)) - torch.erf((z - width[:, None]) / math.sqrt(2))) / 2
        return groups * (density * inside ** (groups - 1)).sum(dim=1)

    if math.isinf(freedom):
        return 1 - float(within(torch.tensor([q], dtype=torch.float64)))
    wide = math.sqrt(40 / freedom)  # beyond 40 / v + wide below, wide above, f_v(s) s is under e^-40
    u = torch.linspace(-40 / freedom - wide, wide, 257, dtype=torch.float64)
    scale = math.log(2) + freedom / 2 * math.log(freedom / 2) - math.lgamma(freedom / 2)
    weight = torch.exp(scale + freedom * u - freedom * torch.exp(2 * u) / 2) * float(u[1] - u[0])
    beyond = 1 - within(q * torch.exp(u))
    return min(max(float((weight * beyond).sum()), 0.0), 1.0)


def worse_than_best(groups: Sequence[Sequence[float]], blocks: bool) -> list[float]:
    """For each group of values the chance, if no mean differed from any other, that some mean lies as far below the highest as
    this one does, in standard errors: adjusted for all comparisons at once. 1 for the highest.

        q_i = sqrt(2) (m_best - m_i) / e_i,   p_i = P(Q >= q_i)

    blocks: value b of every group was measured under the same conditions b (the same seed), so what a block adds to all is taken
    out: e_i is of the two-way table without interaction, v = (k - 1) (n - 1). Else e_i = s sqrt(1/n_best + 1/n_i), v = N - k.

    Both pool the spread of all groups. From OWN_SPREAD_FROM values each on, e_i is no less than the error of the two groups' own
    difference, so that a group that scatters more than the rest is not judged by the rest. Where 11 groups scatter alike this costs
    a little power (errors in 4 % instead of 5 %). Where one of them scatters three times as much it brings errors from 15 % down to
    8 % (three values), 5 % (five) and 4 % (eight). With two values they stay at 14 %.

    groups: k >= 2 of them, some with two values or more. ValueError else, and for blocks that are not equally long."""
    k, counts = len(groups), [len(g) for g in groups]
    if k < 2 or min(counts) < 1 or max(counts) < 2 or (blocks and len(set(counts)) > 1):
        raise ValueError(f"worse_than_best: expected two groups or more, with two values or more, got counts {counts}")
    means = [math.fsum(g) / len(g) for g in groups]
    best = max(range(k), key=means.__getitem__)
    freedom = (k - 1) * (counts[0] - 1) if blocks else sum(counts) - k
    pooled = block_deviation(groups) if blocks else pooled_deviation(groups) or 0.0
    found = []
    for i, group in enumerate(groups):
        error = pooled * math.sqrt(1 / counts[best] + 1 / counts[i])
        if min(counts[best], counts[i]) >= OWN_SPREAD_FROM:
            error = max(error, _own_error(groups[best], group, blocks))
        found.append(1.0 if i == best else range_p_value(_studentized(means[best] - means[i], error), k, freedom))
    return found


def worse_than_best_by_errors(means: Sequence[float], errors: Sequence[float], freedom: float) -> list[float]:
    """The same for means whose standard errors are known, each from `freedom` degrees of freedom, taken as independent.

    NaN where an error is not known."""
    best = max(range(len(means)), key=means.__getitem__)
    return [
        1.0
        if i == best
        else range_p_value(
            _studentized(means[best] - mean, error_of_difference(errors[best], error)), len(means), freedom
        )
        for i, (mean, error) in enumerate(zip(means, errors, strict=True))
    ]


def _own_error(best: Sequence[float], other: Sequence[float], blocks: bool) -> float:
    """Standard error of the difference of two means from their own values: paired in blocks, else Welch's."""
    if blocks:
        return standard_error([a - b for a, b in zip(best, other, strict=True)])
    return error_of_difference(standard_error(best), standard_error(other))


def _studentized(difference: float, error: float) -> float:
    """The pair as a range: a difference of two independent means has the error sqrt(2) s / sqrt(n)."""
    if error == 0:
        return math.inf if difference > 0 else 0.0
    return math.sqrt(2) * difference / error
