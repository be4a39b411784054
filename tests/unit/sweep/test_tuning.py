"""Schedulers, asked as the drivers of a sweep ask them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config import SweepConfig
from rlhf_ray.errors import InvariantError
from rlhf_ray.sweep.bases import Placed, _Alone
from rlhf_ray.sweep.trial import TrialConsole
from rlhf_ray.sweep.tuning import scheduler_of


def asked(scheduler: str) -> Any:
    config = SweepConfig(
        output_dir="runs/sweep",
        model_name_or_path="m",
        ppo={"data": {"train": "p.jsonl"}, "rewards": [{"function": "f.py:score"}]},
        space={"kl_coef": [0.1, 0.2]},
        scheduler=scheduler,
        grace_evaluations=1,
        reduction_factor=2,
    )
    found: Any = scheduler_of(config)
    found.set_search_properties("score", "max")
    return found


def train(folder: Path, steps: range, report: Callable[[dict[str, Any]], None]) -> None:
    """What a start of the PPO stage says and writes that trains `steps`: its score is the step."""
    folder.mkdir(exist_ok=True)
    console = TrialConsole("eval/reward", 100, report, folder)
    with open(folder / "metrics.jsonl", "a") as file:
        for step in steps:
            values = {"reward/mean": 0.0} | ({"eval/reward": float(step)} if step % 2 == 0 else {})
            file.write(json.dumps({"step": step, **values}) + "\n")
            file.flush()
            console.emit({"kind": "metrics", "step": step, "values": values})


def test_an_evaluation_without_the_reward_that_is_maximised_is_one(tmp_path: Path) -> None:
    """It applies to no held-out reply: a trial is judged by another reward, or ends saying that it cannot be judged."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "eval/length": 9.0, "eval/reward/gold": 0.5}\n')
    told: list[dict[str, Any]] = []
    event = {"kind": "metrics", "step": 4, "values": {"eval/length": 8.0, "eval/reward/gold": 0.7}}
    TrialConsole("eval/reward/gold", 8, told.append, tmp_path).emit(event)
    assert [(row["score"], row["step"], row["evaluation"]) for row in told] == [(0.7, 4, 2)]
    with pytest.raises(
        InvariantError, match="metric: is never reported in this job; expected eval/length, eval/reward/gold"
    ):
        TrialConsole("eval/reward", 8, told.append, tmp_path).emit(event)


@pytest.mark.parametrize("scheduler", ["asha", "median_stopping"])
def test_a_trial_that_is_resumed_is_as_old_as_its_run(tmp_path: Path, scheduler: str) -> None:
    """Of two trials with one learning curve one goes on from its 8th evaluation: the other one's first is not compared with it."""
    found, told = asked(scheduler), []
    resumed, fresh = Placed("resumed", {}), Placed("fresh", {})
    for trial in (resumed, fresh):
        found.on_trial_add(_Alone(), trial)

    def judged(trial: Placed, report: dict[str, Any]) -> None:
        told.append((trial.trial_id, report["evaluation"], found.on_trial_result(_Alone(), trial, report)))

    train(tmp_path / "resumed", range(17), lambda report: None)
    train(tmp_path / "resumed", range(17, 21), lambda report: judged(resumed, report))
    train(tmp_path / "fresh", range(5), lambda report: judged(fresh, report))
    assert told == [(n, e, "CONTINUE") for n, e in (("resumed", 9), ("resumed", 10), ("fresh", 1), ("fresh", 2))]


@pytest.mark.parametrize("scheduler", ["asha", "median_stopping"])
def test_a_trial_that_ends_before_its_first_evaluation_does_not_count(scheduler: str) -> None:
    found = asked(scheduler)
    trials = [Placed(str(i), {}) for i in range(5)]
    for trial in trials:
        found.on_trial_add(_Alone(), trial)
    found.on_trial_complete(_Alone(), trials[0], trials[0].last_result)
    decisions = [
        found.on_trial_result(_Alone(), trial, {"evaluation": 1, "score": score})
        for trial, score in zip(trials[1:], (3.0, 2.0, 4.0, 1.0))
    ]
    assert decisions[-1] == "STOP" and decisions[0] == "CONTINUE"
