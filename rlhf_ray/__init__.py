"""LoRA RLHF on Ray: supervised fine-tuning, reward modelling and PPO, from a base model and preference data to an aligned adapter.

    from rlhf_ray import PPOConfig, ppo
    run = ppo(PPOConfig(output_dir="runs/ppo", model_name_or_path="...", data={"train": "prompts.jsonl"}, rewards=[...]))

Names are imported when they are first used, so that `import rlhf_ray` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_ray.config import EvaluateConfig, PipelineConfig, PPOConfig, RewardConfig, SFTConfig
    from rlhf_ray.models.merge import merge_run as merge
    from rlhf_ray.run import Run, load_run
    from rlhf_ray.stages.evaluate import evaluate
    from rlhf_ray.stages.pipeline import pipeline
    from rlhf_ray.stages.ppo import ppo
    from rlhf_ray.stages.reward import reward
    from rlhf_ray.stages.sft import sft

    __version__: str

_WHERE = {
    "SFTConfig": ("rlhf_ray.config", "SFTConfig"),
    "RewardConfig": ("rlhf_ray.config", "RewardConfig"),
    "PPOConfig": ("rlhf_ray.config", "PPOConfig"),
    "EvaluateConfig": ("rlhf_ray.config", "EvaluateConfig"),
    "PipelineConfig": ("rlhf_ray.config", "PipelineConfig"),
    "sft": ("rlhf_ray.stages.sft", "sft"),
    "reward": ("rlhf_ray.stages.reward", "reward"),
    "ppo": ("rlhf_ray.stages.ppo", "ppo"),
    "evaluate": ("rlhf_ray.stages.evaluate", "evaluate"),
    "pipeline": ("rlhf_ray.stages.pipeline", "pipeline"),
    "merge": ("rlhf_ray.models.merge", "merge_run"),
    "load_run": ("rlhf_ray.run", "load_run"),
    "Run": ("rlhf_ray.run", "Run"),
}

__all__ = [
    "EvaluateConfig",
    "PPOConfig",
    "PipelineConfig",
    "RewardConfig",
    "Run",
    "SFTConfig",
    "__version__",
    "evaluate",
    "load_run",
    "merge",
    "pipeline",
    "ppo",
    "reward",
    "sft",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("rlhf_ray")
    elif name in _WHERE:
        module, attribute = _WHERE[name]
        value = getattr(import_module(module), attribute)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
