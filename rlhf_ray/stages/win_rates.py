"""One policy against a baseline, prompt by prompt: who wins, by how much, and how much of it is length.

Both answer the same prompts with the same random numbers, so every figure here is paired: the spread between prompts, which is most
of the spread of a reward, cancels.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.maths.intervals import Interval, bootstrap_interval, mean_interval
from rlhf_ray.maths.standard_errors import logistic_intercept, standard_error
from rlhf_ray.maths.stats import WinRate, cohen_kappa, wilson_interval, win_rate

DRAW, BASELINE_WINS, POLICY_WINS = 0, 1, 2
"""AlpacaFarm's preference codes, with the baseline as output_1 and the policy as output_2."""

_OUTCOME = {DRAW: 0.5, BASELINE_WINS: 0.0, POLICY_WINS: 1.0}
CONFIDENCE = 0.95
"""Of the intervals; a difference is called clear if its interval leaves out 0."""
DRAWN_PAIRS = 1_000
"""Word pairs at which `distinct_2` is taken; the fewest that a policy has, if that is less."""


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
    """codes: one per prompt that both answered, in prompt order, None where the judge does not apply to both replies.
    outcome, at_equal_length: in percent.
    difference: mean of (policy's score - baseline's score) over prompts, with the standard error of that paired mean.
    win_interval (in percent), difference_interval: 95 %; by resampling prompts where they are too skewed for Student's.
    win_bootstrap: 95 % of the win rate, in percent, by resampling prompts in any case.   A judge of pairs has no difference."""

    codes: tuple[int | None, ...]
    outcome: WinRate
    at_equal_length: Estimate
    difference: Estimate
    mean_length: float
    mean_length_baseline: float
    win_interval: Interval
    difference_interval: Interval
    win_bootstrap: Interval

    @property
    def is_clear(self) -> bool:
        return self.difference_interval.excludes(0.0)

    def metrics(self, policy: str) -> dict[str, float]:
        """Under the names of metrics.py, rates as shares; undefined figures are left out."""
        found = {
            "win_rate": self.outcome.rate / 100,
            "win_rate_se": self.outcome.se / 100,
            "win_rate_low": self.win_interval.low / 100,
            "win_rate_high": self.win_interval.high / 100,
            "win_rate_length_controlled": self.at_equal_length.value / 100,
            "win_rate_length_controlled_se": self.at_equal_length.se / 100,
            "draws": self.outcome.draws / max(self.outcome.n_judged, 1),
            "score_difference": self.difference.value,
            "score_difference_se": self.difference.se,
            "score_difference_low": self.difference_interval.low,
            "score_difference_high": self.difference_interval.high,
        }
        return {f"{name}/{policy}": value for name, value in found.items() if math.isfinite(value)}

    def metrics_by(self, judge: str, policy: str) -> dict[str, float]:
        """The win rate by a judge that does not decide, beside the one that does."""
        found = {name.partition("/")[0]: value for name, value in self.metrics(policy).items()}
        names = {"win_rate": "", "win_rate_se": "_se", "win_rate_length_controlled": "_length_controlled"}
        return {f"win_rate_by{end}/{judge}/{policy}": found[name] for name, end in names.items() if name in found}

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
            "win_rate_interval": _interval(self.win_interval),
            "win_rate_bootstrap": _interval(self.win_bootstrap),
            "win_rate_length_controlled": _or_none(self.at_equal_length.value),
            "win_rate_length_controlled_se": _or_none(self.at_equal_length.se),
            "score_difference": _or_none(self.difference.value),
            "score_difference_se": _or_none(self.difference.se),
            "score_difference_interval": _interval(self.difference_interval),
            "mean_length": self.mean_length,
            "mean_length_baseline": self.mean_length_baseline,
        }


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _interval(found: Interval) -> dict[str, Any]:
    return {"low": _or_none(found.low), "high": _or_none(found.high), "confidence": CONFIDENCE, "by": found.by}


@dataclass(frozen=True)
class Judged:
    """What a comparison needs of one side. scores, lengths: f32[B], higher is better, tokens.   replies: as text.

    scores: NaN where the judge has none, and throughout for a judge of pairs."""

    scores: Tensor
    lengths: Tensor
    responses: Sequence[str]


def compare(
    baseline: Judged, policy: Judged, n_dropped: int, seed: int, verdicts: Sequence[int | None] | None = None
) -> Comparison:
    """Judge every prompt and sum up.   n_dropped: prompts that were asked for and that neither side could answer.
    seed: of the resampling, the same prompts for every policy of a job.   verdicts: codes of a judge of pairs; default: the higher
    score wins."""
    codes = list(verdicts) if verdicts is not None else preference_codes(baseline, policy)
    known = [code for code in codes if code is not None]
    judged = torch.tensor([code is not None for code in codes], dtype=torch.bool)
    gap = (policy.scores.double() - baseline.scores.double()).flatten()[judged]
    gap = gap if verdicts is None else gap[:0]
    return Comparison(
        codes=tuple(codes),
        outcome=win_rate([*codes, *[None] * n_dropped]),
        at_equal_length=length_controlled(known, (policy.lengths - baseline.lengths)[judged]),
        difference=Estimate(float(gap.mean()), standard_error(gap)),  # NaN of no scores
        mean_length=float(policy.lengths.double().mean()),
        mean_length_baseline=float(baseline.lengths.double().mean()),
        win_interval=win_interval(known, seed),
        difference_interval=mean_interval(gap.tolist(), CONFIDENCE, seed),
        win_bootstrap=_resampled([100 * _OUTCOME[c] for c in known], seed),
    )


@dataclass(frozen=True)
class Between:
    """Two policies against the same baseline, over the prompts where both were judged: win rate of the second less that of the
    first, in percentage points, paired by prompt. interval: 95 %, Student's or resampled; bootstrap: resampled in any case."""

    first: str
    second: str
    n: int
    difference: Estimate
    interval: Interval
    bootstrap: Interval

    def to_json(self) -> dict[str, Any]:
        return {
            "first": self.first,
            "second": self.second,
            "n": self.n,
            "difference": _or_none(self.difference.value),
            "difference_se": _or_none(self.difference.se),
            "interval": _interval(self.interval),
            "bootstrap": _interval(self.bootstrap),
        }


def between(comparisons: Mapping[str, Comparison], seed: int) -> list[Between]:
    """Every two policies of `comparisons`, in their order. Resampling one list of paired differences keeps what prompts have in
    common, which two separate intervals count twice."""
    found = []
    for (first, one), (second, other) in combinations(comparisons.items(), 2):
        gaps = [
            100 * (_OUTCOME[b] - _OUTCOME[a])
            for a, b in zip(one.codes, other.codes, strict=True)
            if a is not None and b is not None
        ]
        mean = math.fsum(gaps) / len(gaps) if gaps else math.nan
        estimate = Estimate(mean, standard_error(gaps))
        student = mean_interval(gaps, CONFIDENCE, seed)
        found.append(Between(first, second, len(gaps), estimate, student, _resampled(gaps, seed)))
    return found


@dataclass(frozen=True)
class Agreement:
    """Two judges over the comparisons of all policies. n: pairs of replies that both judged.  same: share of equal verdicts.
    kappa: Cohen's, NaN where chance alone gives full agreement.  interval: 95 % of `same` (Wilson)."""

    first: str
    second: str
    n: int
    same: float
    kappa: float
    interval: tuple[float, float]

    def to_json(self) -> dict[str, Any]:
        same = {"agreement": _or_none(self.same), "agreement_interval": list(self.interval)}
        return {"first": self.first, "second": self.second, "n": self.n, **same, "kappa": _or_none(self.kappa)}


def agreement(codes: Mapping[str, Sequence[int | None]]) -> list[Agreement]:
    """Every two judges. codes: by judge, one per pair of replies, in one order."""
    found = []
    for (first, one), (second, other) in combinations(codes.items(), 2):
        both = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
        same = sum(a == b for a, b in both)
        interval = wilson_interval(same, len(both), CONFIDENCE)
        share = same / len(both) if both else math.nan
        found.append(Agreement(first, second, len(both), share, cohen_kappa(one, other), interval))
    return found


def _resampled(values: Sequence[float], seed: int) -> Interval:
    if len(values) < 2:
        return Interval(math.nan, math.nan, "bootstrap")
    return Interval(*bootstrap_interval(values, CONFIDENCE, seed), "bootstrap")


def win_interval(codes: Sequence[int], seed: int) -> Interval:
    """Of the win rate, in percent. Where every prompt had the same outcome, which has no spread to go by, Wilson's."""
    x = [_OUTCOME[c] for c in codes]
    if len(set(x)) == 1:
        low, high = wilson_interval(sum(x), len(x), CONFIDENCE)
        return Interval(100 * low, 100 * high, "wilson")
    found = mean_interval(x, CONFIDENCE, seed)
    return Interval(100 * max(found.low, 0.0), 100 * min(found.high, 1.0), found.by)


def preference_codes(baseline: Judged, policy: Judged) -> list[int | None]:
    """0 draw, 1 the baseline wins, 2 the policy wins: the higher score does; None where one side has no score (NaN). Replies that
    read the same are a draw, whatever their scores: two passes over equal text may differ in the last bits."""
    codes: list[int | None] = []
    for first, second, one, other in zip(
        baseline.scores.tolist(), policy.scores.tolist(), baseline.responses, policy.responses, strict=True
    ):
        if math.isnan(first) or math.isnan(second):
            codes.append(None)
        elif one == other or first == second:
            codes.append(DRAW)
        else:
            codes.append(POLICY_WINS if second > first else BASELINE_WINS)
    return codes


def length_controlled(codes: Sequence[int], length_gap: Tensor) -> Estimate:
    """Win rate at equal length, in percent: 100 sigma(a) of the logistic line

        P(x_i = 1) = sigma(a + b tanh(d_i / s)),   x_i = 1 win, 0.5 draw, 0 loss,   d_i = the policy's length - the baseline's

    as AlpacaEval 2 controls for length (Dubois et al. 2024, arXiv:2404.04475); see `logistic_intercept`. If no pair differs in
    length it is the win rate itself. NaN where it cannot be known: fewer than three prompts, or all differences equal and not 0.

    codes: B of them.   length_gap: f[B], tokens."""
    x = torch.tensor([_OUTCOME[c] for c in codes], dtype=torch.float64)
    d = length_gap.double().flatten()
    if len(x) and not bool(d.any()):
        return Estimate(100 * float(x.mean()), 100 * standard_error(x))
    at_zero, se = logistic_intercept(x, d)
    return Estimate(100 * at_zero, 100 * se)


def pair_counts(responses: Sequence[str]) -> Counter[tuple[str, str]]:
    """How often each pair of neighbouring words is in the replies. Words are split at white space, case aside."""
    return Counter(pair for response in responses for pair in pairwise(response.lower().split()))


def distinct_2(counts: Counter[tuple[str, str]], drawn: int) -> float:
    """Different pairs of neighbouring words among n pairs, over n: low where a policy repeats itself (arXiv:1510.03055).

        sum_p (1 - C(N - N_p, n) / C(N, n)) / n,   N_p of the N pairs are p,   n = drawn

    The mean over all ways to draw n of the pairs (rarefaction: Hurlbert 1971, Ecology 52). The share among all N pairs falls with N
    whatever the policy (arXiv:2202.13587), so longer replies would look less diverse: policies compare at equal n alone.

    counts: of `pair_counts`.   NaN if there are fewer pairs than `drawn`, or none is drawn.

    >>> distinct_2(pair_counts(["the cat the cat", "The cat"]), 4)
    0.5
    """
    total = counts.total()
    if not 0 < drawn <= total:
        return math.nan
    whole = _log_choose(total, drawn)
    missed = (math.exp(_log_choose(total - c, drawn) - whole) for c in counts.values() if total - c >= drawn)
    return (len(counts) - math.fsum(missed)) / drawn


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
