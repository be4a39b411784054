"""Running moments, critics, errors and win rates (failures F4, F20, F33)."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.maths import stats
from rlhf_ray.maths.stats import RunningMoments

# --- running moments ---


def _seen(*batches: list[float]) -> RunningMoments:
    moments = RunningMoments()
    for values in batches:
        moments.update(torch.tensor(values))
    return moments


def test_moments_golden(golden) -> None:
    g = golden["moments"]
    moments = _seen(*g["batches"])
    assert moments.count == 8
    assert (moments.mean, moments.var) == pytest.approx((g["mean"], g["var"]), rel=1e-12)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=30), st.integers(1, 29), st.floats(-1e5, 1e5))
def test_any_split_gives_the_moments_of_the_whole(values, cut, shift) -> None:
    shifted = [v + shift for v in values]
    whole, split = RunningMoments(), RunningMoments()
    whole.update(torch.tensor(shifted, dtype=torch.float64))
    for part in (shifted[:cut], shifted[cut:]):
        split.update(torch.tensor(part, dtype=torch.float64))
    assert split.count == whole.count
    assert split.mean == pytest.approx(whole.mean, rel=1e-9, abs=1e-9)
    assert split.var == pytest.approx(whole.var, rel=1e-6, abs=1e-6)


def test_moments_survive_a_large_offset() -> None:
    """The textbook E[x^2] - E[x]^2 loses everything here."""
    moments = RunningMoments()
    for part in torch.tensor([1e8 + x for x in (1.0, 2.0, 3.0, 4.0)], dtype=torch.float64).split(1):
        moments.update(part)
    assert moments.var == pytest.approx(1.25, rel=1e-9)


def test_f4_normalised_rewards_do_not_depend_on_the_reward_models_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(64, generator=generator) + 2 for _ in range(3)]
    for subtract_mean in (True, False):
        outcomes = []
        for scale in (1.0, 10.0):
            moments = RunningMoments()
            for x in batches:
                moments.update(scale * x)
            outcomes.append(moments.normalise(scale * batches[-1], subtract_mean, eps=1e-6))
        torch.testing.assert_close(*outcomes, rtol=1e-5, atol=1e-5)
        assert outcomes[0].std().item() == pytest.approx(1, abs=0.2)
    assert outcomes[0].mean() > 1, "subtract_mean=False must keep the sign and level of the scores"


def test_f33_no_spread_divides_by_nothing() -> None:
    x = torch.tensor([3.0, 3.0])
    for moments in (RunningMoments(), _seen([3.0]), _seen([3.0, 3.0, 3.0])):
        assert moments.var == 0
        assert moments.normalise(x, subtract_mean=False, eps=1e-6).tolist() == [3, 3]
    assert _seen([3.0]).normalise(x, subtract_mean=True, eps=1e-6).tolist() == [0, 0]


def test_a_value_that_is_not_finite_is_refused_and_changes_nothing() -> None:
    moments = _seen([1.0, 2.0])
    before = moments.state_dict()
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not finite"):
            moments.update(torch.tensor([1.0, bad]))
    moments.update(torch.tensor([]))
    assert moments.state_dict() == before


def test_moments_resume_to_the_bit_through_json() -> None:
    whole = _seen([0.1, 0.7], [0.3])
    resumed = RunningMoments()
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for moments in (whole, resumed):
        moments.update(torch.tensor([0.9, -0.2]))
    assert whole.state_dict() == resumed.state_dict()


@pytest.mark.parametrize(
    "change", [{"count": -1}, {"count": None}, {"mean": "0.5"}, {"m2": "-0x1p-1"}, {"m2": "nan"}, {"mean": None}]
)
def test_damaged_moments_are_refused(change) -> None:
    moments = _seen([1.0, 2.0])
    good = moments.state_dict()
    with pytest.raises(ValueError, match="running moments"):
        moments.load_state_dict({**good, **change})
    with pytest.raises(ValueError, match="running moments"):
        moments.load_state_dict({})
    assert moments.state_dict() == good


def test_clip_scores() -> None:
    clipped, share = stats.clip_scores(torch.tensor([-12.0, -10.0, 0.5, 30.0]), 10.0)
    assert clipped.tolist() == [-10, -10, 0.5, 10] and share.item() == 0.5
    assert stats.clip_scores(torch.zeros(0), 10.0)[1].item() == 0
    with pytest.raises(ValueError, match="limit"):
        stats.clip_scores(torch.zeros(1), 0.0)


# --- ensembles ---


def test_ensemble_scores() -> None:
    """By the definitions: mean 3, population variance ((1-3)^2 + (2-3)^2 + (6-3)^2) / 3 = 14/3; members that agree lose nothing."""
    scores = torch.tensor([[1.0, 5.0], [2.0, 5.0], [6.0, 5.0]])
    assert stats.ensemble_scores(scores, "mean").tolist() == [3.0, 5.0]
    assert stats.ensemble_scores(scores, "min").tolist() == [1.0, 5.0]
    for coefficient in (0.5, 1.0, 2.0):
        found = stats.ensemble_scores(scores, "mean_minus_std", coefficient).tolist()
        assert found == pytest.approx([3.0 - coefficient * math.sqrt(14 / 3), 5.0])


# --- critic ---


def test_explained_variance(reply_mask) -> None:
    mask = reply_mask([3, 2], 4)
    target = torch.tensor([[1.0, 2.0, 3.0, torch.nan], [4.0, 5.0, 9.9, 9.9]])
    assert stats.explained_variance(target, target, mask) == 1
    assert stats.explained_variance(target + 7, target, mask) == pytest.approx(1)  # a constant error is not variance
    assert stats.explained_variance(torch.full((2, 4), 3.0), target, mask) == pytest.approx(0)
    assert stats.explained_variance(-target, target, mask) == pytest.approx(-3)  # Var(2 x) = 4 Var(x)
    assert math.isnan(stats.explained_variance(target, torch.ones(2, 4), mask))


# --- errors and win rates ---


def test_f20_win_rate_golden_draws_count_half(golden) -> None:
    g = golden["win_rate"]
    result = stats.win_rate([2] * g["wins"] + [1] * g["losses"] + [0] * g["draws"])
    assert (result.rate, result.se) == pytest.approx((46.63760896637609, 1.751619984513092), rel=1e-13)
    assert result.rate != pytest.approx(g["wrong_draws_are_losses"], abs=0.1)
    assert (result.wins, result.losses, result.draws, result.n_judged) == (370, 424, 9, 803)


def test_f20_unreadable_judgements_are_counted_and_left_out() -> None:
    result = stats.win_rate([2, None, 1, None, 0])
    assert (result.rate, result.n_judged, result.n_dropped, result.n_total) == (50, 3, 2, 5)
    assert math.isnan(stats.win_rate([None]).rate) and math.isnan(stats.win_rate([]).se)
    with pytest.raises(ValueError, match="got '2', 3"):
        stats.win_rate([1, 3, "2", 3])  # type: ignore[list-item]


def test_wilson_golden_and_edges(golden) -> None:
    for successes, n, expected in golden["wilson"]:
        assert stats.wilson_interval(successes, n, 0.95) == pytest.approx(expected, abs=1e-9)
    assert stats.wilson_interval(0, 0, 0.95) == (0, 1)
    narrow, wide = stats.wilson_interval(60, 100, 0.8), stats.wilson_interval(60, 100, 0.99)
    assert wide[0] < narrow[0] < 0.6 < narrow[1] < wide[1]
    for bad in ((3, 2, 0.95), (-1, 2, 0.95), (1, 2, 1.0)):
        with pytest.raises(ValueError, match="wilson_interval"):
            stats.wilson_interval(*bad)


# --- reward model ---


def test_preference_metrics() -> None:
    margins = torch.tensor([2.0, -1.0, 0.5, -3.0, 4.0, -0.1, -0.2, 0.0])
    labels = torch.tensor([True, True, False, False, True, False, False, True])
    got = stats.preference_metrics(margins, labels)
    expected = {"accuracy": 5.5 / 8, "label_positive_rate": 4 / 8, "positive_rate": 3.5 / 8}
    expected |= {"true_positive_rate": 2.5 / 4, "false_positive_rate": 1 / 4, "tie_rate": 1 / 8}
    assert got == pytest.approx(expected)


def test_a_reward_model_that_scores_all_alike_is_no_better_than_chance() -> None:
    """Counting margin >= 0 as right would give it 100 % on pairs stored as (chosen, rejected)."""
    got = stats.preference_metrics(torch.zeros(4), torch.ones(4, dtype=torch.bool))
    assert got["accuracy"] == 0.5 and got["tie_rate"] == 1
    assert math.isnan(got["false_positive_rate"])


def test_preference_metrics_refuse_bad_input() -> None:
    with pytest.raises(ValueError, match="labels: expected bool"):
        stats.preference_metrics(torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match="not finite"):
        stats.preference_metrics(torch.tensor([torch.nan]), torch.tensor([True]))
