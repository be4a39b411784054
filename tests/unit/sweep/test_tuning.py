"""Schedulers, asked as the drivers of a sweep ask them."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_ray.config import SweepConfig
from rlhf_ray.sweep.bases import Placed, _Alone
from rlhf_ray.sweep.tuning import scheduler_of


@pytest.mark.parametrize("scheduler", ["asha", "median_stopping"])
def test_a_trial_that_ends_before_its_first_evaluation_does_not_count(scheduler: str) -> None:
    config = SweepConfig(
        output_dir="runs/sweep",
        model_name_or_path="m",
        ppo={"data": {"train": "p.jsonl"}, "rewards": [{"function": "f.py:score"}]},
        space={"kl_coef": [0.1, 0.2]},
        scheduler=scheduler,
        grace_evaluations=1,
    )
    found: Any = scheduler_of(config)
    found.set_search_properties("score", "max")
    trials = [Placed(str(i), {}) for i in range(5)]
    for trial in trials:
        found.on_trial_add(_Alone(), trial)
    found.on_trial_complete(_Alone(), trials[0], trials[0].last_result)
    decisions = [
        found.on_trial_result(_Alone(), trial, {"training_iteration": 1, "score": score})
        for trial, score in zip(trials[1:], (3.0, 2.0, 4.0, 1.0))
    ]
    assert decisions[-1] == "STOP" and decisions[0] == "CONTINUE"
