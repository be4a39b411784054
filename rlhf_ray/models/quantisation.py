"""8- and 4-bit bases by bitsandbytes (extra `quant`), on CUDA and on the CPU."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import torch
from torch import nn

from rlhf_ray.errors import ArtifactError, ResourceError


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

    config = BitsAndBytesConfig(
        load_in_8bit=bits == 8,
        load_in_4bit=bits == 4,
        llm_int8_skip_modules=["lm_head", "embed_out", "score"],
        llm_int8_enable_fp32_cpu_offload=cpu_offload,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": config, "device_map": "auto" if cpu_offload else {"": str(device)}}


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
    except (NotImplementedError, ValueError, RuntimeError, AttributeError) as e:
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
