"""Several LoRA adapters in one batch by two matrix products per layer, however many adapters there are.

For row i with adapter a(i), every adapted layer adds  s_a B_a A_a x_i.  With the A of all adapters on top of each other and their
scaled B side by side, this is  B_all (M_i * (A_all x_i)),  where M_i keeps the entries of a(i) and sets the others to 0: the same
terms. PEFT's own `adapter_names` loops over the adapters in every layer instead. (Stacking: S-LoRA, arXiv:2311.03285, and Punica,
arXiv:2310.18547, which gather the factors by row in a kernel.) Where the ranks of all adapters together are no longer small against
the layers, as in small models with many adapters, each row gets its own factors side by side: batched products of the same terms.

Either form has a buffer for each group of layers of one shape, with places that adapters of any rank take: a row that comes brings
one copy for each group and not one for each layer, and what it finds there already costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from rlhf_ray.errors import InvariantError
from rlhf_ray.models.adapter_pool import AdapterPool, Hook, Hooks, LayerGroup, PackedAdapter, layer_groups, pack
from rlhf_ray.models.adapters import lora_layers, use_adapter
from rlhf_ray.models.zero3 import is_sharded

BY_ROW_SHARE = 8
"""All adapters' ranks together above an eighth of a layer's width cost more than each row's own factors."""
BY_ROW_BYTES = 1 << 30
"""Copies of factors, one for each row, may take so much memory."""
KEPT = 2
"""Stacks are at most so many times as wide as the adapters of the batch: entries of rows that left cost products with 0."""


class Stacks:
    """Forwards of `peft_model` in which each row uses an adapter of its own: of `pool`, or without one of PEFT's.

    Build it anew when weights of an adapter change; those of a pool never do."""

    def __init__(self, peft_model: PeftModel, pool: AdapterPool | None = None) -> None:
        self._model = peft_model
        source = _PeftAdapters(peft_model) if pool is None else pool
        self.groups = source.groups
        self._get: Callable[[str], PackedAdapter] = source.__getitem__
        self._shared = _SharedFactors(self.groups, self._get)
        self._by_row: dict[str, _RowFactors] = {}

    def forward(self, adapters: Sequence[str | None], stage: str = "") -> Callable[..., Any]:
        """The model as a function for batches whose row i uses adapters[i]; valid until the next call for the same `stage`."""
        names = list(dict.fromkeys(name for name in adapters if name is not None))
        packed = [self._get(name) for name in names]
        if _prefers_rows(self.groups, packed, len(adapters)):
            factors = self._by_row.setdefault(stage, _RowFactors(self.groups, self._get))
            return _Hooked(self._model, factors.of(adapters, max(one.r for one in packed)))
        return _Hooked(self._model, self._shared.of(adapters, dict(zip(names, packed))))


class _PeftAdapters:
    """The adapters inside PEFT's layers, copied as they are asked for."""

    def __init__(self, peft_model: PeftModel) -> None:
        # Adapters of stacked expert weights are never stacked themselves (`can_stack`), but others may be beside them.
        layers = [(name, layer) for name, layer in lora_layers(peft_model) if not isinstance(layer, ParamWrapper)]
        self.groups = layer_groups((name, layer, layer.in_features, layer.out_features) for name, layer in layers)
        self._packed: dict[str, PackedAdapter] = {}

    def __getitem__(self, name: str) -> PackedAdapter:
        if name not in self._packed:
            layers: list[Any] = [layer for group in self.groups for layer in group.layers]
            r = max((layer.r[name] for layer in layers if name in layer.lora_A), default=0)
            self._packed[name] = pack(self.groups, r, 1.0, partial(_peft_halves, adapter=name, r=r))
        return self._packed[name]


def _peft_halves(name: str, layer: Any, adapter: str, r: int) -> tuple[Tensor, Tensor] | None:
    """Scaled, and filled up with zeros to rank r."""
    if adapter not in layer.lora_A:
        return None
    down = layer.lora_A[adapter].weight.detach()
    up = layer.lora_B[adapter].weight.detach() * layer.scaling[adapter]
    missing = r - len(down)
    return nn.functional.pad(down, (0, 0, 0, missing)), nn.functional.pad(up, (0, missing))


class _Hooked:
    """The base, with what the adapters add put on top by hooks."""

    def __init__(self, model: PeftModel, hooks: Sequence[Hook]) -> None:
        self._model, self.hooks = model, hooks

    def __call__(self, **inputs: Any) -> Any:
        tokens = inputs["input_ids"].shape[1]
        hooks = Hooks([(layer, partial(delta, tokens)) for layer, delta in self.hooks])
        hooks.register()
        try:
            with use_adapter(self._model, None):
                return self._model(**inputs)
        finally:
            hooks.remove()


class _SharedFactors:
    """One stack per group of layers, with places of any rank: of the adapters of the batch, and of some that were in it before."""

    def __init__(self, groups: Sequence[LayerGroup], get: Callable[[str], PackedAdapter]) -> None:
        self._groups, self._get = groups, get
        self._places: dict[str, tuple[int, int]] = {}  # first entry, one past the last
        self._size = 0
        self._buffers: list[tuple[Tensor, Tensor]] = []  # down [layers, size, in], up [layers, size, out], scaled

    def of(self, adapters: Sequence[str | None], packed: dict[str, PackedAdapter]) -> list[Hook]:
        needed = sum(one.r for one in packed.values())
        if self._size > KEPT * needed or not self._place(packed):
            self._places, self._size = {}, needed + needed // KEPT
            some = next(f for one in packed.values() for f in one.factors if f is not None).down
            self._buffers = [
                (some.new_zeros(len(g.names), self._size, g.n_in), some.new_zeros(len(g.names), self._size, g.n_out))
                for g in self._groups
            ]
            self._place(packed)
        foreign = torch.ones(len(adapters), 1, self._size, dtype=torch.bool)
        for row, name in enumerate(adapters):
            if name is not None:
                foreign[row, :, slice(*self._places[name])] = False
        foreign = foreign.to(self._buffers[0][0].device)
        return [
            (layer, _Delta(down[i], up[i], foreign))
            for group, (down, up) in zip(self._groups, self._buffers)
            for i, layer in enumerate(group.layers)
        ]

    def _place(self, packed: dict[str, PackedAdapter]) -> bool:
        """Find places for all of them, over those of adapters that are not among them; False if there is no room."""
        kept = {name: place for name, place in self._places.items() if name in packed}
        coming = [name for name in packed if name not in kept]
        for name in sorted(coming, key=lambda n: -packed[n].r):
            start = 0
            for first, end in sorted(kept.values()):
                if first - start >= packed[name].r:
                    break
                start = max(start, end)
            if start + packed[name].r > self._size:
                return False
            kept[name] = start, start + packed[name].r
        taken = {i for name in coming for i in range(*kept[name])}
        stays = {n: p for n, p in self._places.items() if n not in kept and not taken.intersection(range(*p))}
        self._places = stays | kept
        for name in coming:
            self._fill(packed[name], *kept[name])
        return True

    def _fill(self, adapter: PackedAdapter, first: int, end: int) -> None:
        for (down, up), factors in zip(self._buffers, adapter.factors):
            if factors is None or factors.which is not None:
                up[:, first:end] = 0  # where B is 0, whatever finite A there still is adds nothing
            if factors is not None and factors.which is None:
                down[:, first:end] = factors.down
                torch.mul(factors.up, adapter.scale, out=up[:, first:end])
            elif factors is not None:
                which = list(factors.which or ())
                down[which, first:end] = factors.down
                up[which, first:end] = factors.up * adapter.scale


class _Delta:
    """A forward hook: what the adapters add to a layer's output. down: [K, in]. up: [K, out]. foreign: bool[N, 1, K], True on the
    entries of other rows' adapters."""

    def __init__(self, down: Tensor, up: Tensor, foreign: Tensor) -> None:
        self._down, self._up, self._foreign = down.t(), up, foreign

    def __call__(self, tokens: int, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x = _by_row(args[0], len(self._foreign), tokens)
        inner = (x.to(self._down.dtype) @ self._down).masked_fill_(self._foreign, 0)
        return (output + (inner @ self._up).view(output.shape)).to(output.dtype)


def _prefers_rows(groups: Sequence[LayerGroup], packed: Sequence[PackedAdapter], rows: int) -> bool:
    """Whether each row should get its own factors, by what both forms cost."""
    if len(packed) < 3:
        return False
    widths = sum(group.width * len(group.names) for group in groups)
    copies = 4 * rows * max(one.r for one in packed) * widths
    return copies <= BY_ROW_BYTES and 2 * BY_ROW_SHARE * sum(one.entries for one in packed) > widths


class _RowFactors:
    """Each row's own factors, side by side in every layer; a row that keeps its adapter keeps its copy."""

    def __init__(self, groups: Sequence[LayerGroup], get: Callable[[str], PackedAdapter]) -> None:
        self._groups, self._get = groups, get
        self._rank = 0
        self._names: list[str | None] = []  # by row, whose factors are there
        self._buffers: list[
            tuple[Tensor, Tensor]
        ] = []  # down [rows, layers, rank, in], up [rows, layers, rank, out], scaled
        self._hooks: list[Hook] = []  # of so many rows as were asked for last

    def of(self, adapters: Sequence[str | None], rank: int) -> list[Hook]:
        """rank: the largest of the adapters."""
        count = len(adapters)
        if rank > self._rank or count > len(self._names):
            self._allocate(max(count, min(2 * len(self._names), 2 * count)), max(rank, self._rank), adapters)
        for row, name in enumerate(adapters):
            if self._names[row] != name:
                self._put(row, name)
        if not self._hooks or len(self._hooks[0][1]._up) != count:  # type: ignore[attr-defined]  # a _RowDelta
            self._hooks = [
                (layer, _RowDelta(down[:count, i], up[:count, i]))
                for group, (down, up) in zip(self._groups, self._buffers)
                for i, layer in enumerate(group.layers)
            ]
        return self._hooks

    def _allocate(self, rows: int, rank: int, adapters: Sequence[str | None]) -> None:
        """Zeros: rows without an adapter."""
        self._rank, self._names, self._hooks = rank, [None] * rows, []
        packed = self._get(next(name for name in adapters if name is not None))
        some = next(f for f in packed.factors if f is not None).down
        self._buffers = [
            (
                some.new_zeros(rows, len(group.names), rank, group.n_in),
                some.new_zeros(rows, len(group.names), rank, group.n_out),
            )
            for group in self._groups
        ]

    def _put(self, row: int, name: str | None) -> None:
        """Where B is 0, whatever finite A there still is adds nothing."""
        adapter = None if name is None else self._get(name)
        for group, (down, up) in enumerate(self._buffers):
            factors = None if adapter is None else adapter.factors[group]
            if adapter is None or factors is None:
                up[row] = 0
                continue
            r = adapter.r
            if factors.which is None:
                down[row, :, :r] = factors.down
                torch.mul(factors.up, adapter.scale, out=up[row, :, :r])
                up[row, :, r:] = 0
            else:
                up[row] = 0
                which = list(factors.which)
                down[row, which, :r] = factors.down
                up[row, which, :r] = factors.up * adapter.scale
        self._names[row] = name


class _RowDelta:
    """A forward hook: what row i's adapter adds. down: [N, r, in]. up: [N, r, out]; zeros where a row has no adapter."""

    def __init__(self, down: Tensor, up: Tensor) -> None:
        self._down, self._up = down.transpose(1, 2), up

    def __call__(self, tokens: int, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x = _by_row(args[0], len(self._up), tokens)
        inner = torch.bmm(x.to(self._down.dtype), self._down)
        base = output.reshape(*x.shape[:2], -1).to(inner.dtype)
        return torch.baddbmm(base, inner, self._up).to(output.dtype).view(output.shape)


def _by_row(x: Tensor, rows: int, tokens: int) -> Tensor:
    """[rows, K, D] of a layer's input: [rows, tokens, D] in most layers, with a dimension of heads in some, and in others with rows
    and tokens as one dimension (experts, OPT).

    InvariantError for any other form: which row it belongs to is not known."""
    if x.shape[0] not in (rows, rows * tokens):
        expected = f"first dimension {rows} or {rows * tokens}"
        raise InvariantError.at("a linear layer's input", "cannot be told apart by row", expected, str(tuple(x.shape)))
    return x.reshape(rows, -1, x.shape[-1])


def can_stack(peft_model: PeftModel, name: str) -> bool:
    """Whether an adapter is plain LoRA on linear layers, whole and finite. Sums over all adapters, most of them times 0, would
    spread one adapter's nan to the rows of all others."""
    if getattr(peft_model.peft_config[name], "modules_to_save", None):
        return False
    layers = [layer for _, layer in lora_layers(peft_model)]
    if not all(_is_plain(layer, name) for layer in layers):
        return False
    sums = [f[name].weight.sum() for layer in layers if name in layer.lora_A for f in (layer.lora_A, layer.lora_B)]
    return not sums or bool(torch.stack(sums).isfinite().all())


def _is_plain(layer: LoraLayer, name: str) -> bool:
    if isinstance(layer, ParamWrapper) and name in layer.lora_A:
        return False
    if name in layer.lora_embedding_A or name in layer.lora_variant:
        return False
    if name not in layer.lora_A:
        return True
    down, up = layer.lora_A[name], layer.lora_B[name]
    if not isinstance(down, nn.Linear) or not isinstance(up, nn.Linear) or up.bias is not None:
        return False
    return not is_sharded(down.weight)  # under ZeRO-3 weights are there only while their own module runs
