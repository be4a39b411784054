"""How good a reward model is, from its scores of held-out pairs: accuracy with its interval, in all and by group of pairs;
calibration; length bias."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.maths.losses import pairwise_reward_loss_sum
from rlhf_ray.maths.rng import derived_seed, uniforms
from rlhf_ray.maths.stats import preference_metrics, wilson_interval

CONFIDENCE = 0.95
BINS = 10
MOST_GROUPS = 20
"""Groups of pairs that are told apart, the largest ones; a column with a value for every row is no group."""


@dataclass(frozen=True)
class PairScores:
    """scores: f32[N, 2] and lengths (reply tokens): i64[N, 2]; column 0 is the chosen reply, column 1 the rejected one.
    groups: of each pair, "" for none."""

    scores: Tensor
    lengths: Tensor
    groups: Sequence[str] = ()

    @property
    def margins(self) -> Tensor:
        return self.scores[:, 0] - self.scores[:, 1]

    @property
    def won(self) -> Tensor:
        """f64[N]: 1 where the chosen reply scores higher, 1/2 for a tie."""
        return (self.margins.double().sign() + 1) / 2

    def spread(self) -> dict[str, float]:
        """Mean and standard deviation (n - 1) of all replies' scores."""
        every = self.scores.double().flatten()
        std = float(every.std()) if len(every) > 1 else 0.0
        return {"mean": float(every.mean()), "std": std, "replies": float(len(every))}


def accuracy_line(metrics: Mapping[str, float]) -> str | None:
    """Held-out accuracy with its interval, from a reward run's metrics; None where nothing was held out."""
    if "eval/accuracy" not in metrics:
        return None
    low, high = metrics["eval/accuracy_low"], metrics["eval/accuracy_high"]
    shown = f"{metrics['eval/accuracy']:.1%} (95% interval {low:.1%} to {high:.1%})"
    return f"held-out accuracy {shown} of {metrics['eval/rows']:.0f} pairs"


def score_metrics(pairs: PairScores, seed: int) -> dict[str, float]:
    """The eval/* metrics of metrics.py. Figures that are undefined here (no spread, one label only) are left out.

    The pairs are presented in an order drawn by `seed`, chosen first or rejected first, so that a model which prefers a place to a
    reply shows: label_positive_rate is about 0.5, and true and false positive rates differ as much as the model can tell."""
    count = len(pairs.margins)
    chosen_first = presentation(count, seed)
    shown = torch.where(chosen_first, pairs.margins, -pairs.margins)
    loss, _ = pairwise_reward_loss_sum(pairs.scores[:, 0], pairs.scores[:, 1])
    rates = preference_metrics(shown, chosen_first)
    rates.pop("tie_rate")
    low, high = wilson_interval(rates["accuracy"] * count, count, CONFIDENCE)
    found = {
        "loss": float(loss) / count,
        "margin": float(pairs.margins.mean()),
        **rates,
        "accuracy_low": low,
        "accuracy_high": high,
        "length_correlation": correlation(pairs.scores.flatten(), pairs.lengths.flatten()),
        "longer_wins": longer_wins(pairs),
        **accuracy_by_length(pairs),
        "calibration_error": calibration_error(shown, chosen_first),
        "rows": float(count),
        **{f"accuracy_by/{name}": of["accuracy"] for name, of in accuracy_by_group(pairs).items()},
    }
    return {f"eval/{name}": value for name, value in found.items() if math.isfinite(value)}


def held_out_record(pairs: PairScores, seed: int) -> dict[str, Any]:
    """What a run keeps of its held-out pairs beside `score_metrics`: {accuracy, low, high, pairs, reliability, groups}, as JSON."""
    chosen_first = presentation(len(pairs.margins), seed)
    shown = torch.where(chosen_first, pairs.margins, -pairs.margins)
    return {
        **share_won(pairs.won),
        "reliability": reliability(shown, chosen_first),
        "groups": accuracy_by_group(pairs),
    }


def share_won(won: Tensor) -> dict[str, float]:
    """{accuracy, low, high, pairs}: the mean with its 95% interval.   won: f64[N]."""
    low, high = wilson_interval(float(won.sum()), len(won), CONFIDENCE)
    return {"accuracy": float(won.mean()), "low": low, "high": high, "pairs": float(len(won))}


def accuracy_by_length(pairs: PairScores) -> dict[str, float]:
    """Accuracy on pairs whose chosen reply is the shorter one, and the longer one: a model that pays for length has a low first and
    a high second. NaN where there are none."""
    gap = pairs.lengths[:, 0] - pairs.lengths[:, 1]
    parts = {"accuracy_shorter_chosen": gap < 0, "accuracy_longer_chosen": gap > 0}
    return {name: float(pairs.won[mask].mean()) if bool(mask.any()) else math.nan for name, mask in parts.items()}


def accuracy_by_group(pairs: PairScores) -> dict[str, dict[str, float]]:
    """Group -> `share_won` of its pairs, largest first; empty where fewer than two groups are named."""
    sizes = Counter(group for group in pairs.groups if group)
    if len(sizes) < 2:
        return {}
    largest = sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[:MOST_GROUPS]
    return {name: share_won(pairs.won[torch.tensor([g == name for g in pairs.groups])]) for name, _ in largest}


def presentation(count: int, seed: int) -> Tensor:
    """bool[N]: whether the chosen reply of pair i is presented first."""
    order = torch.tensor([derived_seed(seed, "presentation")])
    return uniforms(order, torch.arange(count)) < 0.5


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's r = sum (x - mean)(y - mean) / sqrt(sum (x - mean)^2 sum (y - mean)^2).   NaN if either does not vary."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    scale = float((x.square().sum() * y.square().sum()).sqrt())
    return float((x * y).sum()) / scale if scale > 0 else math.nan


def longer_wins(pairs: PairScores) -> float:
    """Of pairs with replies of different lengths, the share whose longer reply scores higher (a tie counts half)."""
    gap = (pairs.lengths[:, 0] - pairs.lengths[:, 1]).sign()
    agrees = (gap * pairs.margins.sign())[gap != 0]
    return float((agrees.double() + 1).mean() / 2) if len(agrees) else math.nan


def calibration_error(margins: Tensor, labels: Tensor) -> float:
    """sum_b n_b / N |mean p - mean label|,   b over the bins of `reliability`

    The expected calibration error (arXiv:1706.04599).

    margins: f32[N] first minus second.   labels: bool[N], the first was preferred."""
    bins = reliability(margins, labels)
    gaps = [b["pairs"] * abs(b["predicted"] - b["observed"]) for b in bins]
    return math.fsum(gaps) / len(margins) if bins else math.nan


def reliability(margins: Tensor, labels: Tensor) -> list[dict[str, float]]:
    """{predicted (mean p), observed (mean label), low, high, pairs} of each of BINS equal bins of p = sigmoid(margin) with pairs.

    low, high: 95% interval of `observed`.

    margins: f32[N] first minus second.   labels: bool[N], the first was preferred."""
    p = margins.double().sigmoid()
    of = (p * BINS).long().clamp_max(BINS - 1)
    found = []
    for b in of.unique().tolist():
        observed = share_won(labels[of == b].double())
        found.append({"predicted": float(p[of == b].mean()), "observed": observed.pop("accuracy"), **observed})
    return found
