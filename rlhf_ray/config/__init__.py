"""Job configuration: typed, frozen, strict, and the only place where a default lives.

Names follow TRL's PPOConfig, transformers' TrainingArguments and PEFT's LoraConfig wherever those have the field. Relative
paths in a job file are relative to the working directory. `rlhf-ray <stage> --help` is generated from the descriptions here.

YAML, overrides or Python values come in; one frozen object per job goes out, or a ConfigError that lists every problem. Read
`stages.py` (the fields of each command) and `load.py`; `explain.py` and `hints.py` write messages. It must not know models, data or
Ray: whether a job is well formed is decided without them.
"""

from rlhf_ray.config.actors import ActorsConfig
from rlhf_ray.config.alarm import AlarmConfig
from rlhf_ray.config.endpoints import AnnotatorConfig, EndpointConfig, LLMJudgeConfig
from rlhf_ray.config.explain import in_python
from rlhf_ray.config.pipeline import STAGES, PipelineConfig
from rlhf_ray.config.rewards import PolicySpec, RewardSource
from rlhf_ray.config.rollout import RolloutConfig
from rlhf_ray.config.sections import (
    RUN_NAME,
    DataConfig,
    LearnerConfig,
    LoraConfig,
    SamplingConfig,
    Section,
    ValueConfig,
    check_accumulation,
)
from rlhf_ray.config.serve import LimitsConfig, ReplicasConfig, ServeConfig
from rlhf_ray.config.stages import DPOConfig, EvaluateConfig, JobFields, OptimFields, PPOConfig, RewardConfig, SFTConfig
from rlhf_ray.config.sweep import SweepConfig

Section.as_raised = in_python

__all__ = [
    "RUN_NAME",
    "STAGES",
    "ActorsConfig",
    "AlarmConfig",
    "AnnotatorConfig",
    "DPOConfig",
    "DataConfig",
    "EndpointConfig",
    "EvaluateConfig",
    "JobFields",
    "LLMJudgeConfig",
    "LearnerConfig",
    "LimitsConfig",
    "LoraConfig",
    "OptimFields",
    "PPOConfig",
    "PipelineConfig",
    "PolicySpec",
    "ReplicasConfig",
    "RewardConfig",
    "RewardSource",
    "RolloutConfig",
    "SFTConfig",
    "SamplingConfig",
    "Section",
    "ServeConfig",
    "SweepConfig",
    "ValueConfig",
    "check_accumulation",
]
