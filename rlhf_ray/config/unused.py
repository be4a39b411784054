"""Fields that a job sets and that, beside its other fields, change nothing. A knob that is turned and not connected misleads.

A job file with one is refused; a run that comes by it otherwise (a trial of a sweep over the other field, a job made in Python, an
older run that is resumed) says so in its header. Only values other than the default count: a job file may be written out in full.
Sections of actors beside `placement: colocate`, and dropout in PPO, are not told: one job file serves both placements, and presets
carry a dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlhf_ray.config.defaults import usual
from rlhf_ray.config.rollout import RolloutConfig
from rlhf_ray.config.sections import Section
from rlhf_ray.config.stages import JobFields, PPOConfig, SFTConfig


@dataclass(frozen=True)
class UnusedField:
    """field: dotted.  why: beside what it has no effect, and what would give it one."""

    field: str
    why: str

    def __str__(self) -> str:
        return f"{self.field}: has no effect {self.why}"


def unused_fields(config: JobFields) -> list[UnusedField]:
    """All of `config`, in the order of the rules below."""
    rules = [*_SHARED, *_PPO] if isinstance(config, PPOConfig) else _SHARED
    found: dict[str, UnusedField] = {}
    for names, applies, why in rules:
        if not _can_be_asked(config, names) or not applies(config):
            continue
        for name in names:
            if _is_set(config, name):
                found.setdefault(name, UnusedField(name, why(config) if callable(why) else why))
    return list(found.values())


def _can_be_asked(config: Section, names: tuple[str, ...]) -> bool:
    return all(name.partition(".")[0] in type(config).model_fields for name in names)


def _is_set(config: JobFields, name: str) -> bool:
    """Whether the field is not its default, under the defaults that the job has."""
    section: Any = config
    *path, last = name.split(".")
    for part in path:
        section = getattr(section, part)
    return getattr(section, last) not in (type(section).model_fields[last].default, usual(config, name))


Rule = tuple[tuple[str, ...], Callable[[Any], bool], str | Callable[[Any], str]]


def _no_value_model(config: PPOConfig) -> bool:
    return config.advantage_estimator != "gae"


def _beside_estimator(config: PPOConfig) -> str:
    estimator = config.advantage_estimator
    return f"with advantage_estimator {estimator}, which has no value model and no token rewards; drop it, or set gae"


def _holds_nothing_out(config: Any) -> bool:
    return config.data.eval is None and config.data.held_out_fraction == 0


_SHARED: list[Rule] = [
    (
        ("data.held_out_fraction",),
        lambda c: c.data.eval and c.data.held_out_fraction > 0 and not c.data.held_out_prompts,
        "with data.eval, beside which data.train trains in full; drop one of the two",
    ),
    (
        ("data.eval_max_rows",),
        _holds_nothing_out,
        "where nothing is held out (data.held_out_fraction 0, no data.eval); drop it, or hold some out",
    ),
    (
        ("data.mix_seed",),
        lambda c: c.data.weights is None,
        "without data.weights; drop it, or set the shares of the files",
    ),
    (
        ("data.disjoint_stages",),
        lambda c: isinstance(c, SFTConfig),
        "in SFT: it is between the reward and the PPO stage; drop it",
    ),
    (
        ("train_on_turns",),
        lambda c: c.train_on_inputs,
        "with train_on_inputs, which learns every token; drop one of the two",
    ),
    (
        ("chat_template_kwargs", "template_date"),
        lambda job: job.template != "chat",
        lambda job: f"with template {job.template}; drop it, or set template: chat",
    ),
    (
        ("adam_beta1", "adam_beta2", "adam_epsilon"),
        lambda c: c.optim == "adafactor",
        "with optim adafactor; drop it, or set adamw_torch",
    ),
    (
        ("min_lr_ratio",),
        lambda c: c.lr_scheduler_type == "constant",
        "with lr_scheduler_type constant, which does not decay; drop it, or set linear or cosine",
    ),
]
_PPO: list[Rule] = [
    (
        ("per_device_train_batch_size",),
        lambda c: c.tokens_per_microbatch is not None and c.has_contiguous_rows,
        "with tokens_per_microbatch, which takes as many rows as fit; drop one of the two",
    ),
    (
        ("tokens_per_microbatch",),
        lambda c: not c.has_contiguous_rows,
        lambda c: (
            f"with defaults_version {c.defaults_version}, whose passes take per_device_train_batch_size rows; drop one of the two"
        ),
    ),
    (
        (
            *("value.init_from", "value.adapter", "value.lora", "value.learning_rate", "value.warmup_steps", "vf_coef"),
            *("cliprange_value", "gamma", "lam", "whiten_rewards", "bootstrap_truncated"),
        ),
        _no_value_model,
        _beside_estimator,
    ),
    (
        ("scale_rewards",),
        lambda c: c.advantage_estimator != "grpo",
        lambda c: f"with advantage_estimator {c.advantage_estimator}; drop it, or set grpo",
    ),
    (
        ("reward_baseline",),
        lambda c: _no_value_model(c) and c.reward_clip is None,
        lambda c: f"with advantage_estimator {c.advantage_estimator}, which compares replies to one prompt; drop it",
    ),
    (
        ("value.lora",),
        lambda c: c.value.adapter == "shared",
        "with value.adapter shared, which is the policy's; drop it, or set own",
    ),
    (
        ("kl_target", "kl_step_size", "kl_horizon"),
        lambda c: c.kl_controller == "fixed",
        "with kl_controller fixed; drop it, or set adaptive or horizon",
    ),
    (("kl_horizon",), lambda c: c.kl_controller == "adaptive", "with kl_controller adaptive; drop it, or set horizon"),
    (("kl_step_size",), lambda c: c.kl_controller == "horizon", "with kl_controller horizon; drop it, or set adaptive"),
    (
        ("kl_controller",),
        lambda c: c.kl_penalty == "none" or c.kl_coef == 0,
        lambda c: (
            "with kl_penalty none; drop it, or name a penalty"
            if c.kl_penalty == "none"
            else "with kl_coef 0, which it multiplies and so never moves; set kl_coef to where it starts"
        ),
    ),
    (
        ("kl_coef",),
        lambda c: c.kl_penalty == "none" and c.kl_coef > 0,
        "with kl_penalty none; drop it, or name a penalty",
    ),
    (
        ("use_kl_loss", "ref_model_sync_steps"),
        lambda c: c.kl_penalty == "none" or c.kl_coef == 0,
        lambda c: f"with {'kl_penalty none' if c.kl_penalty == 'none' else 'kl_coef 0'}; drop it",
    ),
    (
        ("ref_model_sync_resets_optimizer",),
        lambda c: c.ref_model_sync_steps is None,
        "without ref_model_sync_steps; drop it, or set the steps after which the reference is reset",
    ),
    (
        ("target_kl",),
        lambda c: c.num_ppo_epochs == 1 and c.num_mini_batches == 1,
        "with one optimizer step per rollout, after which it would stop; drop it",
    ),
    (
        ("ptx_data",),
        lambda c: c.ptx_coef == 0,
        "with ptx_coef 0; drop it, or set the weight of its loss",
    ),
    (
        ("importance_sampling_cap",),
        lambda c: not c.samples_off_policy,
        "with max_staleness 0 and rollout.engine builtin; drop it, or set max_staleness: 1",
    ),
    (
        tuple(f"rollout.{name}" for name in RolloutConfig.model_fields if name not in ("engine", "cuda_graphs")),
        lambda c: c.rollout.engine == "builtin",
        "with rollout.engine builtin; drop it, or set vllm",
    ),
    (
        ("rollout.cuda_graphs",),
        lambda c: c.rollout.engine == "vllm",
        "with rollout.engine vllm, which has its own; drop it",
    ),
    (
        ("rollout.enable_sleep_mode",),
        lambda c: c.placement == "split",
        "with placement split, where nobody shares the engine's GPU; drop it",
    ),
    (
        ("missing_eos_penalty",),
        lambda c: c.bootstrap_truncated and c.advantage_estimator == "gae" and c.missing_eos_penalty is not None,
        "with bootstrap_truncated, which leaves out the score of a reply that did not finish; drop it, or bootstrap_truncated",
    ),
    (
        ("overlong_penalty",),
        lambda c: c.overlong_buffer is None,
        "without overlong_buffer; drop it, or set the tokens over which it grows",
    ),
    (
        ("alarm.watch_errors",),
        lambda c: c.watch is None,
        "without watch; drop it, or name a reward of weight 0 in watch",
    ),
    (
        (
            "alarm.watch_errors",
            "alarm.length_factor",
            "alarm.repetition_rise",
            "alarm.entropy_factor",
        ),
        lambda c: c.alarm.action == "none",
        "with alarm.action none; drop it, or set warn or stop",
    ),
    (
        ("max_clip_fraction", "cliprange", "cliprange_high", "dual_clip"),
        lambda c: c.num_ppo_epochs == 1 and c.num_mini_batches == 1,
        "with one optimizer step per rollout, in which every ratio is 1; drop it",
    ),
    (
        ("cliprange_value",),
        lambda c: c.num_ppo_epochs == 1 and c.num_mini_batches == 1,
        "with one optimizer step per rollout, in which every value is still the old one; drop it",
    ),
    (
        (
            "load_best_model_at_end",
            "over_optimisation_patience",
            "eval_steps",
            "confirm_held_out",
            "kl_cap",
            "watch",
        ),
        _holds_nothing_out,
        "where no prompt is held out (data.held_out_fraction 0, no data.eval); drop it, or hold some out",
    ),
    (
        ("kl_cap",),
        lambda c: not c.eval_sampling.estimates_kl,
        "where evaluations do not draw from the whole distribution (eval_sampling) and so measure no KL; drop it, or sample with"
        " top_p 1 and top_k 0",
    ),
]
