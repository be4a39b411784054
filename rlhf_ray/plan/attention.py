"""Attention as the real device does it, for models on the meta device, where torch would take the kernel that makes all scores.

Registered with transformers as attention implementations of their own: `sdpa`, with torch's fused kernel of a device underneath.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from rlhf_ray.models.packing import rows_apart
from rlhf_ray.plan.meta_tracker import Device

_aten = torch.ops.aten

VECTOR = 8
"""Columns that the mask's rows are filled up to on CUDA."""


def fused(model: Any, device: Device) -> None:
    """Have `model`, which was made with `sdpa`, use the fused kernel of `device`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    name = f"rlhf_ray_fused_{device}"
    AttentionInterface.register(name, partial(_forward, device))
    AttentionMaskInterface.register(name, sdpa_mask)
    model.set_attn_implementation(name)


def _forward(device: Device, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with _Fused(device):
        return rows_apart(module, *args, **kwargs)


class _Fused(TorchFunctionMode):
    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device: Device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return attention(self.device, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def attention(
    device: Device,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention` by torch's fused kernel: its result, what it keeps for the backward pass, and the mask that
    it makes of a mask of truth values (-inf or 0, in the query's precision). CUDA: the memory-efficient kernel."""
    if enable_gqa and device == "cuda":
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        zero = torch.zeros((), dtype=query.dtype, device=query.device)
        attn_mask = torch.where(attn_mask.logical_not(), zero, zero)
    if device == "cpu" and (key.shape[-1] != value.shape[-1] or (attn_mask is not None and attn_mask.requires_grad)):
        # Latent attention, masks that are learnt: torch's fused kernel of the CPU takes neither.
        return _aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]
    if device == "cpu":
        out: Tensor = _aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )[0]
        return out
    if attn_mask is not None:
        width = attn_mask.shape[-1]
        if width % VECTOR:
            attn_mask = F.pad(attn_mask, (0, VECTOR - width % VECTOR))[..., :width]
        attn_mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], width)
    needs_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    out = _aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, needs_gradient, dropout_p, is_causal, scale=scale
    )[0]
    return out
