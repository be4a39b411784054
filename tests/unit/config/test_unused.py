"""Fields that change nothing beside the others: refused in a job file, told by every other way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rlhf_ray.config import PPOConfig, SFTConfig
from rlhf_ray.config.load import load_dict
from rlhf_ray.config.unused import unused_fields

JOB = "output_dir: runs/ppo\nmodel_name_or_path: base\ndata: {train: prompts.jsonl}\nrewards: [{run: runs/reward}]\n"
RLOO = "advantage_estimator: rloo\nnum_generations: 2\n"

# (lines, field, words of the reason); without the first line's condition each field is fine
UNUSED = [
    (
        RLOO + "value: {warmup_steps: 3}",
        "value.warmup_steps",
        "with advantage_estimator rloo, which has no value model",
    ),
    (RLOO + "value: {learning_rate: 2.0e-4}", "value.learning_rate", "rloo"),
    (RLOO + "lam: 0.9", "lam", "no token rewards"),
    (RLOO + "gamma: 0.9", "gamma", "rloo"),
    (RLOO + "whiten_rewards: true", "whiten_rewards", "rloo"),
    (RLOO + "cliprange_value: 0.2", "cliprange_value", "rloo"),
    (RLOO + "bootstrap_truncated: true", "bootstrap_truncated", "rloo"),
    (RLOO + "scale_rewards: none", "scale_rewards", "set grpo"),
    (RLOO + "reward_baseline: 1", "reward_baseline", "compares replies to one prompt"),
    ("value: {adapter: shared, lora: {r: 4}}", "value.lora", "with value.adapter shared"),
    ("kl_target: 3", "kl_target", "with kl_controller fixed"),
    ("kl_controller: adaptive\nkl_horizon: 5", "kl_horizon", "with kl_controller adaptive"),
    ("kl_controller: horizon\nkl_step_size: 0.5", "kl_step_size", "with kl_controller horizon"),
    ("kl_controller: adaptive\nkl_coef: 0", "kl_controller", "with kl_coef 0, which it multiplies and so never moves"),
    ("kl_controller: adaptive\nkl_penalty: none", "kl_controller", "with kl_penalty none"),
    ("use_kl_loss: true\nkl_penalty: none", "use_kl_loss", "with kl_penalty none"),
    ("ref_model_sync_steps: 5\nkl_penalty: none", "ref_model_sync_steps", "with kl_penalty none"),
    ("ref_model_sync_steps: 5\nkl_coef: 0", "ref_model_sync_steps", "with kl_coef 0"),
    ("ref_model_sync_resets_optimizer: true", "ref_model_sync_resets_optimizer", "without ref_model_sync_steps"),
    ("ptx_data: {train: sft.jsonl}", "ptx_data", "with ptx_coef 0"),
    ("overlong_penalty: 0.5", "overlong_penalty", "without overlong_buffer"),
    ("num_ppo_epochs: 1\nnum_mini_batches: 1\ntarget_kl: 0.1", "target_kl", "one optimizer step per rollout"),
    ("num_ppo_epochs: 1\nnum_mini_batches: 1\nmax_clip_fraction: 0.1", "max_clip_fraction", "every ratio is 1"),
    *(
        (f"num_ppo_epochs: 1\nnum_mini_batches: 1\n{field}: {value}", field, "with one optimizer step per rollout")
        for field, value in (("cliprange", 0.1), ("cliprange_high", 0.28), ("dual_clip", 3), ("cliprange_value", 0.3))
    ),
    ("kl_penalty: none\nkl_coef: 0.3", "kl_coef", "with kl_penalty none"),
    ("kl_cap: 3\neval_sampling: {do_sample: false}", "kl_cap", "and so measure no KL"),
    ("kl_cap: 3\neval_sampling: {top_p: 0.9}", "kl_cap", "and so measure no KL"),
    ("importance_sampling_cap: 3", "importance_sampling_cap", "with max_staleness 0"),
    ("rollout: {kv_cache_gb: 2}", "rollout.kv_cache_gb", "with rollout.engine builtin"),
    ("rollout: {enforce_eager: true}", "rollout.enforce_eager", "with rollout.engine builtin"),
    (
        "placement: split\nrollout: {engine: vllm, enable_sleep_mode: true}",
        "rollout.enable_sleep_mode",
        "where nobody shares the engine's GPU",
    ),
    ("bootstrap_truncated: true\nmissing_eos_penalty: 2", "missing_eos_penalty", "leaves out the score"),
    ("data: {train: prompts.jsonl, held_out_fraction: 0}\neval_steps: 3", "eval_steps", "no prompt is held out"),
    ("data: {train: prompts.jsonl, held_out_fraction: 0}\nkl_cap: 3", "kl_cap", "no prompt is held out"),
    ("alarm: {watch_errors: 3}", "alarm.watch_errors", "without watch"),
    ("alarm: {action: none, length_factor: 3}", "alarm.length_factor", "with alarm.action none"),
    ("lr_scheduler_type: constant\nmin_lr_ratio: 0.5", "min_lr_ratio", "which does not decay"),
    ("optim: adafactor\nadam_beta1: 0.8", "adam_beta1", "with optim adafactor"),
    ("template_date: '2024-01-01'", "template_date", "with template alpaca"),
    ("data: {train: p.jsonl, eval: q.jsonl, held_out_fraction: 0.2}", "data.held_out_fraction", "with data.eval"),
    ("data: {train: p.jsonl, held_out_fraction: 0, eval_max_rows: 5}", "data.eval_max_rows", "nothing is held out"),
    ("data: {train: p.jsonl, mix_seed: 7}", "data.mix_seed", "without data.weights"),
]


def job(lines: str) -> str:
    return (JOB.replace("data: {train: prompts.jsonl}\n", "") if lines.startswith("data:") else JOB) + lines + "\n"


@pytest.mark.parametrize(("lines", "field", "why"), UNUSED, ids=[f"{f} {w}"[:40] for _, f, w in UNUSED])
def test_a_job_file_with_a_field_that_does_nothing_is_refused(
    lines: str, field: str, why: str, complaints: Callable[..., list[str]]
) -> None:
    (line,) = complaints("ppo", job(lines))
    assert f": {field}: has no effect " in line and why in line


@pytest.mark.parametrize(("lines", "field", "why"), UNUSED, ids=[f"{f} {w}"[:40] for _, f, w in UNUSED])
def test_the_same_field_alone_is_fine_or_the_same_as_its_default(
    lines: str, field: str, why: str, loaded: Callable[..., Any]
) -> None:
    """Written out in full, with every default, no job is refused."""
    config = loaded("ppo", JOB + (RLOO if lines.startswith(RLOO) else ""))
    assert unused_fields(config) == []
    assert unused_fields(PPOConfig(**config.model_dump())) == []


def test_no_penalty_at_a_coefficient_of_0_is_said_twice_and_true(loaded: Callable[..., Any]) -> None:
    assert unused_fields(loaded("ppo", JOB + "kl_penalty: none\nkl_coef: 0\n")) == []


def test_what_does_not_come_from_a_file_is_told(loaded: Callable[..., Any]) -> None:
    """A sweep over estimators has one section for the value model; a stored run is resumed as it is."""
    values = {**loaded("ppo", JOB).model_dump(), "advantage_estimator": "rloo", "num_generations": 2, "lam": 0.5}
    config = load_dict(PPOConfig, values)
    assert [str(found) for found in unused_fields(config)] == [
        "lam: has no effect with advantage_estimator rloo, which has no value model and no token rewards; drop it, or set gae"
    ]


def test_sft_has_the_rules_of_its_optimizer_and_of_its_loss() -> None:
    fields = {"output_dir": "x", "model_name_or_path": "m", "data": {"train": "d"}, "optim": "adafactor"}
    assert [found.field for found in unused_fields(SFTConfig(**fields, adam_beta2=0.9))] == ["adam_beta2"]
    fields |= {"data": {"train": "d", "disjoint_stages": True}, "train_on_inputs": True, "train_on_turns": "last"}
    assert [found.field for found in unused_fields(SFTConfig(**fields))] == ["data.disjoint_stages", "train_on_turns"]
    without = {"train": "d", "eval": "e", "held_out_fraction": 0.0}
    assert not unused_fields(SFTConfig(**{**fields, "data": without, "train_on_turns": "all"}))
    kept = {"train": "d", "eval": "e", "held_out_fraction": 0.2, "held_out_prompts": "p"}
    assert not unused_fields(SFTConfig(**{**fields, "data": kept, "train_on_inputs": False}))


def test_a_stage_of_a_pipeline_is_blamed_where_it_stands(complaints: Callable[..., list[str]]) -> None:
    text = "output_dir: o\nmodel_name_or_path: base\nstages: [ppo]\nppo:\n  data: {train: p.jsonl}\n  rewards: [{run: base}]\n"
    (line,) = complaints("pipeline", text + "  kl_target: 3.0\n")
    assert line.startswith("error: job.yaml:7: ppo.kl_target: has no effect with kl_controller fixed")


def test_data_that_stages_share_are_blamed_once(complaints: Callable[..., list[str]]) -> None:
    text = "output_dir: o\nmodel_name_or_path: base\nstages: [ppo, evaluate]\nppo:\n  data: {train: p.jsonl, mix_seed: 3}\n"
    (line,) = complaints("pipeline", text + "  rewards: [{run: base}]\n")
    assert line.startswith("error: job.yaml:5: ppo.data.mix_seed: has no effect without data.weights")
