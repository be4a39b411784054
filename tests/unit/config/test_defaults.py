"""What a job leaves open: today's defaults, those of older versions, and who keeps which."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config import (
    STAGES,
    EvaluateConfig,
    JobFields,
    PipelineConfig,
    PPOConfig,
    RewardConfig,
    SFTConfig,
    SweepConfig,
)
from rlhf_ray.config.defaults import FOLLOWS, VERSION, VERSION_1
from rlhf_ray.config.load import load_any, load_dict
from rlhf_ray.config.resolved import to_dict, written_out
from rlhf_ray.config.schema import describe
from rlhf_ray.config.stored import load_stored
from rlhf_ray.config.unused import unused_fields
from rlhf_ray.errors import ConfigError
from rlhf_ray.launch.begun import with_defaults_as_begun
from rlhf_ray.stages.demo import demo_config, write_jobs
from rlhf_ray.storage.run_folder import config_changes, create_run
from rlhf_ray.sweep import trials

PROJECT = Path(__file__).parents[3]
JOB: dict[str, Any] = {"output_dir": "o", "model_name_or_path": "m", "data": {"train": "x.jsonl"}}
PPO: dict[str, Any] = {**JOB, "rewards": [{"run": "r"}, {"name": "rule", "function": "f.py:f"}]}
COMPARED: dict[str, Any] = {**JOB, "policies": [{"name": "b", "policy": "base"}]}
OF_NO_EFFECT = {"defaults_version", "max_prompt_length", "allow_chance_rewards"}
"""Fields that differ between versions and change no number: max_prompt_length where max_length, or the model's context, leaves
less room; allow_chance_rewards is asked before the first step."""


def test_those_for_1b_to_8b() -> None:
    """Issue 15, F20. Before: the policy's rate, 0.2, 0, false, 1e-5 everywhere, 128 and no limit."""
    plain, chat = PPOConfig(**PPO), PPOConfig(**PPO, template="chat")
    assert plain.value.learning_rate == pytest.approx(5 * 2e-5)
    assert PPOConfig(**PPO, learning_rate=1e-4).value.learning_rate == pytest.approx(5e-4)
    assert PPOConfig(**PPO, value={"learning_rate": 3e-5}).value.learning_rate == 3e-5
    assert (plain.cliprange_value, plain.value.warmup_steps) == (None, 0.05)
    assert [reward.normalize for reward in plain.rewards] == [None, None]
    assert (plain.adam_epsilon, SFTConfig(**JOB).adam_epsilon, RewardConfig(**JOB).adam_epsilon) == (1e-5, 1e-8, 1e-8)
    assert (plain.response_length, chat.response_length) == (128, 512)
    assert EvaluateConfig(**COMPARED, template="chat").response_length == 512
    assert (plain.max_prompt_length, PPOConfig(**PPO, max_length=4096).max_prompt_length) == (1024, None)


def test_a_reply_to_a_chat_template_is_no_longer_than_a_small_max_length_has_room_for() -> None:
    lengths = [PPOConfig(**PPO, template="chat", max_length=limit).response_length for limit in (512, 1023, 1024, 2048)]
    assert lengths == [128, 128, 512, 512]


def test_what_follows_from_another_field_does_not_count_as_set() -> None:
    """A job that is written on (`exclude_unset`) and changed then has the default beside its new values."""
    job = PPOConfig(**PPO, template="chat", temperature=0.7, advantage_estimator="gae")
    assert job.eval_sampling.temperature == 0.7
    assert job.model_dump(exclude_unset=True).keys() == {*PPO, "template", "temperature", "advantage_estimator"}
    faster = PPOConfig(**{**job.model_dump(exclude_unset=True), "learning_rate": 1.0})
    assert faster.value.learning_rate == 5.0
    assert PPOConfig(**to_dict(job)) == job


def test_without_a_value_model_it_has_no_learning_rate() -> None:
    job = PPOConfig(**PPO, advantage_estimator="rloo", num_generations=2)
    assert job.value.learning_rate is None and unused_fields(job) == []


@pytest.mark.parametrize("rate", ["0.1", -1.0, float("inf"), True, 1e308])
def test_a_bad_learning_rate_is_refused_for_what_it_is(rate: Any) -> None:
    values = {**PPO, "learning_rate": rate}
    if rate == 1e308:  # five times that is no number
        assert PPOConfig(**values).value.learning_rate == rate
        return
    with pytest.raises(ConfigError) as caught:
        load_dict(PPOConfig, values)
    assert [problem.where for problem in caught.value.problems] == ["learning_rate"]


# ------------------------------------------------------------------------------------------------------- older versions


def test_version_1_has_the_defaults_that_it_had() -> None:
    """As at the last commit before version 2."""
    job = PPOConfig(**PPO, template="chat", learning_rate=3e-4, defaults_version=1)
    assert (job.value.learning_rate, job.value.warmup_steps, job.cliprange_value) == (3e-4, 0, 0.2)
    assert (job.response_length, job.max_prompt_length, job.adam_epsilon) == (128, None, 1e-5)
    assert [reward.normalize for reward in job.rewards] == [False, None]
    assert (
        SFTConfig(**JOB, defaults_version=1).adam_epsilon
        == RewardConfig(**JOB, defaults_version=1).adam_epsilon
        == 1e-5
    )
    assert EvaluateConfig(**COMPARED, template="chat", defaults_version=1).response_length == 128
    said = PPOConfig(**PPO, cliprange_value=0.5, value={"warmup_steps": 3}, defaults_version=1)
    assert (said.cliprange_value, said.value.warmup_steps, said.value.learning_rate) == (0.5, 3, 2e-5)


def test_a_stored_job_that_does_not_say_is_of_version_1() -> None:
    """Its null was the policy's rate; what it lacks was off. One that says 2 is read as it is."""
    old = to_dict(PPOConfig(**PPO, defaults_version=1))
    del old["defaults_version"], old["max_prompt_length"]
    old["value"]["learning_rate"] = None
    assert load_stored(PPOConfig, old, "config.yaml") == PPOConfig(**PPO, defaults_version=1)
    new = to_dict(PPOConfig(**PPO))
    assert new["defaults_version"] == VERSION and load_stored(PPOConfig, new, "config.yaml") == PPOConfig(**PPO)


def test_a_default_of_the_runs_version_is_not_told_to_have_no_effect() -> None:
    job = PPOConfig(**PPO, advantage_estimator="rloo", num_generations=2, defaults_version=1)
    assert PPOConfig(**to_dict(job)) == job and unused_fields(PPOConfig(**to_dict(job))) == []


def test_chunks_hold_whole_groups_but_in_runs_of_before() -> None:
    grouped = {**PPO, "advantage_estimator": "rloo", "num_generations": 6, "rollout_batch_size": 240}
    assert PPOConfig(**grouped).chunk_rows == 60 and PPOConfig(**PPO).chunk_rows == 64
    assert PPOConfig(**grouped, defaults_version=3).chunk_rows == 64
    assert PPOConfig(**grouped, rollout_chunk_size=4).chunk_rows == 4, "no group fits"


@pytest.mark.parametrize("version", [0, VERSION + 1])
def test_a_version_that_is_none_is_refused(version: int) -> None:
    with pytest.raises(ConfigError, match="defaults_version: out of range"):
        load_dict(SFTConfig, {**JOB, "defaults_version": version})


def test_a_job_goes_on_under_the_defaults_that_it_was_begun_with(tmp_path: Path) -> None:
    """Given again as it was, to a folder of version 1. What the job says of the version holds."""
    values = {**PPO, "output_dir": str(tmp_path / "run"), "resume": "auto", "learning_rate": 1e-4}
    assert with_defaults_as_begun(PPOConfig(**values)) == PPOConfig(**values)
    old = to_dict(PPOConfig(**values, defaults_version=1))
    del old["defaults_version"]
    create_run(values["output_dir"], "ppo", old, "auto")
    assert with_defaults_as_begun(PPOConfig(**values)) == PPOConfig(**values, defaults_version=1)
    explicit = PPOConfig(**values, defaults_version=2)
    assert with_defaults_as_begun(explicit) == explicit
    (tmp_path / "run" / "config.yaml").unlink()  # killed before it was written
    assert with_defaults_as_begun(PPOConfig(**values)) == PPOConfig(**values)


def test_a_default_is_not_changed_in_passing() -> None:
    """A changed default turns half-done runs into other ones. Change it with VERSION counted up and the old value in VERSION_1's
    place for the version before; then tests/golden/defaults.json, by hand."""
    golden = json.loads((PROJECT / "tests" / "golden" / "defaults.json").read_text())
    assert golden["version"] == VERSION
    for stage, fields in golden["fields"].items():
        found = {row.name: row.default for row in describe(STAGES[stage])}
        assert {name: found.get(name) for name in fields} == fields, stage
    assert all(
        any(row.name == name for cls in STAGES.values() for row in describe(cls)) for name in (*VERSION_1, *FOLLOWS)
    )


# ---------------------------------------------------------------------------------------- what pipelines and sweeps keep


def pipelines(folder: Path) -> list[PipelineConfig]:
    found = [demo_config(folder), PipelineConfig(**CHAIN)]
    for name in ("alpaca_8b_24gb", "stories", "tiny"):
        _, job = load_any(PROJECT / "jobs" / f"{name}.yaml", check_files=False)
        assert isinstance(job, PipelineConfig)
        found.append(job)
    return found


CHAIN: dict[str, Any] = {
    "output_dir": "runs/chain",
    "model_name_or_path": "m",
    "template": "chat",
    "copy_to": "s3://bucket/chain",
    "sft": {"data": {"train": "s"}, "lora": {"preset": "alpaca_lora_rlhf"}, "seed": 3},
    "reward": {"data": {"train": "r"}},
    "ppo": {"data": {"train": "p"}, "rewards": [{"weight": 0.5}, {"name": "f", "function": "f.py:f"}], "kl_coef": 0.1},
    "evaluate": {"rewards": [{"name": "g", "function": "f.py:g", "weight": 0.0}], "sampling": {"top_p": 0.9}},
}


@pytest.mark.parametrize("version", [1, 2])
def test_a_pipeline_writes_out_its_stages(tmp_path: Path, version: int) -> None:
    """Constants stand in it, its stages are the same, and a default that follows still does."""
    for job in pipelines(tmp_path):
        job = PipelineConfig(**{**job.model_dump(exclude_unset=True), "defaults_version": version})
        kept = json.loads(json.dumps(written_out(job)))
        again = load_stored(PipelineConfig, kept, "config.yaml")
        for stage in job.stages:
            assert to_dict(again.stage_config(stage)) == to_dict(job.stage_config(stage))
        assert written_out(again) == kept
        usual = {"ppo": ("cliprange_value", "kl_penalty", "gamma"), "sft": ("adam_epsilon",), "reward": ("optim",)}
        assert all(name in kept[stage] for stage, names in usual.items() for name in names)
    kept = written_out(PipelineConfig(**CHAIN, defaults_version=version))
    assert "learning_rate" not in kept["ppo"]["value"] and "response_length" not in kept["ppo"]
    assert (
        "output_dir" not in kept["sft"]
        and "sft" not in kept["ppo"]
        and kept["ppo"]["rewards"] == CHAIN["ppo"]["rewards"]
    )


def test_a_reward_of_a_pipeline_that_names_no_source_is_that_of_its_reward_stage() -> None:
    job = PipelineConfig(**CHAIN)
    ours = job.stage_config("ppo").rewards  # type: ignore[attr-defined]
    assert [(r.name, r.run, r.function, r.weight) for r in ours] == [
        ("reward", "runs/chain/reward", None, 0.5),
        ("f", None, "f.py:f", 1.0),
    ]
    compared = job.stage_config("evaluate").rewards  # type: ignore[attr-defined]
    assert [r.name for r in compared] == ["reward", "f", "g"] and compared[0].run == "runs/chain/reward"
    alone = {**CHAIN, "stages": ["sft", "ppo"], "reward": {}, "evaluate": {}}
    with pytest.raises(ConfigError, match="exactly one of run, ensemble, model, function"):
        load_dict(PipelineConfig, alone)


def test_a_sweep_writes_out_what_its_trials_share() -> None:
    space = {"learning_rate": [1e-5, 1e-4], "advantage_estimator": ["gae", "grpo"], "lora.preset": ["alpaca_lora_rlhf"]}
    shared = {"data": {"train": "p"}, "rewards": [{"run": "r"}], "num_generations": 2, "lora": {"lora_dropout": 0.0}}
    for version in (1, 2):
        job = SweepConfig(output_dir="s", model_name_or_path="m", ppo=shared, space=space, defaults_version=version)
        planned = trials.planned(job)
        kept = json.loads(json.dumps(trials.written_out(job, trials.job_of(job, planned[-1]))))
        again = load_stored(SweepConfig, kept, "config.yaml")
        assert trials.planned(again) == planned
        for trial in planned:
            assert to_dict(trials.job_of(again, trial)) == to_dict(trials.job_of(job, trial))
        assert (
            kept["ppo"]["gamma"] == 1.0 and "cliprange_value" in kept["ppo"] and kept["ppo"]["lora"] == shared["lora"]
        )
        rates = {trials.job_of(again, trial).value.learning_rate for trial in planned}
        times = 5 if version == 2 else 1
        assert rates == {None, times * 1e-5, times * 1e-4}


@pytest.mark.parametrize("name", ["demo", "demo/jobs/ppo", "demo/jobs/sweep", "jobs/stories.yaml", "jobs/tiny.yaml"])
def test_jobs_whose_figures_are_told_do_not_depend_on_the_version(name: str, tmp_path: Path) -> None:
    """They were measured under version 1, and say what differs from it."""
    jobs: list[tuple[JobFields, JobFields]] = []
    if name.startswith("demo/"):
        write_jobs(tmp_path, demo_config(tmp_path))
        place = tmp_path / f"{name.removeprefix('demo/')}.yaml"
    else:
        place = PROJECT / name
    config: Any = demo_config(tmp_path) if name == "demo" else load_any(place, stage=None, check_files=False)[1]
    older = type(config)(**{**config.model_dump(exclude_unset=True), "defaults_version": 1})
    if isinstance(config, PipelineConfig):
        jobs = [(config.stage_config(stage), older.stage_config(stage)) for stage in config.stages]
    elif isinstance(config, SweepConfig):
        jobs = [(trials.job_of(config, t), trials.job_of(older, t)) for t in trials.planned(config)]
    else:
        jobs = [(config, older)]
    for now, then in jobs:
        assert config_changes(to_dict(then), to_dict(now)).keys() <= OF_NO_EFFECT
