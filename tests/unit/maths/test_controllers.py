"""KL controllers: both published rules, their limits, and a state that resumes to the bit."""

from __future__ import annotations

import json
import math

import pytest

from rlhf_ray.config.stages import CLIPPED_ERROR
from rlhf_ray.maths.controllers import (
    MAX_ERROR,
    AdaptiveKLController,
    FixedKLController,
    HorizonKLController,
    make_controller,
)


def _make(kind: str):
    return make_controller(kind, kl_coef=0.2, kl_target=6.0, kl_horizon=10_000.0, kl_step_size=0.1)


def test_fixed_never_moves() -> None:
    controller = FixedKLController(0.2)
    assert [controller.update(kl, 256) for kl in (-3.0, 0.0, 500.0)] == [0.2] * 3


def test_adaptive_golden(golden) -> None:
    for measured, expected in golden["controllers"]["adaptive"]["cases"]:
        for n_samples in (1, 256, 10**6):  # independent of the batch size
            controller = AdaptiveKLController(0.2, 6.0, 0.1)
            assert controller.update(measured, n_samples) == pytest.approx(expected, rel=1e-14)
            assert controller.value == pytest.approx(expected, rel=1e-14)


def test_horizon_golden(golden) -> None:
    g = golden["controllers"]["horizon"]
    for measured, expected in g["cases"]:
        controller = HorizonKLController(0.2, 6.0, g["horizon"])
        assert controller.update(measured, g["n_samples"]) == pytest.approx(expected, rel=1e-14)


def test_published_values() -> None:
    adaptive = {12.0: 0.204, 6.0: 0.2, 6.6: 0.202, 3.0: 0.196}
    horizon = {12.0: 0.201024, 6.6: 0.200512, 3.0: 0.198976}
    assert {kl: _make("adaptive").update(kl, 256) for kl in adaptive} == pytest.approx(adaptive, rel=1e-12)
    assert {kl: _make("horizon").update(kl, 256) for kl in horizon} == pytest.approx(horizon, rel=1e-12)


@pytest.mark.parametrize("kind", ["adaptive", "horizon"])
def test_steps_compound_and_a_negative_kl_lowers_beta(kind) -> None:
    controller = _make(kind)
    first = controller.update(12.0, 256)
    assert controller.update(12.0, 256) == pytest.approx(first * first / 0.2)
    assert _make(kind).update(-50.0, 256) == _make(kind).update(0.0, 256) < 0.2


@pytest.mark.parametrize("kind", ["fixed", "adaptive", "horizon"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_measured_kl_that_is_not_finite_is_refused_and_changes_nothing(kind, bad) -> None:
    controller = _make(kind)
    with pytest.raises(ValueError, match="measured_kl: expected a finite number"):
        controller.update(bad, 256)
    assert controller.value == 0.2


@pytest.mark.parametrize("kind", ["fixed", "adaptive", "horizon"])
def test_state_goes_through_json_and_resumes_to_the_bit(kind) -> None:
    whole, resumed = _make(kind), _make(kind)
    kls = [7.3, 2.1, 11.0, 5.9, 6.05]
    for measured in kls[:2]:
        whole.update(measured, 100)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for measured in kls[2:]:
        assert whole.update(measured, 100) == resumed.update(measured, 100)
    assert whole.state_dict() == resumed.state_dict()


@pytest.mark.parametrize(
    "state",
    [{}, {"kind": "fixed", "value": "0x1p-3"}, {"kind": "adaptive"}, {"kind": "adaptive", "value": "abc"}]
    + [{"kind": "adaptive", "value": v} for v in ("nan", "-0x1p-3", "inf", "0.2", 0.2, None)],
)
def test_a_damaged_or_foreign_state_is_refused_and_changes_nothing(state) -> None:
    controller = _make("adaptive")
    with pytest.raises(ValueError, match="kl_controller state"):
        controller.load_state_dict(state)
    assert controller.value == 0.2


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="kl_coef"):
        FixedKLController(-0.1)
    with pytest.raises(ValueError, match="kl_coef"):
        FixedKLController(math.nan)
    with pytest.raises(ValueError, match="kl_target"):
        AdaptiveKLController(0.2, 0.0, 0.1)
    with pytest.raises(ValueError, match="kl_step_size"):
        AdaptiveKLController(0.2, 6.0, 0.0)
    with pytest.raises(ValueError, match="kl_horizon"):
        HorizonKLController(0.2, 6.0, -1.0)
    with pytest.raises(ValueError, match="kl_controller: expected one of fixed, adaptive, horizon, got 'adaptve'"):
        _make("adaptve")


def test_beta_cannot_turn_negative() -> None:
    """A horizon shorter than a fifth of the step would multiply beta by a negative number at low KL."""
    with pytest.raises(ValueError, match="beta could turn negative"):
        AdaptiveKLController(0.2, 6.0, 5.0)
    controller = HorizonKLController(0.2, 6.0, 51.2)
    with pytest.raises(ValueError, match="beta could turn negative"):
        controller.update(6.0, 256)
    assert HorizonKLController(0.2, 6.0, 51.3).update(-100.0, 256) > 0


def test_a_job_file_is_held_to_the_same_bounds() -> None:
    """What the rules of a job file let through, no step refuses."""
    assert CLIPPED_ERROR == MAX_ERROR
