"""Signs of over-optimisation: when they show, when they do not, and what is kept for a run that goes on."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rlhf_ray.config import PPOConfig
from rlhf_ray.roles.over_optimisation import OverOptimisation

CALM = {"response/length": 40.0, "response/repetition": 0.1, "policy/entropy": 2.0}


def job(watch: str | None = "judge", **alarm: Any) -> PPOConfig:
    return PPOConfig(
        output_dir="o",
        model_name_or_path="m",
        data={"train": "x"},  # type: ignore[arg-type]
        rewards=({"function": "f.py:f"}, {"name": "judge", "function": "f.py:g", "weight": 0.0}),  # type: ignore[arg-type]
        watch=watch,
        alarm=alarm,  # type: ignore[arg-type]
    )


def kinds(alarm: OverOptimisation, config: PPOConfig, *steps: dict[str, float]) -> list[list[str]]:
    return [[sign.kind for sign in alarm.look(config, metrics)] for metrics in steps]


def held_out(proxy: float, watch: float, error: float = 0.1) -> dict[str, float]:
    return {"eval/reward": proxy, "eval/reward/judge": watch, "eval/reward_se/judge": error}


@pytest.mark.parametrize(
    ("metric", "value", "kind"),
    [
        ("response/length", 81.0, "length"),
        ("response/length", 19.0, "length"),
        ("response/repetition", 0.31, "repetition"),
        ("policy/entropy", 0.39, "entropy"),
        ("policy/entropy", 10.1, "entropy"),
    ],
)
def test_a_band_is_left_for_two_steps_before_it_counts(metric: str, value: float, kind: str) -> None:
    """One noisy step is no sign, nor are two with a calm one between; less repetition is none at all."""
    out = {**CALM, metric: value}
    assert kinds(OverOptimisation(), job(), CALM, out, CALM, out, out, CALM, {**CALM, "response/repetition": 0.0}) == [
        [], [], [], [], [kind], [], [],
    ]  # fmt: skip


def test_what_is_maximised_rises_while_the_watch_falls_by_more_than_its_noise() -> None:
    """Two standard errors of the difference are 0.28. A watch that falls together with the proxy is a bad step, no gaming."""
    alarm = OverOptimisation()
    assert (
        kinds(alarm, job(), held_out(0.0, 1.0), held_out(1.0, 1.5), held_out(2.0, 1.3), held_out(0.5, 0.2)) == [[]] * 4
    )
    (sign,) = alarm.look(job(), held_out(2.0, 1.2))
    assert sign.kind == "watch"
    assert str(sign.problem(7)) == (
        "step 7: over-optimisation: the reward that is maximised rises and judge falls; expected eval/reward/judge above 1.217:"
        " 1.5 at its best, less 2 standard errors; got 1.2, while eval/reward rose from 1 to 2; fix: take the best checkpoint,"
        " raise kl_coef or lower learning_rate"
    )
    assert kinds(OverOptimisation(), job(watch=None), held_out(0.0, 1.0), held_out(2.0, -5.0)) == [[], []]


def test_each_sign_can_be_left_out_and_all_of_them_be_switched_off() -> None:
    loud = {"response/length": 400.0, "response/repetition": 0.9, "policy/entropy": 0.01}
    steps = (CALM | held_out(0.0, 1.0), loud, loud | held_out(1.0, 0.0))
    assert sorted(kinds(OverOptimisation(), job(), *steps)[-1]) == ["entropy", "length", "repetition", "watch"]
    none: dict[str, Any] = dict.fromkeys(("watch_errors", "length_factor", "repetition_rise", "entropy_factor"))
    assert kinds(OverOptimisation(), job(**none), *steps) == [[]] * 3
    assert kinds(OverOptimisation(), job(action="none"), *steps) == [[]] * 3
    assert kinds(OverOptimisation(), job(**{**none, "length_factor": 20.0}), *steps) == [[]] * 3


def test_a_run_that_goes_on_compares_with_what_it_did_before() -> None:
    """Without what was stored, the step after a resume would be its own yardstick."""
    alarm, out = OverOptimisation(), {**CALM, "response/length": 100.0}
    kinds(alarm, job(), CALM | held_out(0.0, 1.0 / 3), out)
    assert [s.kind for s in alarm.news(alarm.look(job(), out))] == ["length"]
    again = OverOptimisation()
    again.load_state_dict(json.loads(json.dumps(alarm.state_dict())))
    assert again == alarm and again.best["watch"] == 1.0 / 3
    assert [s.kind for s in again.look(job(), out)] == ["length"] and again.news(again.look(job(), out)) == []
    assert kinds(OverOptimisation(), job(), out) == [[]]


def test_a_policy_without_spread_at_first_has_no_band() -> None:
    flat = {"policy/entropy": 0.0}
    assert kinds(OverOptimisation(), job(), flat, {"policy/entropy": 1.0}, {"policy/entropy": 1.0}) == [[], [], []]
