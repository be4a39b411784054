"""Which linear layers of a model an adapter sits on, and under which keys its tensors are kept."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from rlhf_ray.errors import ArtifactError, ConfigError, Problem
from rlhf_ray.models.adapter_files import KEY
from rlhf_ray.models.backbone import trunk


def resolve_targets(model: nn.Module, targets: str | tuple[str, ...] | list[str]) -> list[str]:
    """Names for PEFT's `target_modules`: every linear layer of the trunk for "all-linear", else `targets`, checked.

    ConfigError listing the names there are if one of `targets` matches no linear layer of the trunk."""
    linear = linear_layers(model)
    if targets == "all-linear":
        return _shortest_names(model, list(linear))
    wanted = [targets] if isinstance(targets, str) else list(targets)
    missing = [t for t in wanted if not any(matches(t, name) for name in linear)]
    there = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
    ConfigError.raise_all(
        Problem(
            "lora.target_modules", f"{t} matches no linear layer of the model", f"all-linear, or some of {there}", t
        )
        for t in missing
    )
    return sorted(set(wanted))


def matches(target: str, module_name: str) -> bool:
    """PEFT's rule for a list of targets: the whole name, or its last parts."""
    return module_name == target or module_name.endswith(f".{target}")


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """{qualified name in `model`: linear layer} of the trunk; a layer that carries LoRA counts as the linear layer it wraps."""
    body = trunk(model)
    prefix = next(name for name, module in model.named_modules() if module is body)
    found: dict[str, nn.Module] = {}
    for name, module in body.named_modules():
        inner = module.get_base_layer() if isinstance(module, LoraLayer) else module
        if isinstance(inner, (nn.Linear, Conv1D)) and not name.endswith(".base_layer") and ".lora_" not in f".{name}":
            found[f"{prefix}.{name}" if prefix else name] = inner
    return found


def _shortest_names(model: nn.Module, names: list[str]) -> list[str]:
    """Last name parts, as people write them; a full name where the last part alone would also match another module."""
    adapted = set(names)
    taken = {name.rpartition(".")[2] for name, _ in model.named_modules() if name not in adapted}
    lasts = {name: name.rpartition(".")[2] for name in names}
    return sorted({name if last.isdigit() or last in taken else last for name, last in lasts.items()})


def width_in_out(layer: nn.Module) -> tuple[int, int]:
    """(input width, output width) of a linear layer; a Conv1D keeps its weight transposed."""
    if isinstance(layer, Conv1D):
        return int(layer.nx), int(layer.nf)
    return int(layer.in_features), int(layer.out_features)  # type: ignore[arg-type]


def module_of(key: str) -> str:
    """The module name inside a plain PEFT key. ArtifactError if it is not the key of a LoRA weight."""
    match = KEY.fullmatch(key)
    if match is None:
        raise ArtifactError.at(key, "unexpected tensor", "lora_A and lora_B weights")
    return match["module"]


def own_key(model: nn.Module, key: str) -> str:
    """The key under which `model` keeps the tensor: adapters of a bare trunk lack the trunk's name (`model.`, `transformer.`)."""
    module = module_of(key)
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    prefix = f"{base.base_model_prefix}."
    if trunk(base) is not base and not module.startswith(prefix):
        return key.replace(module, prefix + module, 1)
    return key
