"""Which weights of a decoder an adapter, or a quantised load, does not reach: above all experts stacked into one parameter."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from rlhf_ray.models.zero3 import whole_numel, whole_shape

WORTH_TELLING = 0.01
"""Share of the weights that is told of."""
NAMED = 4
"""Kinds of weights that a note names, the largest first."""


def adapter_notes(trunk: nn.Module, adapter: str) -> list[str]:
    """A line if an adapter that was made by all-linear leaves some of the decoder's matrices alone; else nothing."""
    left, stacked, total = weights_without(trunk, lambda m: isinstance(m, LoraLayer) and adapter in m.lora_A)
    share = sum(left.values()) / max(total, 1)
    if share < WORTH_TELLING:
        return []
    what = f"all-linear adapts {1 - share:.0%} of the decoder's weights, and not {_named(left, total)}"
    if not stacked:
        return [f"{what}: these are no linear layers to PEFT"]
    return [f"{what}; lora.target_parameters=[{', '.join(sorted(stacked))}] adapts those that are stacked"]


def quantisation_notes(trunk: nn.Module, bits: int) -> list[str]:
    """A line if a quantised load left some of the decoder's matrices as they are: bitsandbytes replaces linear layers only."""
    left, _, total = weights_without(trunk, lambda m: type(m).__module__.startswith("bitsandbytes"))
    share = sum(left.values()) / max(total, 1)
    if share < WORTH_TELLING:
        return []
    return [
        f"load_in_{bits}bit quantises {1 - share:.0%} of the decoder's weights, and not {_named(left, total)}:"
        " bitsandbytes replaces plain linear layers only"
    ]


def weights_without(trunk: nn.Module, reached: Callable[[nn.Module], bool]) -> tuple[Counter[str], frozenset[str], int]:
    """({name without numbers: weights} of the matrices that `reached` is false for; which of them are stacks [experts, .., ..];
    weights of all matrices). Embeddings do not count, nor what adapters add.

    reached: of the module that holds a matrix, or of the LoRA layer around it."""
    left: Counter[str] = Counter()
    stacked: set[str] = set()
    total = 0
    around: dict[tuple[nn.Module, str], Any] = {}  # the LoRA layer around a matrix
    for name, module in trunk.named_modules():
        if isinstance(module, ParamWrapper):
            around[module.get_base_layer(), module.parameter_name] = module
        elif isinstance(module, LoraLayer) and isinstance(inner := module.get_base_layer(), nn.Module):
            around[inner, "weight"] = module
        if isinstance(module, nn.Embedding) or ".lora_" in f".{name}":
            continue
        for own, parameter in module.named_parameters(recurse=False):
            count = whole_numel(parameter)
            if isinstance(module, nn.Linear) and own == "weight":
                count = module.in_features * module.out_features  # a quantised weight is packed
            elif len(whole_shape(parameter)) < 2:
                continue
            total += count
            outside = around.get((module, own))
            if not (reached(module) or (outside is not None and reached(outside))):
                kind = re.sub(r"\.(base_layer|weight)(?=\.|$)", "", f"{name}.{own}")
                kind = re.sub(r"^(.*\.)?\d+\.", "", kind)
                left[kind] += count
                if len(whole_shape(parameter)) == 3 and not isinstance(module, nn.Conv1d):
                    stacked.add(kind)
    return left, frozenset(stacked), total


def _named(left: Counter[str], total: int) -> str:
    shares = ((name, count / total) for name, count in left.most_common(NAMED))
    some = [f"{name} ({share:.0%})" if share >= 0.005 else f"{name} (<1%)" for name, share in shares]
    return ", ".join(some) + (f" and {len(left) - NAMED} more" if len(left) > NAMED else "")
