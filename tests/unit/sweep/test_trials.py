"""From a sweep's job file to the PPO jobs of its trials."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config import SweepConfig
from rlhf_ray.errors import ConfigError
from rlhf_ray.sweep.planning import plan_sweep
from rlhf_ray.sweep.sweep import sweep
from rlhf_ray.sweep.trials import check_size, evaluation_of, job_of, planned, setting_name


def config(**changes: Any) -> SweepConfig:
    fields: dict[str, Any] = {
        "output_dir": "runs/sweep",
        "model_name_or_path": "m",
        "learner": {"num_gpus": 0.5},
        "ppo": {"data": {"train": "p.jsonl"}, "rewards": [{"function": "f.py:score"}], "value": {"warmup_steps": 2}},
        "space": {"kl_coef": [0.1, 0.2], "value.warmup_steps": [0, 1]},
    }
    return SweepConfig(**{**fields, **changes})


def test_settings_times_seeds_in_order() -> None:
    trials = planned(config(seeds=(3, 5)))
    assert [(t.settings["kl_coef"], t.settings["value.warmup_steps"], t.seed) for t in trials] == [
        (c, w, s) for c in (0.1, 0.2) for w in (0, 1) for s in (3, 5)
    ]
    assert len({t.id for t in trials}) == 8
    assert all(t.folder == Path("runs/sweep/trials").absolute() / t.id for t in trials)


def test_a_trial_is_the_shared_job_with_its_settings_and_seed() -> None:
    trial = planned(config(seeds=(7,)))[1]
    job = job_of(config(seeds=(7,)), trial)
    assert (job.kl_coef, job.value.warmup_steps, job.seed, job.resume) == (0.1, 1, 7, "auto")
    assert (job.learner.num_gpus, job.output_dir) == (0.5, str(trial.folder))


def test_a_dpo_trial_is_measured_on_the_base_and_prompts_that_it_trained_with() -> None:
    of_the_base = {"dtype": "bfloat16", "load_in_4bit": True, "cpu_offload": True, "attn_implementation": "eager"}
    of_the_base["lora_compute_dtype"] = "bfloat16"
    of_prompts = {"template_date": "2026-01-31T09:00:00", "chat_template_kwargs": {"enable_thinking": False}}
    measured = {"data": {"train": "p.jsonl"}, "rewards": [{"function": "f.py:score"}]}
    dpo = {"data": {"train": "p.jsonl"}, **of_the_base, **of_prompts}
    space = {"template": ["none", "alpaca"], "attn_implementation": ["eager", "sdpa"]}
    given = config(ppo=None, dpo=dpo, evaluate=measured, metric="eval/reward", space=space)
    for trial in planned(given):
        measure = evaluation_of(given, trial, job_of(given, trial))
        expected = {**of_the_base, **of_prompts, **trial.settings}
        assert {name: getattr(measure, name) for name in expected} == expected


def test_what_the_job_says_of_confirming_stays() -> None:
    for confirm in (True, False):
        filled = config().confirming(confirm)
        assert job_of(filled, planned(filled)[0]).confirm_held_out is confirm
        given = config(ppo={**config().ppo, "confirm_held_out": not confirm})
        assert given.confirming(confirm) is given
    varied = config(space={"confirm_held_out": [True, False]})
    assert varied.confirming(True) is varied


def test_what_watches_judges_the_sweep_and_far_policies_do_not_win() -> None:
    watched = config(ppo={**config().ppo, "watch": "gold"})
    assert (config().metric, watched.metric) == ("eval/reward", "eval/reward/gold")
    assert config(ppo={**config().ppo, "watch": "gold"}, metric="eval/reward").metric == "eval/reward"
    assert config().kl_cap == 10.0 and config(kl_cap=None).kl_cap is None


def test_names_follow_from_the_settings_alone() -> None:
    assert setting_name({"a": 1, "b": 2}) == setting_name({"b": 2, "a": 1}) != setting_name({"a": 1, "b": 3})


def test_random_settings_are_the_same_at_every_start() -> None:
    random = config(search="random", num_samples=5, space={"kl_coef": {"loguniform": [0.01, 1]}}, seeds=(0, 1))
    assert len(planned(random)) == 10 and planned(random) == planned(random)
    few = config(search="random", num_samples=50, space={"kl_coef": [0.1, 0.2]})
    assert len(planned(few)) == 2, "a setting that is drawn twice is one setting"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {}}, "space: is empty"),
        ({"seeds": (1, 1)}, "seeds: repeat"),
        ({"seed": 3}, "a sweep has seeds"),
        ({"ppo": {"output_dir": "x"}}, "ppo.output_dir: each trial writes"),
        ({"space": {"seed": [1, 2]}}, "ppo.seed: set seeds at the top"),
        ({"metric": "reward/mean"}, "metric"),
        ({"metric": "eval/confirm/reward"}, "metric: eval/confirm/. are the prompts that confirm the winner"),
    ],
)
def test_rules(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"search": "random", "num_samples": 10**6, "space": {"kl_coef": {"uniform": [0, 1]}}},
            "num_samples: .* 1,000,000 x 1;",
        ),
        (
            {
                "search": "optuna",
                "num_samples": 200,
                "space": {"kl_coef": {"uniform": [0, 1]}},
                "seeds": tuple(range(51)),
            },
            "200 x 51;",
        ),
        (
            {"space": {f"f{i}": list(range(10)) for i in range(60)}},
            "^space: the sweep has more trials than can be run; expected",
        ),
    ],
)
def test_more_trials_than_can_be_run_are_refused_before_they_are_listed(changes: dict[str, Any], told: str) -> None:
    given = config(**changes)
    for start in (check_size, sweep, plan_sweep):
        with pytest.raises(ConfigError, match=told):
            start(given)


def test_a_random_search_stops_drawing_when_it_has_all_settings() -> None:
    """In the order in which they are drawn, as ever."""
    few = config(search="random", num_samples=50)
    many = config(search="random", num_samples=10**8)
    assert len(planned(few)) == 4 and [t.settings for t in planned(many)] == [t.settings for t in planned(few)]


def test_a_search_over_few_settings_may_ask_for_many() -> None:
    check_size(config(search="optuna", num_samples=10**6))
    check_size(config(seeds=tuple(range(2500))))
