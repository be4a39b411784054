"""The public functions that start a stage. They name its body, which is imported where it runs: a driver with workers, and Ray
Train's controller, come up without transformers and PEFT (5 s of a core in each process)."""

from __future__ import annotations

from typing import Any

from rlhf_ray.config import DPOConfig, EvaluateConfig, JobFields, PipelineConfig, PPOConfig, RewardConfig, SFTConfig
from rlhf_ray.config.deepspeed import read_deepspeed_json
from rlhf_ray.console import Console, LocalConsole
from rlhf_ray.errors import ConfigError
from rlhf_ray.launch.launch import launch
from rlhf_ray.storage.run import Run

BUILDERS = {role: f"rlhf_ray.ppo.actors:build_{role}" for role in ("generator", "scorer")}
"""What an actor of each role of a split job builds."""


def _check_class(stage: str, config: object, wanted: type[JobFields]) -> None:
    """Raises ConfigError: the name of a job file, or its values, are no configuration yet."""
    if not isinstance(config, wanted):
        fix = f"{stage}({wanted.__name__}(...)); a job file is read by the command: rlhf-ray {stage} JOB.yaml"
        raise ConfigError.at(stage, "wrong type", f"a {wanted.__name__}", type(config).__name__, fix)


def sft(config: SFTConfig, console: Console | None = None) -> Run:
    """Fine-tune as `config` says and return the finished run. Raises the error tree of errors.py."""
    _check_class("sft", config, SFTConfig)
    return launch("rlhf_ray.supervised.sft:train_sft", config, console or LocalConsole())


def dpo(config: DPOConfig, console: Console | None = None) -> Run:
    """Train a policy on preference pairs as `config` says and return the finished run. Raises the error tree of errors.py."""
    _check_class("dpo", config, DPOConfig)
    return launch("rlhf_ray.supervised.dpo:train_dpo", config, console or LocalConsole())


def reward(config: RewardConfig, console: Console | None = None) -> Run:
    """Train a reward model as `config` says and return the finished run. Raises the error tree of errors.py."""
    _check_class("reward", config, RewardConfig)
    return launch("rlhf_ray.supervised.reward:train_reward", config, console or LocalConsole())


def ppo(config: PPOConfig, console: Console | None = None, seat: Any = None) -> Run:
    """Run PPO as `config` says and return the finished run. Raises the error tree of errors.py.

    seat: of a trial that shares process and base with others (`sweep.share_base`)."""
    _check_class("ppo", config, PPOConfig)
    if config.learner.deepspeed is not None:
        read_deepspeed_json(config.learner.deepspeed, config.learner.zero_stage)  # refused before anything is started
    return launch("rlhf_ray.ppo.loop:train_ppo", config, console or LocalConsole(), BUILDERS, seat)


def evaluate(config: EvaluateConfig, console: Console | None = None) -> Run:
    """Compare the job's policies and return the finished run. Raises the error tree of errors.py."""
    _check_class("evaluate", config, EvaluateConfig)
    return launch("rlhf_ray.stages.evaluate:run_evaluate", config, console or LocalConsole())


def pipeline(config: PipelineConfig, console: Console | None = None) -> Run:
    """Run the job's stages in turn and return a run whose metrics are theirs, named <stage>/<metric>."""
    _check_class("pipeline", config, PipelineConfig)
    return launch("rlhf_ray.stages.pipeline:run_pipeline", config, console or LocalConsole(), BUILDERS)
