"""LoRA RLHF on Ray: supervised fine-tuning, reward modelling and PPO, from a base model and preference data to an aligned adapter.

    from rlhf_ray import PPOConfig, ppo
    run = ppo(PPOConfig(output_dir="runs/ppo", model_name_or_path="...", data={"train": "prompts.jsonl"}, rewards=[...]))

Names are imported when they are first used, so that `import rlhf_ray` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers see; tests/unit/test_public_names.py holds it equal to _PUBLIC
    from rlhf_ray.config import DPOConfig as DPOConfig
    from rlhf_ray.config import EvaluateConfig as EvaluateConfig
    from rlhf_ray.config import PipelineConfig as PipelineConfig
    from rlhf_ray.config import PPOConfig as PPOConfig
    from rlhf_ray.config import RewardConfig as RewardConfig
    from rlhf_ray.config import ServeConfig as ServeConfig
    from rlhf_ray.config import SFTConfig as SFTConfig
    from rlhf_ray.config import SweepConfig as SweepConfig
    from rlhf_ray.errors import ArtifactError as ArtifactError
    from rlhf_ray.errors import ConfigError as ConfigError
    from rlhf_ray.errors import DataError as DataError
    from rlhf_ray.errors import Interrupted as Interrupted
    from rlhf_ray.errors import InvariantError as InvariantError
    from rlhf_ray.errors import LimitReached as LimitReached
    from rlhf_ray.errors import ResourceError as ResourceError
    from rlhf_ray.errors import RlhfRayError as RlhfRayError
    from rlhf_ray.models.merge import merge_run as merge  # noqa: F401
    from rlhf_ray.stages.generate import generate as generate
    from rlhf_ray.stages.resume import resume as resume
    from rlhf_ray.stages.score import score as score
    from rlhf_ray.stages.start import dpo as dpo
    from rlhf_ray.stages.start import evaluate as evaluate
    from rlhf_ray.stages.start import pipeline as pipeline
    from rlhf_ray.stages.start import ppo as ppo
    from rlhf_ray.stages.start import reward as reward
    from rlhf_ray.stages.start import sft as sft
    from rlhf_ray.storage.run import Run as Run
    from rlhf_ray.storage.run import load_run as load_run
    from rlhf_ray.sweep.sweep import sweep as sweep

    __version__: str

_PUBLIC = {
    "config": "DPOConfig EvaluateConfig PPOConfig PipelineConfig RewardConfig SFTConfig ServeConfig SweepConfig",
    "errors": "ArtifactError ConfigError DataError Interrupted InvariantError LimitReached ResourceError RlhfRayError",
    "models.merge": "merge=merge_run",
    "ppo": "ppo=",
    "stages.generate": "generate",
    "stages.resume": "resume",
    "stages.score": "score",
    "stages.start": "dpo evaluate pipeline reward sft",
    "storage.run": "Run load_run",
    "sweep": "sweep=",
}
"""Module -> the public names in it. `a=b` is b under the name a; `a=` is the module itself, which is called like a function."""

_WHERE = {
    name: (f"rlhf_ray.{module}", attribute if same else name)
    for module, names in _PUBLIC.items()
    for name, same, attribute in (entry.partition("=") for entry in names.split())
}

__all__ = sorted([*_WHERE, "__version__"])


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("rlhf_ray")
    elif name in _WHERE:
        module, attribute = _WHERE[name]
        value = import_module(module)
        if attribute:
            value = getattr(value, attribute)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
