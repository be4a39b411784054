"""In which precision adapters are multiplied: float32, as their weights are, or the base's bfloat16 (`lora_compute_dtype`).

PEFT widens the input of every adapted layer to the float32 of A, so that q, k and v each keep a copy of one input that is twice as
large as it, and adds in float32. In bfloat16 A and B are rounded for the product instead, as torch's autocast would; the weights
that learn stay float32. Learner, scorer and sampler read the same choice from the base that they share.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_ray.errors import ConfigError

_ROUNDED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def compute_adapters_in(model: nn.Module, precision: str, dtype: torch.dtype) -> None:
    """Adapters that a base gets from here on are multiplied in `precision`, "float32" or "bfloat16".   dtype: of the base.

    ConfigError for bfloat16 on a base in another precision: its layers' inputs are what adapters are multiplied with."""
    if precision == "float32":
        return
    if dtype is not torch.bfloat16:
        got = f"a base in {str(dtype).removeprefix('torch.')}"
        raise ConfigError.at(
            "lora_compute_dtype",
            "bfloat16 follows the base",
            "a base in bfloat16",
            got,
            "set dtype=bfloat16, or leave it out",
        )
    _ROUNDED.add(model)


def adapter_precision(base: nn.Module) -> torch.dtype:
    """In which adapters on `base` are multiplied."""
    return torch.bfloat16 if base in _ROUNDED else torch.float32


class RoundedLinear(nn.Linear):
    """A linear layer without bias whose float32 weight is rounded to its input's precision for each product. weight: [out, in]."""

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = layer.weight
        self.register_parameter("bias", None)

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.to(input.dtype))


def round_products(layer: Any, adapter: str) -> None:
    """Let `adapter` of a LoRA layer on a linear one be multiplied in the precision of the layer's input."""
    layer.cast_input_dtype_enabled = False
    for halves in (layer.lora_A, layer.lora_B):
        halves[adapter] = RoundedLinear(halves[adapter])
