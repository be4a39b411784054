"""Statistics for normalising rewards and for reports. An undefined figure (no data, no spread) is NaN, never an invented number."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist

import torch
from torch import Tensor

from rlhf_ray.maths import hexfloat
from rlhf_ray.maths.masks import full_precision, masked_var
from rlhf_ray.maths.standard_errors import standard_error


def ensemble_scores(scores: Tensor, aggregate: str, std_coef: float | None = None) -> Tensor:
    """f32[B]: one score of several reward models, f32[M, B], for each reply (Coste et al. 2023, arXiv:2310.02743).

    aggregate   mean             (1/M) sum_m s_m
                min              min_m s_m: their worst-case optimisation (WCO)
                mean_minus_std   mean - std_coef `disagreement`: their uncertainty-weighted optimisation (UWO)
                                 with the standard deviation where they have the variance, so that both terms have one unit
    """
    if aggregate == "min":
        return scores.amin(dim=0)
    mean = scores.mean(dim=0)
    return mean - (std_coef or 0.0) * disagreement(scores) if aggregate == "mean_minus_std" else mean


def disagreement(scores: Tensor) -> Tensor:
    """f32[B]: standard deviation over reward models, f32[M, B], of the score of each reply: sqrt((1/M) sum_m (s_m - mean)^2)."""
    return scores.std(dim=0, correction=0)


class RunningMoments:
    """Count, mean and biased variance of all values seen, merged batch by batch in float64 (Chan, Golub, LeVeque 1979).

    n = n_a + n_b,   d = mean_b - mean_a,   mean = mean_a + d n_b / n,   M2 = M2_a + M2_b + d^2 n_a n_b / n,   var = M2 / n
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self._m2 = 0.0

    @property
    def var(self) -> float:
        """M2 / n; 0 before the first value."""
        return self._m2 / self.count if self.count else 0.0

    def update(self, values: Tensor) -> None:
        """Take in all entries of `values`.   Raises ValueError, and changes nothing, if one is not finite."""
        if not values.numel():
            return
        exact = values.detach().double().flatten()
        if not bool(torch.isfinite(exact).all()):
            raise ValueError(
                "running moments: got a value that is not finite; one would spoil every later normalisation"
            )
        n, mean = exact.numel(), float(exact.mean())
        m2 = float((exact - mean).square().sum())
        total, gap = self.count + n, mean - self.mean
        self._m2 += m2 + gap * gap * self.count * n / total
        self.mean += gap * n / total
        self.count = total

    def normalise(self, values: Tensor, subtract_mean: bool, eps: float) -> Tensor:
        """x / sqrt(var), after subtracting the running mean if `subtract_mean`.

        A spread of `eps` or less carries no signal, and dividing by it would blow up rounding noise: then nothing is divided.
        Else the result does not depend on the scale of the reward model.
        Any shape; returns f32 of the same shape.
        """
        std = math.sqrt(self.var)
        shifted = full_precision(values) - self.mean if subtract_mean else full_precision(values)
        return shifted / std if std > eps else shifted

    def state_dict(self) -> dict[str, str | int]:
        """JSON-able and exact: floats as hexadecimal text."""
        return {"count": self.count, "mean": self.mean.hex(), "m2": self._m2.hex()}

    def load_state_dict(self, state: dict[str, str | int]) -> None:
        """Take over a `state_dict`.   Raises ValueError, and changes nothing, if it is damaged."""
        try:
            count, mean, m2 = int(state["count"]), hexfloat.parse(state["mean"]), hexfloat.parse(state["m2"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"running moments: expected count, mean and m2, got {state!r}") from error
        if count < 0 or m2 < 0:
            raise ValueError(f"running moments: expected a count and an m2 of at least 0, got {state!r}")
        self.count, self.mean, self._m2 = count, mean, m2


def clip_scores(scores: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """clip(s, -limit, limit), and the share of scores that it changed.   scores: f32[B].   limit > 0."""
    if not limit > 0:
        raise ValueError(f"limit: expected above 0, got {limit}")
    beyond = (scores.abs() > limit).float()
    return scores.clamp(-limit, limit), beyond.mean() if beyond.numel() else beyond.sum()


def repetition(tokens: Tensor, response_mask: Tensor) -> Tensor:
    """1 - (different pairs of neighbouring tokens) / (all of them), within each reply: the share that it has said before

    0 for a reply that says nothing twice, near 1 for one word over and over (rep-n of arXiv:1908.04319 with n = 2).

    tokens: i64[B, R].   response_mask: bool[B, R], True on a reply's own tokens, which come first.
    Returns f32[B], 0 for replies of fewer than two tokens.

    >>> repetition(torch.tensor([[5, 6, 5, 6, 5], [5, 6, 7, 0, 0]]), torch.tensor([[1] * 5, [1, 1, 1, 0, 0]]).bool()).tolist()
    [0.5, 0.0]
    """
    found = []
    for row, length in zip(tokens.tolist(), response_mask.sum(dim=1).tolist()):
        pairs = list(pairwise(row[:length]))
        found.append(1 - len(set(pairs)) / len(pairs) if pairs else 0.0)
    return torch.tensor(found, dtype=torch.float32)


def explained_variance(values: Tensor, returns: Tensor, response_mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns): 1 is a perfect value model, 0 one that knows no more than the mean, below 0 a worse
    one.

    All [B, R].   NaN if the returns do not vary.
    """
    spread = float(masked_var(returns.double(), response_mask))
    left = float(masked_var(returns.double() - values.double(), response_mask))
    return 1 - left / spread if spread > 0 else math.nan


@dataclass(frozen=True)
class WinRate:
    """Outcome of pairwise judging.   rate and se in percent; n_dropped judgements could not be read and are in no figure."""

    rate: float
    se: float
    wins: int
    losses: int
    draws: int
    n_dropped: int

    @property
    def n_judged(self) -> int:
        return self.wins + self.losses + self.draws

    @property
    def n_total(self) -> int:
        return self.n_judged + self.n_dropped


def win_rate(codes: Sequence[int | None]) -> WinRate:
    """100 mean(x) +- 100 s / sqrt(n),   x = 1 for code 2 (the model wins), 0.5 for 0 (draw), 0 for 1 (the reference wins)

    The codes of AlpacaFarm. None is an unreadable judgement: left out and counted. Counting draws as losses, as one ancestor's
    script does, is wrong.   Raises ValueError for any other code.

    >>> win_rate([2, 2, 1, 0, None]).rate
    62.5
    """
    value = {2: 1.0, 0: 0.5, 1: 0.0}
    wrong = sorted({repr(c) for c in codes if c is not None and c not in value})
    if wrong:
        raise ValueError(
            f"preference codes: expected 0 (draw), 1 (reference wins), 2 (model wins) or None, got {', '.join(wrong)}"
        )
    judged = [c for c in codes if c is not None]
    x = [value[c] for c in judged]
    return WinRate(
        rate=100 * math.fsum(x) / len(x) if x else math.nan,
        se=100 * standard_error(x),
        wins=judged.count(2),
        losses=judged.count(1),
        draws=judged.count(0),
        n_dropped=len(codes) - len(judged),
    )


def cohen_kappa(one: Sequence[int | None], other: Sequence[int | None]) -> float:
    """(p_o - p_e) / (1 - p_e): agreement of two judges beyond chance (Cohen 1960).

     p_o: share of items on which both say the same;  p_e = sum_k share of k for one x share of k for the other.   None: that judge
     has no verdict, and the item counts for nothing.   NaN where both always say one and the same (p_e = 1), or without items.
    Raises ValueError for unequal lengths.

     >>> cohen_kappa([1, 1, 2, 2, None], [1, 2, 2, 2, 1])
     0.5
    """
    both = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    n = len(both)
    if n == 0:
        return math.nan
    same = sum(a == b for a, b in both) / n
    first, second = Counter(a for a, _ in both), Counter(b for _, b in both)
    chance = sum(count * second[k] for k, count in first.items()) / n**2
    return (same - chance) / (1 - chance) if chance < 1 else math.nan


def wilson_interval(successes: float, n: int, confidence: float) -> tuple[float, float]:
    """(p + z^2/2n -+ z sqrt(p (1-p)/n + z^2/4n^2)) / (1 + z^2/n),   p = successes / n   (E. B. Wilson, 1927)

    An interval for a share that stays inside [0, 1] and is not empty at p = 0 or 1.   confidence: 0.95 for z = 1.96.
    Returns (low, high); (0, 1) for n = 0: nothing is known.
    """
    if not (0 <= successes <= n and 0 < confidence < 1):
        raise ValueError(
            f"wilson_interval: expected 0 <= successes <= n and 0 < confidence < 1, got {successes}, {n}, {confidence}"
        )
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p, z2n = successes / n, z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z2n / (4 * n))
    return max(0.0, (p + z2n / 2 - half) / (1 + z2n)), min(1.0, (p + z2n / 2 + half) / (1 + z2n))


def preference_metrics(margins: Tensor, labels: Tensor) -> dict[str, float]:
    """How a reward model judges held-out pairs.

    margins: f32[N], score of the first reply minus score of the second.   labels: bool[N], True if the first was preferred.
    A tie (margin 0) counts as half a positive, so that a model that scores everything alike has accuracy 0.5.
    Returns shares: accuracy, label_positive_rate, positive_rate, true_positive_rate, false_positive_rate, tie_rate.
    Raises ValueError if a margin is not finite.
    """
    if margins.ndim != 1 or labels.shape != margins.shape or labels.dtype != torch.bool:
        raise ValueError(
            f"labels: expected bool of shape {tuple(margins.shape)}, got {labels.dtype} {tuple(labels.shape)}"
        )
    if not bool(torch.isfinite(margins).all()):
        raise ValueError("margins: got a value that is not finite")
    predicted = (margins.double().sign() + 1) / 2
    return {
        "accuracy": _mean(torch.where(labels, predicted, 1 - predicted)),
        "label_positive_rate": _mean(labels.double()),
        "positive_rate": _mean(predicted),
        "true_positive_rate": _mean(predicted[labels]),
        "false_positive_rate": _mean(predicted[~labels]),
        "tie_rate": _mean((margins == 0).double()),
    }


def _mean(x: Tensor) -> float:
    return float(x.mean()) if x.numel() else math.nan
