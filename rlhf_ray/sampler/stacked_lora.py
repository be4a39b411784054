"""Several LoRA adapters in one batch by two matrix products per layer, however many adapters there are.

For row i with adapter a(i), every adapted layer adds  s_a B_a A_a x_i.  With the A of all adapters on top of each other and their
scaled B side by side, this is  B_all (M_i * (A_all x_i)),  where M_i keeps the entries of a(i) and sets the others to 0: the same
terms. PEFT's own `adapter_names` loops over the adapters in every layer instead. (Stacking: S-LoRA, arXiv:2311.03285, and Punica,
arXiv:2310.18547, which gather the factors by row in a kernel.) Where the ranks of all adapters together are no longer small against
the layers, as in small models with many adapters, each row gets its own factors side by side: batched products of the same terms.

Either form is kept while the weights stay the same, since rows come and go at every token: only what a new row brings is copied.
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
from rlhf_ray.models.adapters import lora_layers, use_adapter
from rlhf_ray.models.zero3 import is_sharded

BY_ROW_SHARE = 8
"""All adapters' ranks together above an eighth of a layer's width cost more than each row's own factors."""
BY_ROW_BYTES = 1 << 30
"""Copies of factors, one for each row, may take so much memory."""
KEPT = 2
"""Stacks hold at most so many times the adapters of the batch: those of rows that left cost products with 0."""

Hook = tuple[Any, Callable[..., Any]]


class Stacks:
    """Forwards of `peft_model` in which each row uses an adapter of its own. Build it anew when weights of an adapter change."""

    def __init__(self, peft_model: PeftModel) -> None:
        self._model = peft_model
        self._layers = [layer for _, layer in lora_layers(peft_model)]
        self._shared = _SharedFactors(self._layers)
        self._by_row: dict[str, _RowFactors] = {}

    def forward(self, adapters: Sequence[str | None], stage: str = "") -> Callable[..., Any]:
        """The model as a function for batches whose row i uses adapters[i]; valid until the next call for the same `stage`."""
        names = list(dict.fromkeys(name for name in adapters if name is not None))
        if _prefers_rows(self._layers, names, len(adapters)):
            factors = self._by_row.setdefault(stage, _RowFactors(self._layers))
            return _Hooked(self._model, factors.of(adapters))
        return _Hooked(self._model, self._shared.of(adapters, names))


class _Hooked:
    """The base, with what the adapters add put on top by hooks."""

    def __init__(self, model: PeftModel, hooks: Sequence[Hook]) -> None:
        self._model, self.hooks = model, hooks

    def __call__(self, **inputs: Any) -> Any:
        tokens = inputs["input_ids"].shape[1]
        handles = [layer.register_forward_hook(partial(delta, tokens)) for layer, delta in self.hooks]
        try:
            with use_adapter(self._model, None):
                return self._model(**inputs)
        finally:
            for handle in handles:
                handle.remove()


class _SharedFactors:
    """One stack per layer, of all adapters of the batch and some that were in it before."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self._layers = layers
        self._names: list[str] = []
        self._stacks: list[tuple[Any, Tensor, Tensor, tuple[int, ...]]] = []  # layer, down, up, owner of each entry

    def of(self, adapters: Sequence[str | None], names: Sequence[str]) -> list[Hook]:
        if not set(names) <= set(self._names) or len(self._names) > KEPT * len(names):
            kept = [name for name in self._names if name not in names]
            self._build([*names, *kept[: (KEPT - 1) * len(names)]])
        number = {name: i for i, name in enumerate(self._names)}
        chosen = torch.tensor([-1 if name is None else number[name] for name in adapters])
        masks: dict[tuple[int, ...], Tensor] = {}
        for _, down, _, owner in self._stacks:
            if owner not in masks:
                masks[owner] = (torch.tensor(owner) != chosen[:, None])[:, None].to(down.device)
        return [(layer, _Delta(down, up, masks[owner])) for layer, down, up, owner in self._stacks]

    def _build(self, names: Sequence[str]) -> None:
        self._names, self._stacks = list(names), []
        for layer in self._layers:
            here = [(i, name) for i, name in enumerate(names) if name in layer.lora_A]
            if here:
                down = torch.cat([layer.lora_A[name].weight for _, name in here])
                up = torch.cat([layer.lora_B[name].weight * layer.scaling[name] for _, name in here], dim=1)
                owner = tuple(i for i, name in here for _ in range(layer.r[name]))
                self._stacks.append((layer, down.detach(), up.detach(), owner))


class _Delta:
    """A forward hook: what the adapters add to a layer's output. down: [K, in]. up: [out, K]. foreign: bool[N, 1, K], True on the
    entries of other rows' adapters."""

    def __init__(self, down: Tensor, up: Tensor, foreign: Tensor) -> None:
        self._down, self._up, self._foreign = down.t(), up.t(), foreign

    def __call__(self, tokens: int, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x = _by_row(args[0], len(self._foreign), tokens)
        inner = (x.to(self._down.dtype) @ self._down).masked_fill_(self._foreign, 0)
        return (output + (inner @ self._up).view(output.shape)).to(output.dtype)


def _prefers_rows(layers: Sequence[Any], names: Sequence[str], rows: int) -> bool:
    """Whether each row should get its own factors, by what both forms cost."""
    if len(names) < 3:
        return False
    ranks = [[layer.r[name] for name in names if name in layer.lora_A] for layer in layers]
    widths = [layer.in_features + layer.out_features for layer in layers]
    copies = sum(4 * rows * max(r, default=0) * width for r, width in zip(ranks, widths))
    return copies <= BY_ROW_BYTES and 2 * BY_ROW_SHARE * sum(map(sum, ranks)) > sum(widths)


class _RowFactors:
    """Each row's own factors, side by side in every layer; a row that keeps its adapter keeps its copy."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self._layers = layers
        self._rank = 0
        self._names: list[str | None] = []  # by row, whose factors are there
        self._factors: list[tuple[Any, Tensor, Tensor]] = []  # layer, down [rows, r, in], up [rows, r, out]

    def of(self, adapters: Sequence[str | None]) -> list[Hook]:
        names = set(adapters)
        rank = max(layer.r[n] for layer in self._layers for n in names if n in layer.lora_A)
        if rank > self._rank or len(adapters) > len(self._names):
            self._allocate(max(len(adapters), min(2 * len(self._names), 2 * len(adapters))), max(rank, self._rank))
        for row, name in enumerate(adapters):
            if self._names[row] != name:
                self._put(row, name)
        count = len(adapters)
        return [(layer, _RowDelta(down[:count], up[:count])) for layer, down, up in self._factors]

    def _allocate(self, rows: int, rank: int) -> None:
        """Zeros: rows without an adapter."""
        self._rank, self._names, self._factors = rank, [None] * rows, []
        for layer in self._layers:
            some = next(iter(layer.lora_A.values())).weight
            down = some.new_zeros(rows, rank, layer.in_features)
            self._factors.append((layer, down, some.new_zeros(rows, rank, layer.out_features)))

    def _put(self, row: int, name: str | None) -> None:
        """Where B is 0, whatever finite A there still is adds nothing."""
        for layer, down, up in self._factors:
            r = layer.r[name] if name is not None and name in layer.lora_A else 0
            if r:
                down[row, :r] = layer.lora_A[name].weight.detach()
                torch.mul(layer.lora_B[name].weight.detach().t(), layer.scaling[name], out=up[row, :r])
            if r < self._rank:
                up[row, r:] = 0
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
