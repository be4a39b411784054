"""Figures of merit of a reward model, from pairs counted by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_ray.metrics import describe
from rlhf_ray.supervised.reward_metrics import (
    MOST_GROUPS,
    PairScores,
    accuracy_by_group,
    accuracy_by_length,
    calibration_error,
    correlation,
    held_out_record,
    longer_wins,
    presentation,
    score_metrics,
)


def pairs(margins: list[float], longer: list[int]) -> PairScores:
    """Rejected replies score 0 and have 10 tokens; chosen ones have `longer` tokens more."""
    scores = torch.stack([torch.tensor(margins), torch.zeros(len(margins))], 1)
    return PairScores(scores, torch.tensor([[10 + n, 10] for n in longer]))


def test_metrics_of_a_hand_made_set() -> None:
    found = score_metrics(pairs([1.0, 2.0, -1.0, 0.0], [1, -2, 3, 0]), seed=0)
    assert found["eval/accuracy"] == pytest.approx(2.5 / 4)  # two right, one tie
    assert found["eval/margin"] == pytest.approx(0.5)
    softplus = [math.log1p(math.exp(-m)) for m in (1.0, 2.0, -1.0, 0.0)]
    assert found["eval/loss"] == pytest.approx(sum(softplus) / 4, rel=1e-6)
    assert found["eval/longer_wins"] == pytest.approx(1 / 3)  # +1 wins, -2 wins against it, +3 loses
    assert found["eval/accuracy_low"] < 2.5 / 4 < found["eval/accuracy_high"]
    assert found["eval/rows"] == 4.0
    for name in found:
        describe(name)


def test_the_presentation_is_random_fixed_by_the_seed_and_about_even() -> None:
    """A model that always prefers the first place has accuracy about 0.5 here, and 1.0 without the shuffle."""
    first = presentation(2000, seed=7)
    assert torch.equal(first, presentation(2000, seed=7))
    assert not torch.equal(first, presentation(2000, seed=8))
    assert 0.45 < float(first.float().mean()) < 0.55
    found = score_metrics(pairs([1.0] * 400, [1] * 400), seed=7)
    assert 0.4 < found["eval/label_positive_rate"] < 0.6
    assert found["eval/true_positive_rate"] == 1.0 and found["eval/false_positive_rate"] == 0.0
    assert found["eval/positive_rate"] == pytest.approx(found["eval/label_positive_rate"])


def test_calibration_error_is_zero_for_a_calibrated_model_and_large_for_a_boastful_one() -> None:
    even = torch.tensor([True, False] * 50)
    assert calibration_error(torch.zeros(100), even) == pytest.approx(0.0)
    assert calibration_error(torch.full((100,), 20.0), even) == pytest.approx(0.5, abs=1e-6)
    # 80 % right at p = 0.8 in one bin, 25 % right at p = 0.75 in another: (0 x 10 + 0.5 x 4) / 14
    margins = torch.tensor([math.log(4.0)] * 10 + [math.log(3.0)] * 4)
    labels = torch.tensor([True] * 8 + [False] * 2 + [True] + [False] * 3)
    assert calibration_error(margins, labels) == pytest.approx(2 / 14, abs=1e-6)


def test_correlation() -> None:
    x = torch.tensor([1.0, 2.0, 3.0])
    assert correlation(x, 2 * x + 1) == pytest.approx(1.0)
    assert correlation(x, -x) == pytest.approx(-1.0)
    assert correlation(x, torch.tensor([1.0, 3.0, 2.0])) == pytest.approx(0.5)
    assert math.isnan(correlation(x, torch.ones(3)))


def test_undefined_figures_are_left_out() -> None:
    found = score_metrics(pairs([1.0, -1.0], [0, 0]), seed=0)
    assert "eval/longer_wins" not in found and "eval/length_correlation" not in found
    assert math.isnan(longer_wins(pairs([1.0], [0])))
    assert all(math.isfinite(v) for v in found.values())


def test_spread_is_over_all_replies() -> None:
    assert pairs([2.0, 4.0], [0, 0]).spread() == pytest.approx({"mean": 1.5, "std": math.sqrt(11 / 3), "replies": 4.0})


def test_a_model_that_pays_for_length_fails_where_the_shorter_reply_is_better() -> None:
    """Three of four right in all; but always wrong where the shorter one is better. Equal lengths count for neither."""
    found = score_metrics(pairs([1.0, 2.0, 3.0, -1.0, 5.0], [4, 2, 1, -3, 0]), seed=0)
    assert found["eval/accuracy_shorter_chosen"] == 0.0 and found["eval/accuracy_longer_chosen"] == 1.0
    assert math.isnan(accuracy_by_length(pairs([1.0], [0]))["accuracy_shorter_chosen"])
    assert "eval/accuracy_shorter_chosen" not in score_metrics(pairs([1.0, 2.0], [1, 1]), seed=0)


def test_groups_have_accuracies_of_their_own_with_intervals() -> None:
    scored = pairs([1.0, 1.0, -1.0, -1.0, 2.0], [1] * 5)
    named = PairScores(scored.scores, scored.lengths, ["code", "code", "chat", "chat", ""])
    found = accuracy_by_group(named)
    assert {name: (of["accuracy"], of["pairs"]) for name, of in found.items()} == {
        "chat": (0.0, 2.0),
        "code": (1.0, 2.0),
    }
    assert found["code"]["low"] == pytest.approx(0.3424, abs=1e-4) and found["code"]["high"] == pytest.approx(1.0)
    metrics = score_metrics(named, seed=0)
    assert (metrics["eval/accuracy_by/chat"], metrics["eval/accuracy_by/code"]) == (0.0, 1.0)
    assert accuracy_by_group(scored) == {} == accuracy_by_group(PairScores(scored.scores, scored.lengths, ["one"] * 5))
    many = PairScores(torch.zeros(50, 2), torch.zeros(50, 2).long(), [str(i) for i in range(50)])
    assert len(accuracy_by_group(many)) == MOST_GROUPS
    for name in metrics:
        describe(name)


def test_the_record_holds_the_interval_and_what_the_reliability_picture_draws() -> None:
    """Eight of ten right at p = 0.8: the bin of p says 0.8, or, presented the other way round, 0.2."""
    record = held_out_record(pairs([math.log(4.0)] * 8 + [-math.log(4.0)] * 2, [0] * 10), seed=3)
    assert (record["accuracy"], record["pairs"]) == (0.8, 10.0) and record["low"] < 0.8 < record["high"]
    assert {round(b["predicted"], 6) for b in record["reliability"]} == {0.2, 0.8}
    assert sum(b["pairs"] for b in record["reliability"]) == 10
    assert all(b["low"] <= b["observed"] <= b["high"] for b in record["reliability"])
