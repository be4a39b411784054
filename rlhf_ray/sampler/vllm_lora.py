"""Adapters in vLLM's memory: put there from tensors, read back, taken out. No file in between.

vLLM loads adapters from folders only (its RFC 48297 is about the rest), so these functions, run in its worker, build the adapter
with its own classes and register it as its loader would. A name or number of an adapter is never used twice: vLLM finds prompts
that it has read before by the adapter's name, and would take those read under its former weights (vllm#42125).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.errors import ConfigError, InvariantError, Problem

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM can be told is the largest rank."""


def largest_rank(r: int, where: str = "lora.r") -> int:
    """The rank that an engine for adapters of rank `r` is started with. ConfigError if vLLM has none that large."""
    found = next((rank for rank in RANKS if rank >= r), None)
    if found is None:
        raise ConfigError.at(
            where,
            "rank above what vLLM takes",
            f"at most {RANKS[-1]}",
            str(r),
            "lower it, or set rollout.engine: builtin",
        )
    return found


@dataclass(frozen=True)
class ReadyAdapter:
    """An adapter in vLLM's own form, not yet in a slot. model: its LoRAModel.  wanted: what layers must hold for it, by module and
    "a" or "b"."""

    model: Any
    wanted: Mapping[tuple[str, str], Tensor]


def check(worker: Any, config: Mapping[str, Any], keys: Iterable[str], name: str, where: str) -> None:
    """ConfigError for modules or a rank that the engine has not.   keys: plain PEFT keys of adapter `name`.   config: its r.
    where: the field that chose vLLM."""
    loras = worker.model_runner.lora_manager
    manager, most = loras._adapter_manager, loras.lora_config.max_lora_rank
    if config["r"] > most:
        fix = "raise vllm.max_lora_rank" if where == "engine" else ""
        raise ConfigError.at(f"adapter {name}", "rank above the engine's", f"at most {most}", str(config["r"]), fix)
    from vllm.lora.utils import parse_fine_tuned_lora_name

    mapper = _mapper(manager)
    refuse_unknown({parse_fine_tuned_lora_name(key, mapper)[0] for key in keys}, manager, where)


def ready(
    worker: Any, number: int, config: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str, where: str
) -> ReadyAdapter:
    """What `put` takes. Changes nothing, so that rows may be under way meanwhile.

    config: r, lora_alpha, use_rslora.   tensors: plain PEFT keys.   ConfigError as of `check`."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    check(worker, config, tensors, name, where)
    loras = worker.model_runner.lora_manager
    manager = loras._adapter_manager
    model = LoRAModel.from_lora_tensors(
        number,
        {key: tensor.clone() for key, tensor in tensors.items()},  # the scale is multiplied into them
        PEFTHelper(
            r=config["r"],
            lora_alpha=config["lora_alpha"],
            target_modules=list(config["target_modules"]),
            use_rslora=bool(config.get("use_rslora")),
        ),
        device="cpu",
        dtype=loras.lora_config.lora_dtype,
        model_vocab_size=loras.vocab_size,
        weights_mapper=_mapper(manager),
        skip_prefixes=getattr(manager.model, "lora_skip_prefixes", None),
    )
    wanted = {
        (name, part): (getattr(lora, f"lora_{part}") * (lora.scaling if part == "b" else 1.0)).clone()
        for name, lora in model.loras.items()
        for part in "ab"
    }
    return ReadyAdapter(model, wanted)


def put(worker: Any, number: int, adapter: ReadyAdapter) -> None:
    """Register an adapter as `number`, between two steps, and make sure that the layers hold it: InvariantError if they do not."""
    manager = worker.model_runner.lora_manager._adapter_manager
    if len(manager._active_adapters) >= manager.lora_slots:  # vLLM would take the slot of another one, in use or not
        raise InvariantError.at(f"adapter {number}", "all slots of the engine are taken", str(manager.lora_slots))
    manager.add_adapter(adapter.model)
    manager.activate_adapter(number)
    _check_layers(manager, number, adapter.wanted)


def _mapper(manager: Any) -> Any:
    """From names of a checkpoint to vLLM's."""
    mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
    return None if mapper is None else mapper.get_rename_mapper()


def refuse_unknown(names: Iterable[str], manager: Any, where: str) -> None:
    """ConfigError, a line for each, unless the engine can adapt all the modules."""
    packed = {part for parts in manager.packed_modules.values() for part in parts}
    strange = sorted(name for name in names if name not in packed and name not in manager.modules)
    family = type(manager.model).__name__
    ConfigError.raise_all(
        Problem(
            where,
            f"vLLM cannot adapt {name} of {family}",
            "adapters of modules that it can",
            fix=f"choose other lora.target_modules, or set {where}: builtin",
        )
        for name in strange
    )


def layers_of(worker: Any, number: int) -> dict[str, Tensor]:
    """What the layers hold for adapter `number`: every buffer of its slot, zeros too."""
    manager = worker.model_runner.lora_manager._adapter_manager
    return {f"{name}.{part}.{i}": buffer for name, part, i, buffer in _buffers(manager, number)}


def take(worker: Any, number: int) -> None:
    """Forget an adapter and free its slot; nothing if it is not there."""
    worker.model_runner.lora_manager.remove_adapter(number)


def _buffers(manager: Any, number: int) -> Iterator[tuple[str, str, int, Tensor]]:
    """(module, "a" or "b", slice, what its slot holds) of every layer that can be adapted."""
    if number not in manager.lora_index_to_id:
        return
    slot = manager.lora_index_to_id.index(number)
    for name, layer in manager.modules.items():
        for part in "ab":
            stacked = getattr(layer, f"lora_{part}_stacked", None)
            if stacked is None:  # lm_head: its weights are with the logits processor
                continue
            slices = (stacked,) if isinstance(stacked, Tensor) else stacked
            for i, buffer in enumerate(slices):
                yield name, part, i, buffer[slot]


def _check_layers(manager: Any, number: int, wanted: Mapping[tuple[str, str], Tensor]) -> None:
    """InvariantError unless each layer's slot is what was handed over, bit for bit, and zero where nothing was."""
    left = set(wanted)
    for name, part, i, buffer in _buffers(manager, number):
        parts = manager.packed_modules.get(name)
        key = (name, part) if parts is None or (name, part) in wanted else (parts[i], part)
        tensor = wanted.get(key)
        left.discard(key)
        if tensor is not None and key[0] == name and part == "b" and parts is not None:
            start = sum(b.shape[-2] for n, p, j, b in _buffers(manager, number) if (n, p) == (name, part) and j < i)
            tensor = tensor[start : start + buffer.shape[-2]]  # one matrix for several slices
        expected = torch.zeros_like(buffer)
        if tensor is not None:
            rows, columns = tensor.shape
            expected.view(-1, *expected.shape[-2:])[0, :rows, :columns] = tensor.to(expected)
        if not torch.equal(buffer, expected):
            raise InvariantError.at(f"adapter {number}", f"vLLM does not hold what it was given for {name}, {part} {i}")
    if left:
        raise InvariantError.at(f"adapter {number}", f"vLLM took no notice of {len(left)} tensors", got=str(min(left)))
