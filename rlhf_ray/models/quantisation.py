"""8- and 4-bit bases by bitsandbytes (extra `quant`), on CUDA and on the CPU."""

from __future__ import annotations

import logging
from importlib import metadata
from typing import Any

import torch
from torch import nn

from rlhf_ray.errors import ArtifactError, ResourceError
from rlhf_ray.runtime.devices import free_memory


def quantised_kwargs(bits: int, device: torch.device, cpu_offload: bool) -> dict[str, Any]:
    """Arguments of from_pretrained for an 8- or 4-bit load (nf4, bfloat16 compute). Heads stay as they are.

    ResourceError if bitsandbytes is not installed, or if offloading is asked for without CUDA."""
    name = f"load_in_{bits}bit"
    try:
        metadata.version("bitsandbytes")
    except metadata.PackageNotFoundError:
        raise ResourceError.at(name, "bitsandbytes is not installed", fix="pip install 'rlhf_ray[quant]'") from None
    if cpu_offload and device.type != "cuda":
        raise ResourceError.at("cpu_offload", "layers move between GPU and CPU", "a CUDA device", str(device))
    from transformers import BitsAndBytesConfig

    _warn_once()
    config = BitsAndBytesConfig(
        load_in_8bit=bits == 8,
        load_in_4bit=bits == 4,
        llm_int8_skip_modules=["lm_head", "embed_out", "score"],
        llm_int8_enable_fp32_cpu_offload=cpu_offload,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    if not cpu_offload:
        return {"quantization_config": config, "device_map": {"": str(device)}}
    return {"quantization_config": config, "device_map": "auto", "max_memory": _own_memory(device)}


def _own_memory(device: torch.device) -> dict[int | str, int]:
    """What layers may be spread over: what is free on this process's own GPU, and the host's memory; not the GPUs of others."""
    index = device.index or 0
    return {index: torch.cuda.mem_get_info(index)[0], "cpu": free_memory()}


def refuse_offloaded(module: nn.Module) -> None:
    """ResourceError if layers of a base have been left on the CPU: DeepSpeed moves the whole of what it trains to the GPU."""
    for part in module.modules():
        places = getattr(part, "hf_device_map", None) or {}
        away = [name for name, place in places.items() if str(place) in ("cpu", "disk")]
        if away:
            raise ResourceError.at(
                "cpu_offload",
                f"{len(away)} parts of the base do not fit on the GPU, and PPO's learner cannot train around them",
                "a base that fits on the GPU as a whole",
                ", ".join(away[:3]),
                "load it in 4 bits, or lower what else takes memory: rlhf-ray plan",
            )


class _Once(logging.Filter):
    """Lets each message through a single time."""

    def __init__(self) -> None:
        super().__init__()
        self._told: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        first = str(record.msg) not in self._told
        self._told.add(str(record.msg))
        return first


_once = _Once()


def _warn_once() -> None:
    """bitsandbytes warns of the number format of 8-bit products in every linear layer of every forward pass."""
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_once)


def keep_trainable(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights for CPU inference.

    On CPUs with avx512_bf16 the first eval-mode forward without gradients would repack them for good, and every later backward
    pass would leave the adapters without gradients, in silence."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def dequantised(model: Any, dtype: torch.dtype, where: str) -> Any:
    """A model whose checkpoint is quantised, with whole weights. ArtifactError where transformers cannot do that."""
    method = getattr(model.config.quantization_config, "quant_method", "quantised")
    try:
        whole = model.dequantize().to(dtype)
    except (NotImplementedError, ValueError, TypeError, RuntimeError, AttributeError, ImportError) as e:
        raise ArtifactError.at(
            where,
            f"its weights are quantised ({getattr(method, 'value', method)}), and transformers cannot make them whole again",
            "whole weights to merge into",
            fix="merge into the checkpoint that it was quantised from, and quantise the result",
        ) from e
    if hasattr(whole.config, "quantization_config"):
        del whole.config.quantization_config
    # What reads quantised tensors has no way back, and saving would look for one.
    conversions = getattr(whole, "_weight_conversions", None) or ()
    whole._weight_conversions = [c for c in conversions if _has_a_way_back(c)]
    return whole


def _has_a_way_back(conversion: Any) -> bool:
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True
