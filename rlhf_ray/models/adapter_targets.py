"""Which linear layers of a model an adapter sits on, and under which keys its tensors are kept."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import peft
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer, LoraModel
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf_ray.errors import ArtifactError, ConfigError, Problem
from rlhf_ray.models.adapter_files import KEY, AdapterFiles, by_peft
from rlhf_ray.models.backbone import trunk
from rlhf_ray.models.recurrent import is_read_past
from rlhf_ray.models.zero3 import whole_shape


def resolve_targets(model: nn.Module, targets: str | tuple[str, ...] | list[str]) -> list[str]:
    """Names for PEFT's `target_modules`: every linear layer of the trunk for "all-linear", else `targets`, checked.

    all-linear leaves out what PEFT does not adapt as a linear layer (`refused_by_peft`).
    ConfigError listing the names there are if one of `targets` matches no linear layer of the trunk, or one that PEFT refuses."""
    linear = linear_layers(model)
    refused = refused_by_peft(model, linear)
    allowed = [name for name in linear if _last(name) not in refused]
    if targets == "all-linear":
        return _shortest_names(model, allowed)
    wanted = [targets] if isinstance(targets, str) else list(targets)
    expected = f"all-linear, or some of {', '.join(sorted({_last(name) for name in allowed}))}"
    problems = [
        Problem("lora.target_modules", f"{t} matches no linear layer of the model", expected, t)
        for t in wanted
        if not any(matches(t, name) for name in linear)
    ]
    problems += [
        Problem("lora.target_modules", f"{t}: {refused[_last(t)]}", expected, t) for t in wanted if _last(t) in refused
    ]
    ConfigError.raise_all(problems)
    chosen = [name for name in linear if any(matches(t, name) for t in wanted)]
    beyond = (name for name, _ in model.named_modules() if name not in linear and ".lora_" not in name)
    if any(matches(t, name) for name in beyond for t in wanted):  # as in a vision tower
        return _shortest_names(model, chosen)
    return sorted(set(wanted))


def refused_by_peft(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """{last part of a name: why} of linear layers that PEFT would not adapt as such, asked of PEFT itself.

    In mixtures of experts it takes gate_proj and the like for the experts, as they were called before transformers 5 stacked them
    into parameters, and no name reaches a shared expert or a dense layer of that name; and Mamba's kernels read the weights of
    out_proj themselves. Each name is asked about once for each base: a service asks again with every adapter that it loads."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    known = _REFUSED.setdefault(base, {})
    lasts = sorted({_last(name) for name in names})
    known.update((name, _why_refused(base, name)) for name in lasts if name not in known)
    return {name: why for name in lasts if (why := known[name]) is not None}


_REFUSED: WeakKeyDictionary[nn.Module, dict[str, str | None]] = WeakKeyDictionary()


def _why_refused(base: Any, name: str) -> str | None:
    config = peft.LoraConfig(target_modules=[name])
    try:
        LoraModel._check_target_module_compatiblity(None, config, base, name)  # type: ignore[arg-type]
    except ValueError:
        return f"PEFT does not adapt it in {base.config.model_type}, whose kernels read its weights themselves"
    try:
        convert_peft_config_for_transformers(config, model=base, conversions=None)
        is_taken = name not in (config.target_modules or ())
    except ValueError:  # one half of gate_proj and up_proj, which are one parameter now
        is_taken = True
    return (
        f"PEFT takes the name for the experts of {base.config.model_type}, whose weights are stacked"
        if is_taken
        else None
    )


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def resolve_parameters(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Names for PEFT's `target_parameters`, each of which matches stacked weights [experts, .., ..] of the trunk.

    ConfigError listing the names there are if one matches none."""
    stacked = stacked_parameters(model)
    there = sorted({re.sub(r"^(.*\.)?\d+\.", "", name) for name in stacked})
    wanted = sorted(set(names))
    ConfigError.raise_all(
        Problem(
            "lora.target_parameters",
            f"{name} matches no stacked weights of the model",
            f"some of {', '.join(there)}" if there else "nothing: all its matrices are linear layers",
            name,
        )
        for name in wanted
        if not any(matches(name, one) for one in stacked)
    )
    return wanted


def stacked_parameters(model: nn.Module) -> dict[str, tuple[nn.Module, nn.Parameter]]:
    """{qualified name in `model`: (its module, parameter)} of the trunk's weights [experts, .., ..], in the model's order;
    names are as without adapters."""
    body = trunk(model)
    prefix = next(name for name, module in model.named_modules() if module is body)
    found = {}
    for path, module in body.named_modules():
        whole = ".".join(part for part in f"{prefix}.{path}".split(".") if part and part != "base_layer")
        for own, parameter in module.named_parameters(recurse=False):
            if (
                len(whole_shape(parameter)) == 3
                and not isinstance(module, (nn.Conv1d, nn.Conv2d))
                and ".lora_" not in whole
            ):
                found[f"{whole}.{own}"] = (module, parameter)
    return found


def parameter_shapes(model: nn.Module, names: Iterable[str], r: int) -> dict[str, tuple[int, ...]]:
    """{plain PEFT key: shape} of an adapter of rank r on stacked weights: A [r E, in], B [out, r E].

    PEFT wraps a module once for each of its weights, the first one innermost, and calls all but the outermost `base_layer`."""
    wanted = list(names)
    by_module: dict[str, list[tuple[nn.Module, nn.Parameter]]] = {}
    for name, found in stacked_parameters(model).items() if wanted else ():
        if any(matches(one, name) for one in wanted):
            by_module.setdefault(name.rpartition(".")[0], []).append(found)
    shapes: dict[str, tuple[int, ...]] = {}
    for path, parameters in by_module.items():
        for outside, (module, parameter) in enumerate(reversed(parameters)):
            experts, first, second = whole_shape(parameter)
            n_in, n_out = (first, second) if getattr(module, "is_transposed", False) else (second, first)
            key = f"base_model.model.{path}{'.base_layer' * outside}"
            shapes[f"{key}.lora_A.weight"] = (r * experts, n_in)
            shapes[f"{key}.lora_B.weight"] = (n_out, r * experts)
    return shapes


def fit_tensors(
    base: nn.Module, files: AdapterFiles, linear: Mapping[str, nn.Module]
) -> tuple[str | list[str], dict[str, Tensor]]:
    """(target modules, {key under which `base` keeps the tensor: tensor}) of an adapter that belongs on `base`.

    linear: `linear_layers` of base.   ArtifactError naming missing and unmatched keys, wrong shapes, targets that PEFT refuses."""
    given = dict(zip(own_keys(base, files.tensors), files.tensors.values()))
    targets = files.config["target_modules"]
    if targets == "all-linear":
        targets = resolve_targets(base, targets)
    refused = refused_by_peft(base, targets)
    fix = by_peft(files.config)
    ArtifactError.raise_all(Problem(files.path, f"target {name}: {why}", fix=fix) for name, why in refused.items())
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layer in linear.items():
        if any(matches(t, name) for t in targets):
            n_in, n_out = width_in_out(layer)
            shapes[f"base_model.model.{name}.lora_A.weight"] = (files.config["r"], n_in)
            shapes[f"base_model.model.{name}.lora_B.weight"] = (n_out, files.config["r"])
    shapes |= parameter_shapes(base, files.config.get("target_parameters") or (), files.config["r"])
    compare_shapes(shapes, given, files.path)
    return targets, given


def compare_shapes(expected: Mapping[str, tuple[int, ...]], given: Mapping[str, Tensor], where: str) -> None:
    """ArtifactError, one line a tensor, unless names and shapes agree."""
    problems = [Problem(where, f"lacks tensor {key}") for key in expected if key not in given]
    problems += [Problem(where, f"tensor {key} has no place in this model") for key in given if key not in expected]
    for key, shape in expected.items():
        if key in given and tuple(given[key].shape) != shape:
            problems.append(Problem(where, f"wrong shape of {key}", str(shape), str(tuple(given[key].shape))))
    ArtifactError.raise_all(problems)


def matches(target: str, module_name: str) -> bool:
    """PEFT's rule for a list of targets: the whole name, or its last parts."""
    return module_name == target or module_name.endswith(f".{target}")


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """{qualified name in `model`: linear layer} of the trunk; a layer that carries LoRA counts as the linear layer it wraps.

    Left out are routers of experts that answer with more than their product, and what a mixer reads past an adapter."""
    body = trunk(model)
    prefix = next(name for name, module in model.named_modules() if module is body)
    found: dict[str, nn.Module] = {}
    answers: dict[type, bool] = {}
    for name, module in body.named_modules():
        inner = module.get_base_layer() if isinstance(module, LoraLayer) else module
        if not isinstance(inner, (nn.Linear, Conv1D)) or name.endswith(".base_layer") or ".lora_" in f".{name}":
            continue
        if is_read_past(name, body):
            continue
        if type(inner) not in answers:
            answers[type(inner)] = _answers_with_a_product(inner)
        if answers[type(inner)]:
            found[f"{prefix}.{name}" if prefix else name] = inner
    return found


@torch.no_grad()
def _answers_with_a_product(layer: nn.Module) -> bool:
    """Whether [1, in] gives a tensor [1, out]. Only classes of an architecture's own are tried: quantised ones do."""
    if not type(layer).__module__.startswith("transformers.models."):
        return True
    weight: Any = layer.weight
    output = layer(torch.zeros(1, width_in_out(layer)[0], dtype=weight.dtype, device=weight.device))
    return isinstance(output, Tensor) and output.shape[-1] == width_in_out(layer)[1]


def _shortest_names(model: nn.Module, names: list[str]) -> list[str]:
    """Last name parts, as people write them; a full name where the last part alone would also match another module."""
    adapted = set(names)
    taken = {_last(name) for name, _ in model.named_modules() if name not in adapted}
    lasts = {name: _last(name) for name in names}
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


def own_keys(model: nn.Module, keys: Iterable[str]) -> list[str]:
    """The keys under which `model` keeps the tensors: adapters of a bare trunk lack the trunk's name (`model.`, `transformer.`)."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    body = trunk(base)
    path = next(name for name, part in base.named_modules() if part is body)
    return [
        key.replace(module, f"{path}.{module}", 1) if path and not module.startswith(f"{path}.") else key
        for key, module in ((key, module_of(key)) for key in keys)
    ]
