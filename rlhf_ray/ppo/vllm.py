"""vLLM in a PPO run: how large its engine is, for which adapter, and what it cannot take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from rlhf_ray.config import PPOConfig
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.adapters import read_adapter
from rlhf_ray.models.backbone import BaseFiles, base_files
from rlhf_ray.models.lineage import header_line
from rlhf_ray.models.specs import policy_source
from rlhf_ray.roles.loaded_adapter import EngineAdapter
from rlhf_ray.runtime.imports import vllm_version
from rlhf_ray.sampler.vllm_engine import CPU_CACHE_GB, TRIED, VLLMEngine, VLLMOptions
from rlhf_ray.sampler.vllm_lora import largest_rank

SHARE_ALONE, SHARE_BESIDE = 0.9, 0.3
"""Of a GPU's memory, where the job does not say: of an actor that has one, and beside a learner (TRL's)."""


def policy_engine(
    config: PPOConfig, device: torch.device, role: str, num_gpus: float | None = None
) -> tuple[BaseFiles, EngineAdapter]:
    """The base's files, and the policy's adapter in an engine that has just been started on them; it has no weights yet.

    num_gpus: see `gpu_share`. Raises what is wrong with the job before it starts the engine."""
    if config.rollout.enable_sleep_mode and device.type != "cuda":
        what = "vLLM on a CPU cannot sleep: it has no memory of a GPU to give back"
        raise ConfigError.at("rollout.enable_sleep_mode", what, "a GPU", str(device), "drop it")
    shape = policy_shape(config)
    max_rank = largest_rank(shape["r"], "lora.r" if config.sft is None else "sft")
    base = base_files(config.model_name_or_path, config.revision, config.dtype, device, config.stop_token_ids)
    engine = VLLMEngine(options(config, base, device, max_rank, num_gpus))
    return base, EngineAdapter(engine, shape, "policy", role)


def policy_shape(config: PPOConfig) -> Mapping[str, Any]:
    """r, lora_alpha, use_rslora and target_modules of the policy's adapter, from the job or the SFT adapter that it starts from."""
    if config.sft is not None and (start := policy_source(config.sft)).kind == "adapter":
        return read_adapter(start.path).config
    names = ("r", "lora_alpha", "use_rslora", "target_modules")
    shape = {name: getattr(config.lora, name) for name in names}
    return {
        **shape,
        "target_modules": [shape["target_modules"]]
        if isinstance(shape["target_modules"], str)
        else shape["target_modules"],
    }


def options(
    config: PPOConfig, base: BaseFiles, device: torch.device, max_rank: int, num_gpus: float | None = None
) -> VLLMOptions:
    """How the engine is started. num_gpus: see `gpu_share`."""
    rollout, on_gpu = config.rollout, device.type == "cuda"
    cache = rollout.kv_cache_gb if rollout.kv_cache_gb is not None or on_gpu else CPU_CACHE_GB
    return VLLMOptions(
        model=str(base.source.folder),
        dtype=str(base.dtype).removeprefix("torch."),
        device=device,
        longest=longest_row(config, base.context_length),
        max_rows=min(config.sampler_rows or config.chunk_rows, config.chunk_rows),
        max_rank=max_rank,
        gpu_memory_utilization=gpu_share(config, num_gpus),
        kv_cache_bytes=None if cache is None else int(cache * 2**30),
        enforce_eager=rollout.enforce_eager,
        enable_sleep_mode=rollout.enable_sleep_mode,
    )


def gpu_share(config: PPOConfig, num_gpus: float | None = None) -> float:
    """Of one GPU's memory, for weights and cache of one engine.

    num_gpus: that a generator of its own was given; None where it is not placed yet: as the job says, else one."""
    if config.rollout.gpu_memory_utilization is not None:
        return config.rollout.gpu_memory_utilization
    if config.placement != "split":
        return SHARE_BESIDE
    return SHARE_ALONE * (num_gpus or config.generator.num_gpus or 1.0)


def longest_row(config: PPOConfig, context: int) -> int:
    """Tokens of the longest prompt and reply that the job can ask for."""
    limit = min(config.max_length or context, context)
    if config.max_prompt_length is None:
        return limit
    return min(limit, config.max_prompt_length + config.response_length)


def engine_lines(config: PPOConfig, device: torch.device) -> list[str]:
    """For the header of a run.   device: of the learner."""
    if config.rollout.engine == "builtin":
        return []
    cap = f"importance weights of at most {config.importance_sampling_cap:g}"
    lines = [header_line("engine", f"vLLM {vllm_version()}, a base of its own where it samples; {cap}")]
    if vllm_version() and not vllm_version().startswith(f"{TRIED}."):
        lines.append(header_line("", f"this project's tests run vLLM {TRIED}"))
    return lines
