"""Named LoRA adapters on one frozen base: made fresh, loaded strictly, copied, chosen for a forward pass.

y = W x + (lora_alpha / r) B A x     (Hu et al. 2021, arXiv:2106.09685; rsLoRA: lora_alpha / sqrt(r), arXiv:2312.03732)

A and B are float32 whatever the base's precision, and so are their products unless the base was loaded for others
(lora_compute.py). PEFT turns the gradients of every adapter but the active one off; here several adapters train at once, so each
function below leaves the requires_grad flags of the others as they were.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf_ray.config import LoraConfig
from rlhf_ray.errors import ConfigError, InvariantError
from rlhf_ray.models.adapter_files import (
    HEAD_KEY,
    AdapterFiles,
    adapter_sha256,
    peft_config,
    read_adapter,
    save_adapter,
)
from rlhf_ray.models.adapter_pool import pool_of
from rlhf_ray.models.adapter_targets import (
    compare_shapes,
    fit_tensors,
    linear_layers,
    matches,
    module_of,
    own_keys,
    resolve_parameters,
    resolve_targets,
)
from rlhf_ray.models.lora_compute import adapter_precision, round_products
from rlhf_ray.models.zero3 import gathered, whole_shape

__all__ = [
    "HEAD_KEY",
    "AdapterFiles",
    "adapter_config",
    "adapter_parameters",
    "adapter_sha256",
    "adapter_tensors",
    "add_fresh",
    "add_from_files",
    "as_peft",
    "check_adapter_name",
    "copy_adapter",
    "gradient_checkpointing",
    "load_adapter_tensors",
    "read_adapter",
    "remove_adapter",
    "resolve_targets",
    "rest_on_base",
    "save_adapter",
    "set_trainable",
    "use_adapter",
    "wrap",
]


def check_adapter_name(name: str) -> str:
    """`name`, if it can name an adapter: PEFT and torch trip over dots, parts of "lora_", and names of ModuleDict's methods."""
    if not name or "." in name or name in "lora_" or hasattr(nn.ModuleDict(), name):
        raise ConfigError.at("adapter", f"cannot be called {name!r}", "a name such as policy, value, reward or ad_0001")
    return name


def as_peft(model: nn.Module) -> PeftModel:
    """`model` itself, typed as what `wrap` returned. InvariantError if it has no adapters."""
    if not isinstance(model, PeftModel):
        raise InvariantError.at(type(model).__name__, "has no adapters", "a model that `wrap` returned")
    return model


def wrap(
    model: nn.Module, source: LoraConfig | AdapterFiles, adapter_name: str, *, seed: int | None = None
) -> PeftModel:
    """A PeftModel around `model` (a causal language model or classifier) with one adapter: fresh (B = 0), or from files.

    It is active and trains. seed: draws A from a generator of its own, so that A depends on nothing else; None: torch's global one.
    A loaded adapter has dropout 0. Raises as `resolve_targets` and `add_from_files` do."""
    config, given = _plan(model, source)
    check_adapter_name(adapter_name)
    with _seeded(seed if given is None else 0), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 asks transformers 5.23 by a name on its way out
        peft_model = PeftModel(model, peft_config(config), adapter_name, autocast_adapter_dtype=True)
    _follow_base(peft_model, adapter_name)
    _settle(peft_model, adapter_name, given)
    set_trainable(peft_model, (adapter_name,))
    return peft_model


def add_fresh(
    model: nn.Module, adapter_name: str, lora: LoraConfig, *, seed: int | None = None, trainable: bool = True
) -> None:
    """Add a fresh adapter (B = 0: it changes nothing yet). The active adapter stays the active one."""
    _add(model, adapter_name, lora, seed, trainable)


def add_from_files(model: nn.Module, adapter_name: str, files: AdapterFiles, trainable: bool) -> None:
    """Add a saved adapter, with dropout 0: every tensor of the file must find its place, and every place its tensor.

    An adapter trained on a classifier fits the causal language model of the same trunk, and the other way round.
    ArtifactError naming missing and unmatched keys and wrong shapes; the model is then as it was."""
    _add(model, adapter_name, files, None, trainable)


def remove_adapter(model: nn.Module, adapter_name: str) -> None:
    """Forget an adapter and free its weights. The active adapter stays the active one; it must be another one, and PEFT cannot be
    without any."""
    peft_model: Any = as_peft(model)
    if adapter_name not in peft_model.peft_config or adapter_name in _active(model) or len(peft_model.peft_config) < 2:
        raise InvariantError.at(
            f"adapter {adapter_name}",
            "does not exist, is active, or is the only one",
            ", ".join(peft_model.peft_config),
        )
    active = _active(model)
    peft_model.delete_adapter(adapter_name)
    if _active(model) != active:
        peft_model.base_model.active_adapter = active
    if peft_model.active_adapter not in peft_model.peft_config:
        # PEFT's outermost module reads, in every forward, the configuration of the adapter that it was made with. Which adapters
        # compute is the layers' affair (`_activate`).
        peft_model.active_adapter = next(iter(peft_model.peft_config))


def copy_adapter(model: nn.Module, source: str, target: str, trainable: bool = True) -> None:
    """Make adapter `target` a copy of `source`, adding it if it is not there yet."""
    if target not in as_peft(model).peft_config:
        config = {**adapter_config(model, source), "lora_dropout": 0.0}
        _inject(model, target, config, 0, trainable)
    load_adapter_tensors(model, target, adapter_tensors(model, source))


def load_adapter_tensors(model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor]) -> None:
    """Overwrite the adapter's weights by `tensors` (plain PEFT keys). ArtifactError unless keys and shapes match exactly.

    Under ZeRO-3 a collective: every rank calls it with the same tensors."""
    parameters = adapter_parameters(model, adapter_name)
    given = dict(zip(own_keys(model, tensors), tensors.values()))
    compare_shapes({k: whole_shape(p) for k, p in parameters.items()}, given, f"adapter {adapter_name}")
    with torch.no_grad(), gathered(parameters.values(), change=True):
        for key, parameter in parameters.items():
            parameter.copy_(given[key])


def adapter_config(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    """The adapter's configuration in the form of `AdapterFiles.config`, ready for `save_adapter`."""
    config: Any = as_peft(model).peft_config[adapter_name]
    return {
        "r": config.r,
        "lora_alpha": float(config.lora_alpha),
        "lora_dropout": float(config.lora_dropout),
        "target_modules": sorted(config.target_modules),
        "target_parameters": sorted(config.target_parameters or ()),
        "use_rslora": bool(config.use_rslora),
        "fan_in_fan_out": bool(config.fan_in_fan_out),
        "task_type": None,
        "base_model_name_or_path": config.base_model_name_or_path,
        "revision": config.revision,
    }


def adapter_parameters(model: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    """{plain PEFT key: parameter} of one adapter, in the order of the model's layers."""
    found: dict[str, nn.Parameter] = {}
    for name, layer in lora_layers(model):
        if adapter_name in layer.lora_A:
            found[f"{name}.lora_A.weight"] = layer.lora_A[adapter_name].weight
            found[f"{name}.lora_B.weight"] = layer.lora_B[adapter_name].weight
    if not found:
        raise InvariantError.at(f"adapter {adapter_name}", "no such adapter", ", ".join(as_peft(model).peft_config))
    return found


def adapter_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """{plain PEFT key: float32 copy on the CPU}: what `save_adapter` writes and the sampler loads. A collective under ZeRO-3."""
    parameters = adapter_parameters(model, adapter_name)
    with gathered(parameters.values()):
        found = {k: p.detach().to("cpu", torch.float32, copy=True) for k, p in parameters.items()}
    empty = [k for k, t in found.items() if t.numel() == 0]
    if empty:
        raise InvariantError.at(
            f"adapter {adapter_name}", f"{len(empty)} tensors are empty: partitioned by ZeRO-3 and not gathered"
        )
    return found


def set_trainable(model: nn.Module, adapter_names: tuple[str, ...]) -> None:
    """Gradients for these adapters and for nothing else: not the base, not the other adapters."""
    model.requires_grad_(False)
    for name in adapter_names:
        for parameter in adapter_parameters(model, name).values():
            parameter.requires_grad_(True)


class use_adapter:
    """`with use_adapter(peft_model, "value"): ...` runs forward passes under that adapter; None switches all adapters off, which
    is the base itself, bit for bit. On leaving, the adapter that was active before is active again.

    Which adapters train does not change: every requires_grad flag is the same inside, after, and after an exception. Run the
    backward pass anywhere; under gradient checkpointing, see `gradient_checkpointing`. Not for several threads at once.
    An adapter of a pool beside the model (adapter_pool.py) is put on top of the base by hooks."""

    def __init__(self, model: nn.Module, adapter_name: str | None) -> None:
        pool = pool_of(model)
        self._hooks = None if pool is None or adapter_name not in pool else pool.hooks(str(adapter_name))
        if self._hooks is not None:
            adapter_name = None
        elif adapter_name is not None and adapter_name not in as_peft(model).peft_config:
            raise InvariantError.at(f"adapter {adapter_name}", "no such adapter", ", ".join(as_peft(model).peft_config))
        self._model = model
        self._wanted = [] if adapter_name is None else [adapter_name]
        self._before: list[str] = []

    def __enter__(self) -> None:
        self._before = _active(self._model)
        _activate(self._model, self._wanted)
        if self._hooks is not None:
            self._hooks.register()

    def __exit__(self, *_: object) -> None:
        if self._hooks is not None:
            self._hooks.remove()
        _activate(self._model, self._before)


def rest_on_base(model: nn.Module) -> None:
    """From here on no adapter is active outside of `use_adapter`: for a model that several runs share, each with adapters of its
    own that come and go."""
    _activate(model, [])


def gradient_checkpointing(model: nn.Module) -> None:
    """Recompute activations in the backward pass, each layer under the adapter that its forward pass ran under.

    Without this a joint backward over a policy and a value pass would recompute both under whichever adapter is active then.
    It takes effect in training mode only (dropout is 0, so that mode changes nothing else)."""
    held = weakref.ref(model)  # each layer keeps the function: with the model in it, a base would outlive its last user

    def contexts() -> tuple[Any, Any]:
        the_model = held()
        assert the_model is not None
        active = _active(the_model)
        return nullcontext(), use_adapter(the_model, active[0] if active else None)

    base: Any = as_peft(model).get_base_model()
    base.activation_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})


def _plan(model: nn.Module, source: LoraConfig | AdapterFiles) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
    """The adapter's configuration, and its tensors under this model's keys; all that can be refused is refused here."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    linear = linear_layers(base)
    if isinstance(source, LoraConfig):
        targets = resolve_targets(base, source.target_modules)
        chosen = [m for n, m in linear.items() if any(matches(t, n) for t in targets)]
        config = {
            "r": source.r,
            "lora_alpha": source.lora_alpha,
            "lora_dropout": source.lora_dropout,
            "target_modules": targets,
            "target_parameters": resolve_parameters(base, source.target_parameters),
            "use_rslora": source.use_rslora,
            "fan_in_fan_out": all(isinstance(m, Conv1D) for m in chosen),
        }
        return config, None
    placed, given = fit_tensors(base, source, linear)
    chosen = [linear[module] for key in given if (module := module_of(key)) in linear]
    conv = all(isinstance(m, Conv1D) for m in chosen)
    return {**source.config, "target_modules": placed, "lora_dropout": 0.0, "fan_in_fan_out": conv}, given


def _add(model: nn.Module, name: str, source: LoraConfig | AdapterFiles, seed: int | None, trainable: bool) -> None:
    config, given = _plan(model, source)
    _inject(model, name, config, seed if given is None else 0, trainable)
    _settle(model, name, given)


def _inject(model: nn.Module, name: str, config: dict[str, Any], seed: int | None, trainable: bool) -> None:
    """Add layers for `name`, and undo what PEFT does to the requires_grad flags of the others."""
    check_adapter_name(name)
    if name in as_peft(model).peft_config:
        raise InvariantError.at(f"adapter {name}", "there is one of this name already")
    _check_same_parameters(model, config)
    training = {n for n in as_peft(model).peft_config if _trains(model, n)}
    with _seeded(seed):
        as_peft(model).add_adapter(name, peft_config(config), autocast_adapter_dtype=True)
    _follow_base(model, name)
    set_trainable(model, tuple(sorted(training | ({name} if trainable else set()))))


def _check_same_parameters(model: nn.Module, config: Mapping[str, Any]) -> None:
    """ConfigError for what PEFT cannot do: adapters of different stacked weights on one base."""
    wanted = set(config.get("target_parameters") or ())
    peft_configs: Any = as_peft(model).peft_config
    for name, other in peft_configs.items():
        theirs = set(getattr(other, "target_parameters", None) or ())
        if wanted and theirs and wanted != theirs:
            expected, got = ", ".join(sorted(theirs)), ", ".join(sorted(wanted))
            raise ConfigError.at(
                "target_parameters", f"differ from those of adapter {name} on the same base", expected, got
            )


def _trains(model: nn.Module, name: str) -> bool:
    return any(p.requires_grad for p in adapter_parameters(model, name).values())


def _follow_base(model: nn.Module, name: str) -> None:
    """Multiply the adapter in the precision that its base was loaded for."""
    base: Any = as_peft(model).get_base_model()
    if adapter_precision(base) is not torch.float32:
        for _, layer in lora_layers(model):
            if name in layer.lora_A and not isinstance(layer, ParamWrapper):
                round_products(layer, name)


def _settle(model: nn.Module, name: str, given: Mapping[str, Tensor] | None) -> None:
    """Make sure the adapter is float32, and holds `given`."""
    parameters = adapter_parameters(model, name)
    for parameter in parameters.values():
        if parameter.dtype is not torch.float32:
            parameter.data = parameter.data.float()
    if given is not None:
        load_adapter_tensors(model, name, given)


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Draw from a CPU generator of this seed inside the block, and leave the global one alone. PEFT makes A on the CPU, whatever
    the base's device."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


_layers: weakref.WeakKeyDictionary[PeftModel, tuple[tuple[str, ...], list[tuple[str, Any]]]]
_layers = weakref.WeakKeyDictionary()


def lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """(qualified name, layer), looked up once per set of adapters: walking all modules at every forward would be slow."""
    peft_model = as_peft(model)
    names = tuple(peft_model.peft_config)
    cached = _layers.get(peft_model)
    if cached is None or cached[0] != names:
        found = [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]
        cached = _layers[peft_model] = (names, found)
    return cached[1]


def _active(model: nn.Module) -> list[str]:
    tuner: Any = as_peft(model).base_model
    return list(tuner.active_adapters)


def _activate(model: nn.Module, names: list[str]) -> None:
    """Make `names` (none: adapters off) active in every layer; requires_grad flags are not touched.

    PEFT's own `set_adapter` visits every adapter of every layer to change those flags (measured: 10 ms for 35 layers with four
    adapters, a seventh of the forward pass), so the layers' field is set directly, and read back through the public property."""
    if names == _active(model):
        return
    layers = lora_layers(model)
    for _, layer in layers:
        layer._active_adapter = names
    if layers[-1][1].active_adapters != names:
        raise InvariantError.at("peft", "this version does not let adapters be chosen layer by layer", "peft 0.21")
    tuner: Any = as_peft(model).base_model
    tuner.active_adapter = names
