"""LoRA adapters beside a base instead of inside its modules, so that adding one is a copy, however many there are.

PEFT makes an object for every layer of every adapter. Here an adapter is one block of numbers: for each group of linear layers of
equal shape the A and the B (transposed) of all its layers, [layers, r, in] and [layers, r, out], so that whatever batches adapters
moves a handful of blocks and not hundreds of matrices. A pool belongs to a PeftModel; `models.adapters.use_adapter` and the sampler
take its names like PEFT's. Adapters on stacked expert weights stay with PEFT (`fits`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from rlhf_ray.errors import ArtifactError, InvariantError
from rlhf_ray.models.adapter_files import AdapterFiles, adapter_sha256, lora_scale
from rlhf_ray.models.adapter_targets import fit_tensors, linear_layers, width_in_out

Hook = tuple[nn.Module, Callable[..., Any]]
"""A linear layer, and a forward hook of it that takes the layer, its inputs and its output."""


@dataclass(frozen=True)
class LayerGroup:
    """Linear layers of one shape. layers: what hooks go on."""

    n_in: int
    n_out: int
    names: tuple[str, ...]
    layers: tuple[nn.Module, ...]

    @property
    def width(self) -> int:
        return self.n_in + self.n_out


def layer_groups(layers: Iterable[tuple[str, nn.Module, int, int]]) -> tuple[LayerGroup, ...]:
    """layers: (name, layer, input width, output width) of each."""
    found: dict[tuple[int, int], list[tuple[str, nn.Module]]] = {}
    for name, layer, n_in, n_out in layers:
        found.setdefault((n_in, n_out), []).append((name, layer))
    return tuple(LayerGroup(*shape, *map(tuple, zip(*members))) for shape, members in found.items())  # type: ignore[arg-type]


@dataclass(frozen=True)
class Factors:
    """Of one adapter, in one group. which: the layers of the group that it adapts; None is all. down: f32[layers, r, in]. up: f32[
    layers, r, out], B transposed, without the scale."""

    which: tuple[int, ...] | None
    down: Tensor
    up: Tensor


@dataclass(frozen=True)
class PackedAdapter:
    """r: its rank.  scale: of B A.  factors: by group; None where it adapts no layer of the group."""

    r: int
    scale: float
    factors: tuple[Factors | None, ...]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._tensors())

    @property
    def device(self) -> torch.device:
        return next(self._tensors()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self._tensors()).dtype

    @property
    def entries(self) -> int:
        """Ranks of all its layers together."""
        return sum(len(f.down) * self.r for f in self.factors if f is not None)

    def to(self, target: torch.device | torch.dtype) -> PackedAdapter:
        """On a device, or in a precision; itself, where that is so already."""
        if all(target in (t.device, t.dtype) for t in self._tensors()):
            return self
        moved = tuple(
            None if f is None else replace(f, down=f.down.to(target), up=f.up.to(target)) for f in self.factors
        )
        return replace(self, factors=moved)

    def _tensors(self) -> Iterator[Tensor]:
        for factors in self.factors:
            if factors is not None:
                yield from (factors.down, factors.up)


def pack(
    groups: Sequence[LayerGroup],
    r: int,
    scale: float,
    halves: Callable[[str, nn.Module], tuple[Tensor, Tensor] | None],
) -> PackedAdapter:
    """halves: of a layer, by name and module: A [r, in] and B [out, r]; None where it is not adapted."""
    packed: list[Factors | None] = []
    for group in groups:
        found = [(i, pair) for i, at in enumerate(zip(group.names, group.layers)) if (pair := halves(*at)) is not None]
        if not found:
            packed.append(None)
            continue
        which = None if len(found) == len(group.names) else tuple(i for i, _ in found)
        down = torch.stack([a.float() for _, (a, _) in found])
        packed.append(Factors(which, down, torch.stack([b.float().t() for _, (_, b) in found])))
    return PackedAdapter(r, scale, tuple(packed))


class AdapterPool:
    """The adapters beside `peft_model`, by name; a name never changes its weights. Builds on the base's linear layers as they are.

    `pack` and `add` may run on any thread, also while others use the model: nothing that is in use changes."""

    def __init__(self, peft_model: PeftModel) -> None:
        model: Any = peft_model
        self._base: Any = model.get_base_model()
        self._linear = linear_layers(self._base)
        self.groups = layer_groups((n, layer, *width_in_out(layer)) for n, layer in self._linear.items())
        self.packed: dict[str, PackedAdapter] = {}
        self._device: torch.device = self._base.get_input_embeddings().weight.device
        _POOLS[peft_model] = self

    @staticmethod
    def fits(files: AdapterFiles) -> bool:
        """Whether an adapter is on linear layers alone."""
        return not files.config.get("target_parameters")

    def pack(self, files: AdapterFiles) -> PackedAdapter:
        """On the CPU. ArtifactError if it does not belong on this base; what is packed is compared with the files' sha256."""
        given = fit_tensors(self._base, files, self._linear)[1]
        config = files.config

        def halves(name: str, layer: nn.Module) -> tuple[Tensor, Tensor] | None:
            key = f"base_model.model.{name}.lora_%s.weight"
            return (given[key % "A"], given[key % "B"]) if key % "A" in given else None

        scale = lora_scale(config["lora_alpha"], config["r"], config["use_rslora"])
        packed = pack(self.groups, config["r"], scale, halves)
        held, own = self.unpacked(packed), {key: theirs for theirs, key in zip(files.tensors, given)}
        sha256 = adapter_sha256({own[key]: held[key] for key in held if key in own}, files.head, files.offset)
        if sha256 != files.sha256:
            what = "the adapter in memory is not the one that was read"
            raise ArtifactError.at(files.path, what, files.sha256, sha256)
        return packed

    def add(self, name: str, packed: PackedAdapter) -> None:
        """Make `name` known, once its weights are on the device."""
        if name in self.packed:
            raise InvariantError.at(f"adapter {name}", "there is one of this name already")
        there = packed.to(self._device)
        if there is not packed and not all(
            torch.equal(a.cpu(), b) for a, b in zip(there._tensors(), packed._tensors())
        ):
            raise InvariantError.at(f"adapter {name}", "the device does not hold the adapter that was read")
        self.packed[name] = there

    def remove(self, name: str) -> None:
        """Between two steps: no row may name it any more."""
        del self.packed[name]

    def __contains__(self, name: object) -> bool:
        return name in self.packed

    def __getitem__(self, name: str) -> PackedAdapter:
        return self.packed[name]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.packed)

    def hooks(self, name: str) -> Hooks:
        """That put one adapter on top of the base."""
        adapter = self.packed[name]
        found: list[Hook] = []
        for group, factors in zip(self.groups, adapter.factors):
            if factors is not None:
                which = range(len(group.layers)) if factors.which is None else factors.which
                found += [
                    (group.layers[i], _Addition(factors.down[j], factors.up[j], adapter.scale))
                    for j, i in enumerate(which)
                ]
        return Hooks(found)

    def unpacked(self, packed: PackedAdapter) -> dict[str, Tensor]:
        """{plain PEFT key of this base: f32 tensor}, without the scale."""
        found: dict[str, Tensor] = {}
        for group, factors in zip(self.groups, packed.factors):
            if factors is not None:
                which = range(len(group.names)) if factors.which is None else factors.which
                for j, i in enumerate(which):
                    found[f"base_model.model.{group.names[i]}.lora_A.weight"] = factors.down[j]
                    found[f"base_model.model.{group.names[i]}.lora_B.weight"] = factors.up[j].t()
        return found


class Hooks:
    """Forward hooks, on and off again."""

    def __init__(self, hooks: Sequence[Hook]) -> None:
        self.hooks = hooks
        self._handles: list[Any] = []

    def register(self) -> None:
        self._handles = [layer.register_forward_hook(hook) for layer, hook in self.hooks]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


class _Addition:
    """y + s B A x. down: [r, in]. up: [r, out]."""

    def __init__(self, down: Tensor, up: Tensor, scale: float) -> None:
        self._down, self._up, self._scale = down.t(), up, scale

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x = args[0]
        inner = x.reshape(-1, x.shape[-1]).to(self._down.dtype) @ self._down
        return add_product(output, inner, self._up, self._scale)


def add_product(output: Tensor, inner: Tensor, up: Tensor, scale: float = 1.0) -> Tensor:
    """output + scale * inner @ up, in the type of `output`.   output: [..., out].   inner: [rows of output, K].   up: [K, out]."""
    flat = output.reshape(-1, output.shape[-1])
    return torch.addmm(flat.to(inner.dtype), inner, up, alpha=scale).to(output.dtype).view(output.shape)


_POOLS: weakref.WeakKeyDictionary[nn.Module, AdapterPool] = weakref.WeakKeyDictionary()


def pool_of(model: nn.Module) -> AdapterPool | None:
    """The pool beside `model`, if it has one."""
    return _POOLS.get(model)
