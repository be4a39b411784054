"""Several LoRA adapters in one batch by two matrix products per layer, however many adapters there are.

For row i with adapter a(i), every adapted layer adds  s_a B_a A_a x_i.  With the A of all adapters on top of each other and their
scaled B side by side, this is  B_all (M_i * (A_all x_i)),  where M_i keeps the entries of a(i) and sets the others to 0: the same
terms. PEFT's own `adapter_names` loops over the adapters in every layer instead. (Stacking: S-LoRA, arXiv:2311.03285, and Punica,
arXiv:2310.18547, which gather the factors by row in a kernel.) Where the ranks of all adapters together are no longer small against
the layers, as in small models with many adapters, each row gets its own factors side by side: batched products of the same terms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from rlhf_ray.models.adapters import lora_layers, use_adapter
from rlhf_ray.models.sharded import is_sharded

BY_ROW_SHARE = 8
"""All adapters' ranks together above an eighth of a layer's width cost more than each row's own factors."""
BY_ROW_BYTES = 1 << 30
"""Copies of factors, one for each row, may take so much memory."""


class StackedRows:
    """Forwards of `peft_model` in which row i uses adapters[i], from the weights that the adapters have now."""

    def __init__(self, peft_model: PeftModel, adapters: Sequence[str | None]) -> None:
        self._model = peft_model
        self._hooks: list[tuple[Any, _Delta | _RowDelta]] = []
        names = list(dict.fromkeys(name for name in adapters if name is not None))
        device = next(peft_model.parameters()).device
        chosen = torch.tensor([-1 if name is None else names.index(name) for name in adapters]).to(device)
        if _prefers_rows([layer for _, layer in lora_layers(peft_model)], names, len(adapters)):
            self._by_row(names, chosen)
            return
        masks: dict[tuple[int, ...], Tensor] = {}
        for _, layer in lora_layers(peft_model):
            here = [(i, name) for i, name in enumerate(names) if name in layer.lora_A]
            if not here:
                continue
            owner = tuple(i for i, name in here for _ in range(layer.r[name]))
            if owner not in masks:
                masks[owner] = (torch.tensor(owner).to(device) != chosen[:, None])[:, None]
            down = torch.cat([layer.lora_A[name].weight for _, name in here])
            up = torch.cat([layer.lora_B[name].weight * layer.scaling[name] for _, name in here], dim=1)
            self._hooks.append((layer, _Delta(down.detach(), up.detach(), masks[owner])))

    def _by_row(self, names: Sequence[str], chosen: Tensor) -> None:
        """Each row's own factors, side by side: as many operations as with one adapter, whatever their number."""
        for _, layer in lora_layers(self._model):
            here = {i: name for i, name in enumerate(names) if name in layer.lora_A}
            if not here:
                continue
            first = layer.lora_A[next(iter(here.values()))].weight
            r, n_out = max(layer.r[name] for name in here.values()), layer.out_features
            down = first.new_zeros(len(names) + 1, first.shape[1], r)  # the last one is of rows without an adapter here
            up = first.new_zeros(len(names) + 1, r, n_out)
            for i, name in here.items():
                down[i, :, : layer.r[name]] = layer.lora_A[name].weight.detach().t()
                up[i, : layer.r[name]] = layer.lora_B[name].weight.detach().t() * layer.scaling[name]
            self._hooks.append((layer, _RowDelta(down[chosen], up[chosen])))

    def __call__(self, **inputs: Any) -> Any:
        handles = [layer.register_forward_hook(delta) for layer, delta in self._hooks]
        try:
            with use_adapter(self._model, None):
                return self._model(**inputs)
        finally:
            for handle in handles:
                handle.remove()


class _Delta:
    """A forward hook: what the adapters add to a layer's output. down: [K, in]. up: [out, K]. foreign: bool[N, 1, K], True on the
    entries of other rows' adapters."""

    def __init__(self, down: Tensor, up: Tensor, foreign: Tensor) -> None:
        self._down, self._up, self._foreign = down.t(), up.t(), foreign

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        inner = (args[0].to(self._down.dtype) @ self._down).masked_fill_(self._foreign, 0)
        return (output + inner @ self._up).to(output.dtype)


def _prefers_rows(layers: Sequence[Any], names: Sequence[str], rows: int) -> bool:
    """Whether each row should get its own factors, by what both forms cost."""
    if len(names) < 3:
        return False
    ranks = [[layer.r[name] for name in names if name in layer.lora_A] for layer in layers]
    widths = [layer.in_features + layer.out_features for layer in layers]
    copies = sum(4 * rows * max(r, default=0) * width for r, width in zip(ranks, widths))
    return copies <= BY_ROW_BYTES and 2 * BY_ROW_SHARE * sum(map(sum, ranks)) > sum(widths)


class _RowDelta:
    """A forward hook: what row i's adapter adds. down: [N, in, r]. up: [N, r, out]; zeros where a row has no adapter."""

    def __init__(self, down: Tensor, up: Tensor) -> None:
        self._down, self._up = down, up

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        inner = torch.bmm(args[0].to(self._down.dtype), self._down)
        return torch.baddbmm(output.to(inner.dtype), inner, self._up).to(output.dtype)


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
    if name in layer.lora_embedding_A or name in layer.lora_variant:
        return False
    if name not in layer.lora_A:
        return True
    down, up = layer.lora_A[name], layer.lora_B[name]
    if not isinstance(down, nn.Linear) or not isinstance(up, nn.Linear) or up.bias is not None:
        return False
    return not is_sharded(down.weight)  # under ZeRO-3 weights are there only while their own module runs
