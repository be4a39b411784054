"""Win rates, draws, the figure at equal length and the paired difference, against their definitions."""

from __future__ import annotations

import math
import random
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.metrics import describe
from rlhf_ray.stages.win_rates import (
    Comparison,
    Judged,
    agreement,
    between,
    compare,
    distinct_2,
    length_controlled,
    pair_counts,
    preference_codes,
)


def side(
    scores: list[float], lengths: list[int] | None = None, responses: list[str] | None = None, tag: str = ""
) -> Judged:
    """One side; replies that nobody set differ from all others."""
    lengths = lengths or [1] * len(scores)
    return Judged(
        torch.tensor(scores), torch.tensor(lengths), responses or [f"{tag} reply {i}" for i in range(len(scores))]
    )


def outcome_of(gaps: list[float], n_dropped: int = 0) -> Comparison:
    return compare(side([0.0] * len(gaps), tag="a"), side(gaps, tag="b"), n_dropped, 0)


def test_a_prompt_that_the_judge_does_not_apply_to_is_not_judged() -> None:
    """A judge for some prompts only. What it has no number for was a win of the baseline's."""
    nan = math.nan
    found = compare(side([0.0, 0.0, nan, 0.0], tag="a"), side([1.0, nan, 1.0, 2.0], [3, 9, 9, 5], tag="b"), 1, 0)
    assert found.codes == (2, None, None, 2) and (found.outcome.n_judged, found.outcome.n_dropped) == (2, 3)
    assert found.outcome.rate == 100.0 and found.difference.value == 1.5


def test_win_rate_golden() -> None:
    """370 wins, 424 losses, 9 draws; an ancestor that counts draws as losses prints 46.08 (F20)."""
    found = outcome_of([1.0] * 370 + [-1.0] * 424 + [0.0] * 9)
    assert found.outcome.rate == pytest.approx(46.63760896637609, abs=1e-9)
    assert found.outcome.se == pytest.approx(1.751619984513092, abs=1e-9)
    assert (found.outcome.wins, found.outcome.losses, found.outcome.draws) == (370, 424, 9)
    metrics = found.metrics("ppo")
    assert metrics["win_rate/ppo"] == pytest.approx(0.4663760896637609)
    assert metrics["win_rate_se/ppo"] == pytest.approx(0.01751619984513092)
    assert metrics["draws/ppo"] == pytest.approx(9 / 803)


def test_dropped_prompts_are_told_and_count_for_nobody() -> None:
    """F20: rows that could not be judged are reported, not lost."""
    with_dropped, without = outcome_of([1.0, 1.0, -1.0], n_dropped=5), outcome_of([1.0, 1.0, -1.0])
    assert (with_dropped.outcome.n_total, with_dropped.outcome.n_judged, with_dropped.outcome.n_dropped) == (8, 3, 5)
    assert with_dropped.outcome.rate == without.outcome.rate
    assert with_dropped.to_json()["n_dropped"] == 5


def test_equal_replies_and_equal_scores_are_draws() -> None:
    baseline = side([0.0, 0.5, 1.0, 2.0], responses=["same", "same", "x", "y"])
    policy = side([9.0, -9.0, 1.0, 3.0], responses=["same", "same", "z", "w"])
    assert preference_codes(baseline, policy) == [0, 0, 0, 2]
    assert preference_codes(policy, baseline) == [0, 0, 0, 1]


def test_the_difference_is_paired() -> None:
    """Differences 1, 1, 2: mean 4/3, sample variance 1/3, standard error 1/3. Unpaired it would be sqrt(7/9 + 1/3)."""
    found = compare(side([10.0, 20.0, 30.0], tag="a"), side([11.0, 21.0, 32.0], tag="b"), 0, 0).difference
    assert found.value == pytest.approx(4 / 3)
    assert found.se == pytest.approx(1 / 3)
    unpaired = math.sqrt(100 / 3 + 331 / 9)
    assert found.se != pytest.approx(unpaired, rel=0.5)


def test_clear_is_what_the_interval_leaves_out() -> None:
    """1, 1, 2: the mean is four standard errors above 0, which t with two degrees of freedom exceeds in more than 5 % (4.30).
    1, 1, 1, 1, 2, 2: mean 4/3, s^2 = 4/15, error sqrt(2/45), and t(5) = 2.571."""
    few, more = outcome_of([1.0, 1.0, 2.0]), outcome_of([1.0, 1.0, 1.0, 1.0, 2.0, 2.0])
    assert few.difference_interval.low == pytest.approx(4 / 3 - 4.3027 / 3, abs=1e-4) and not few.is_clear
    assert more.difference_interval.low == pytest.approx(4 / 3 - 2.5706 * math.sqrt(2 / 45), abs=1e-4) and more.is_clear
    assert not outcome_of([-1.0, 1.0, 2.0]).is_clear
    assert not outcome_of([1.0]).is_clear  # one prompt shows nothing
    assert not outcome_of([1.0] * 5).is_clear and outcome_of([1.0] * 6).is_clear  # 2 / 2^5 is above 5 %, 2 / 2^6 below
    assert not outcome_of([0.0] * 6).is_clear


def test_a_few_replies_that_lose_by_far_are_resampled() -> None:
    """38 prompts a little better, two far worse. The interval reaches further down than up, is that of the job's seed, and says how
    it was found."""
    gaps = [0.1 + 0.01 * i for i in range(38)] + [-7.0, -7.6]
    found, again, other = (compare(side([0.0] * 40, tag="a"), side(gaps, tag="b"), 0, seed) for seed in (1, 1, 2))
    interval, mean = found.difference_interval, found.difference.value
    assert interval.by == "bootstrap" and interval == again.difference_interval != other.difference_interval
    assert mean - interval.low > 1.5 * (interval.high - mean) and not found.is_clear
    told = found.to_json()["score_difference_interval"]
    assert told == {"low": interval.low, "high": interval.high, "confidence": 0.95, "by": "bootstrap"}


def test_intervals_of_win_rates() -> None:
    """All outcomes alike have no spread: Wilson's, which for 20 of 20 begins at 20 / (20 + 1.96^2). None passes 100 %."""
    all_won = outcome_of([1.0] * 20).win_interval
    assert all_won.by == "wilson" and all_won.high == 100.0
    assert all_won.low == pytest.approx(100 * 20 / (20 + 1.959964**2), abs=1e-3)
    nearly, level = outcome_of([1.0] * 19 + [-1.0]).win_interval, outcome_of([1.0, -1.0] * 20).win_interval
    assert nearly.by == "bootstrap" and nearly.low < 90 < nearly.high <= 100
    assert level.by == "student" and level.low + level.high == pytest.approx(100)
    assert level.high - 50 == pytest.approx(100 * 2.0227 * math.sqrt(0.25 / 39), abs=1e-2)


@given(st.lists(st.tuples(st.sampled_from([0, 1, 2]), st.integers(-20, 20)), min_size=3, max_size=30))
def test_at_equal_length_a_rate_stays_a_rate(pairs: list[tuple[int, int]]) -> None:
    """Also where the length alone decides. Without any difference in length it is the win rate itself."""
    codes, gaps = [c for c, _ in pairs], [g for _, g in pairs]
    found = length_controlled(codes, torch.tensor(gaps))
    if not any(gaps):
        assert found.value == pytest.approx(100 * sum({0: 0.5, 1: 0.0, 2: 1.0}[c] for c in codes) / len(codes))
    elif len(set(gaps)) == 1:
        assert not found.is_known
    else:
        assert 0 <= found.value <= 100 and 0 <= found.se < 100
        assert length_controlled(codes, 7 * torch.tensor(gaps)).value == pytest.approx(found.value)  # of any unit


def test_a_policy_that_wins_by_length_alone_does_not_win_at_equal_length() -> None:
    """80 of 100 wins where it is 4 tokens longer, 5 of 25 where it is 4 shorter: 68 % won. The two log-odds, 1.386 and -1.386, are
    equally far from equal length, so there it wins half."""
    codes, gaps = [2] * 80 + [1] * 20 + [2] * 5 + [1] * 20, [4] * 100 + [-4] * 25
    found = length_controlled(codes, torch.tensor(gaps))
    assert outcome_of([1.0 if c == 2 else -1.0 for c in codes]).outcome.rate == 68.0
    assert found.value == pytest.approx(50.0, abs=0.5) and 5 < found.se < 8
    level = length_controlled(codes, torch.tensor([0, *gaps[1:]]))
    assert abs(level.value - 50) < 3


def test_two_policies_are_compared_prompt_by_prompt() -> None:
    """Over 40 prompts each, b wins where a does, and on 4 more. Each win rate alone has an error of 8 points; the difference of 10
    points has one of 4.8. A prompt that one of them was not judged on says nothing."""
    a = outcome_of([1.0] * 20 + [-1.0] * 20 + [math.nan])
    b = outcome_of([1.0] * 24 + [-1.0] * 16 + [1.0])
    (found,) = between({"a": a, "b": b}, 0)
    assert (found.first, found.second, found.n, found.difference.value) == ("a", "b", 40, 10.0)
    assert found.difference.se == pytest.approx(4.8, abs=0.05) and a.outcome.se > 8
    assert found.bootstrap.excludes(0.0) and found.bootstrap.by == "bootstrap"
    assert between({"a": a}, 0) == []


def test_the_published_figure_has_an_interval_too() -> None:
    """370 wins, 424 losses, 9 draws of 803: 46.6 +- 1.75, so 95 % are 1.96 of those either way, resampled or not."""
    found = outcome_of([1.0] * 370 + [-1.0] * 424 + [0.0] * 9)
    for interval in (found.win_interval, found.win_bootstrap):
        assert (interval.low, interval.high) == pytest.approx((43.2, 50.1), abs=0.15)
    assert found.to_json()["win_rate_bootstrap"]["by"] == "bootstrap"


def test_judges_agree_beyond_chance() -> None:
    """Two judges of 20 pairs that both say 1 for 15: 80 % agreement, of which chance explains 62.5 %. A pair that one of them
    dropped is left out."""
    one = [1] * 15 + [2] * 5 + [None, 2]
    other = [1] * 13 + [2] * 2 + [1] * 2 + [2] * 3 + [1, None]
    (found,) = agreement({"x": one, "y": other})
    assert (found.first, found.second, found.n, found.same) == ("x", "y", 20, 0.8)
    assert found.kappa == pytest.approx((0.8 - 0.625) / (1 - 0.625)) and found.interval[0] == pytest.approx(
        0.584, abs=0.001
    )
    (same,) = agreement({"x": [1, 1], "y": [1, 1]})
    assert same.same == 1.0 and math.isnan(same.kappa) and same.to_json()["kappa"] is None


@pytest.mark.parametrize(("codes", "gaps"), [([], []), ([2], [3]), ([2, 1], [3, 4]), ([2, 1, 0], [5, 5, 5])])
def test_what_cannot_be_known_is_left_out(codes: list[int], gaps: list[int]) -> None:
    assert not length_controlled(codes, torch.tensor(gaps)).is_known


def test_one_prompt_has_no_standard_errors() -> None:
    metrics = outcome_of([1.0]).metrics("p")
    assert metrics == {
        "win_rate/p": 1.0,
        "draws/p": 0.0,
        "score_difference/p": 1.0,
        "win_rate_length_controlled/p": 1.0,
        "win_rate_low/p": pytest.approx(1 / (1 + 1.959964**2), abs=1e-6),
        "win_rate_high/p": 1.0,
    }
    assert outcome_of([1.0]).to_json()["win_rate_se"] is None


@given(st.lists(st.floats(-3, 3, width=32), min_size=2, max_size=20))
def test_swapping_the_sides_mirrors_every_figure(gaps: list[float]) -> None:
    n = len(gaps)
    lengths = [(7 * i) % 5 + 1 for i in range(n)]
    one, other = side([0.0] * n, [3] * n, tag="a"), side(gaps, lengths, tag="b")
    there, back = compare(one, other, 0, 0), compare(other, one, 0, 0)
    assert there.outcome.rate + back.outcome.rate == pytest.approx(100)
    assert there.outcome.se == pytest.approx(back.outcome.se)
    assert there.difference.value == pytest.approx(-back.difference.value)
    assert (there.mean_length, there.mean_length_baseline) == (back.mean_length_baseline, back.mean_length)


def test_every_metric_has_its_row() -> None:
    for name in outcome_of([1.0, -1.0, 2.0]).metrics("ppo"):
        assert name.endswith("/ppo") and describe(name)


def test_distinct_2_of_all_pairs() -> None:
    for replies, total, expected in (
        (["the cat the cat", "The cat"], 4, 0.5),
        (["love love love love love"], 4, 0.25),
        (["one two three", "four five"], 3, 1.0),
    ):
        counts = pair_counts(replies)
        assert counts.total() == total and distinct_2(counts, total) == pytest.approx(expected)
    assert pair_counts(["word", ""]).total() == 0 and math.isnan(distinct_2(pair_counts(["word"]), 1))
    assert math.isnan(distinct_2(pair_counts(["one two"]), 2)), "more than there are"


def test_distinct_2_is_the_mean_over_all_draws() -> None:
    counts = pair_counts(["a b a b c", "b a b"])
    pairs = list(counts.elements())
    for drawn in range(1, len(pairs) + 1):
        shares = [len(set(draw)) / drawn for draw in combinations(pairs, drawn)]
        assert distinct_2(counts, drawn) == pytest.approx(sum(shares) / len(shares))


def test_longer_replies_do_not_look_less_diverse() -> None:
    """Two policies draw their words alike from 40; one says four times as much. Over all pairs it had half the share."""
    words = random.Random(0)
    short, long = (
        pair_counts([" ".join(f"w{words.randrange(40)}" for _ in range(length)) for _ in range(100)])
        for length in (11, 41)
    )
    assert len(long) / long.total() < 0.5 * len(short) / short.total()
    drawn = min(short.total(), long.total())
    assert distinct_2(long, drawn) == pytest.approx(distinct_2(short, drawn), rel=0.05)
