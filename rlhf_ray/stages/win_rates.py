"""One policy against a baseline, prompt by prompt: who wins, by how much, and how much of it is length.

Both answer the same prompts with the same random numbers, so every figure here is paired: the spread between prompts, which is most
of the spread of a reward, cancels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.maths.standard_errors import intercept, standard_error
from rlhf_ray.maths.stats import WinRate, win_rate

DRAW, BASELINE_WINS, POLICY_WINS = 0, 1, 2
"""AlpacaFarm's preference codes, with the baseline as output_1 and the policy as output_2."""

_OUTCOME = {DRAW: 0.5, BASELINE_WINS: 0.0, POLICY_WINS: 1.0}
CLEAR = 1.96
"""Standard errors beyond which a difference is called clear (5 % two-sided, normal approximation)."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its standard error; NaN where it is undefined."""

    value: float
    se: float

    @property
    def is_known(self) -> bool:
        return math.isfinite(self.value) and math.isfinite(self.se)


@dataclass(frozen=True)
class Comparison:
    """codes: one per prompt that both answered, in prompt order.   outcome, at_equal_length: in percent.
    difference: mean of (policy's score - baseline's score) over prompts, with the standard error of that paired mean."""

    codes: tuple[int, ...]
    outcome: WinRate
    at_equal_length: Estimate
    difference: Estimate
    mean_length: float
    mean_length_baseline: float

    @property
    def is_clear(self) -> bool:
        return self.difference.is_known and abs(self.difference.value) > CLEAR * self.difference.se

    def metrics(self, policy: str) -> dict[str, float]:
        """Under the names of metrics.py, rates as shares; undefined figures are left out."""
        found = {
            "win_rate": self.outcome.rate / 100,
            "win_rate_se": self.outcome.se / 100,
            "win_rate_length_controlled": self.at_equal_length.value / 100,
            "win_rate_length_controlled_se": self.at_equal_length.se / 100,
            "draws": self.outcome.draws / max(self.outcome.n_judged, 1),
            "score_difference": self.difference.value,
            "score_difference_se": self.difference.se,
        }
        return {f"{name}/{policy}": value for name, value in found.items() if math.isfinite(value)}

    def to_json(self) -> dict[str, Any]:
        """Counts and figures as plain JSON types, rates in percent, None where undefined."""
        outcome = self.outcome
        return {
            "n_total": outcome.n_total,
            "n_judged": outcome.n_judged,
            "n_dropped": outcome.n_dropped,
            "wins": outcome.wins,
            "losses": outcome.losses,
            "draws": outcome.draws,
            "win_rate": _or_none(outcome.rate),
            "win_rate_se": _or_none(outcome.se),
            "win_rate_length_controlled": _or_none(self.at_equal_length.value),
            "win_rate_length_controlled_se": _or_none(self.at_equal_length.se),
            "score_difference": _or_none(self.difference.value),
            "score_difference_se": _or_none(self.difference.se),
            "mean_length": self.mean_length,
            "mean_length_baseline": self.mean_length_baseline,
        }


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Judged:
    """What a comparison needs of one side. scores, lengths: f32[B], higher is better, tokens.   replies: as text."""

    scores: Tensor
    lengths: Tensor
    responses: Sequence[str]


def compare(baseline: Judged, policy: Judged, n_dropped: int) -> Comparison:
    """Judge every prompt and sum up.   n_dropped: prompts that were asked for and that neither side could answer."""
    codes = preference_codes(baseline, policy)
    gap = (policy.scores.double() - baseline.scores.double()).flatten()
    return Comparison(
        codes=tuple(codes),
        outcome=win_rate([*codes, *[None] * n_dropped]),
        at_equal_length=length_controlled(codes, policy.lengths - baseline.lengths),
        difference=Estimate(float(gap.mean()), standard_error(gap)),
        mean_length=float(policy.lengths.double().mean()),
        mean_length_baseline=float(baseline.lengths.double().mean()),
    )


def preference_codes(baseline: Judged, policy: Judged) -> list[int]:
    """0 draw, 1 the baseline wins, 2 the policy wins: the higher score does. Replies that read the same are a draw, whatever their
    scores: two passes over equal text may differ in the last bits."""
    codes = []
    for first, second, one, other in zip(
        baseline.scores.tolist(), policy.scores.tolist(), baseline.responses, policy.responses, strict=True
    ):
        if one == other or first == second:
            codes.append(DRAW)
        else:
            codes.append(POLICY_WINS if second > first else BASELINE_WINS)
    return codes


def length_controlled(codes: Sequence[int], length_gap: Tensor) -> Estimate:
    """Win rate at equal length, in percent: w of the least-squares line

        x_i = w + b d_i + e_i,   x_i = 1 win, 0.5 draw, 0 loss,   d_i = length of the policy's reply - length of the baseline's

    An ordinary regression with the length difference as control (AlpacaEval 2 does the same with a logistic one, arXiv:2404.04475).
    w is cut to 0..100. If no pair differs in length it is the win rate itself. NaN where it cannot be known: fewer than three
    prompts, or all differences equal and not 0.

    codes: B of them.   length_gap: f[B], tokens."""
    x = torch.tensor([_OUTCOME[c] for c in codes], dtype=torch.float64)
    d = length_gap.double().flatten()
    if len(x) and not bool(d.any()):
        return Estimate(100 * float(x.mean()), 100 * standard_error(x))
    at_zero, se = intercept(x, d)
    return Estimate(100 * min(max(at_zero, 0.0), 1.0) if math.isfinite(at_zero) else math.nan, 100 * se)


def distinct_2(responses: Sequence[str]) -> float:
    """Different pairs of neighbouring words over all such pairs, pooled over the replies (arXiv:1510.03055): low where a policy
    repeats itself. Words are split at white space, case aside.   NaN if no reply has two words.

    >>> distinct_2(["the cat the cat", "The cat"])
    0.5
    """
    pairs = [pair for response in responses for pair in pairwise(response.lower().split())]
    return len(set(pairs)) / len(pairs) if pairs else math.nan
