"""vLLM in a replica: how large its engine is, and what a replica without a scoring base cannot answer.

The engine is stepped by the decode thread like the builtin one, and gets its adapters from the same cache (decode_thread.py).
"""

from __future__ import annotations

import torch

from rlhf_ray.config.serve import ServeConfig
from rlhf_ray.models.assembly import load_options
from rlhf_ray.models.backbone import Backbone, base_files, load_backbone
from rlhf_ray.models.sources import resolve_source
from rlhf_ray.sampler.vllm_engine import CPU_CACHE_GB, VLLMEngine, VLLMOptions
from rlhf_ray.sampler.vllm_lora import largest_rank
from rlhf_ray.serve.api_errors import ApiError
from rlhf_ray.serve.generation import GenerationRequest

SHARE = 0.9
"""Of a GPU's memory, where the job does not say: vLLM's own default."""


def load_base(config: ServeConfig, device: torch.device) -> Backbone:
    """The base that a replica encodes, scores and, with the builtin engine, samples with."""
    if has_scoring_base(config):
        how = load_options(config, device)  # type: ignore[arg-type]  # the same fields as a job's
        return load_backbone(path=config.model_name_or_path, revision=config.revision, **how)
    return base_files(config.model_name_or_path, config.revision, config.dtype, device, None).without_weights()


def start_engine(config: ServeConfig, backbone: Backbone, device: torch.device) -> VLLMEngine | None:
    """vLLM on the files of `backbone`; None with the builtin engine. Raises what `VLLMEngine` raises."""
    if config.engine == "builtin":
        return None
    return VLLMEngine(options(config, backbone, device))


def options(config: ServeConfig, backbone: Backbone, device: torch.device) -> VLLMOptions:
    """How the engine of a replica is started."""
    limits, vllm, on_gpu = config.limits, config.vllm, device.type == "cuda"
    cache = vllm.kv_cache_gb if vllm.kv_cache_gb is not None or on_gpu else CPU_CACHE_GB
    held = 0.0
    if on_gpu:
        held = torch.cuda.memory_reserved(device) / torch.cuda.get_device_properties(device).total_memory
    return VLLMOptions(
        model=str(resolve_source(config.model_name_or_path, config.revision).folder),
        dtype=str(backbone.dtype).removeprefix("torch."),
        device=device,
        longest=min(backbone.context_length, limits.max_context or backbone.context_length),
        max_rows=limits.max_batch_rows,
        max_rank=largest_rank(vllm.max_lora_rank, "vllm.max_lora_rank"),
        adapters=limits.max_loaded_adapters,
        gpu_memory_utilization=gpu_share(config, held),
        kv_cache_bytes=None if cache is None else int(cache * 2**30),
        enforce_eager=vllm.enforce_eager,
        step_tokens=limits.prompt_chunk + limits.max_batch_rows,
        where="engine",
    )


def gpu_share(config: ServeConfig, held: float = 0.0) -> float:
    """Of one GPU's memory, for weights and cache of the engine.   held: the share that the scoring base has taken already."""
    if config.vllm.gpu_memory_utilization is not None:
        return config.vllm.gpu_memory_utilization
    given = 1.0 if config.replicas.num_gpus is None else config.replicas.num_gpus
    return max(SHARE * given - held, 0.01)


def has_scoring_base(config: ServeConfig) -> bool:
    """Whether a replica has a base of this package, with weights."""
    return config.engine == "builtin" or config.vllm.scoring_base


def refuse_scores(request: GenerationRequest) -> None:
    """ApiError for what only a scoring base can tell."""
    wanted = {
        "reward": bool(request.reward),
        "kl": request.kl,
        "prompt_logprobs": request.prompt_logprobs is not None,
        "logprobs": request.echo and request.logprobs,
    }
    for name, is_asked in wanted.items():
        if is_asked:
            raise no_scoring_base(name)


def no_scoring_base(name: str) -> ApiError:
    """name: the request's field."""
    with_echo = " with echo" if name == "logprobs" else ""
    message = (
        f"{name}{with_echo}: this service has no base to compute it on (its operator has set vllm.scoring_base: false)."
    )
    return ApiError(400, message, "unsupported_parameter", name)
