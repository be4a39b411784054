"""Several LoRA adapters in one batch by two products per layer, however many adapters there are.

For row i with adapter a(i), every adapted layer adds  s_a B_a A_a x_i.  PEFT's own `adapter_names` loops over the adapters in every
layer. Here the A of all adapters of the batch lie on top of each other and their scaled B side by side (factor_pages.py), in one of
three forms that compute the same terms:

- B_all (M_i * (A_all x_i)),  where M_i keeps the entries of a(i) and sets the others to 0 (stacking: S-LoRA, arXiv:2311.03285),
  which computes rows x adapters products of which one a row is wanted. Two adapters always.
- On a CPU in float32 each row is multiplied with its own entries alone, where they lie: a product of which only those entries are
  computed, and a sum of the rows of B that belong to them. (Gathering factors by row: Punica's kernels, arXiv:2310.18547; here by
  PyTorch's own, `sampled_addmm` and `embedding_bag`.) benchmarks/mixed_adapters.py compares the forms.
- Elsewhere, where there are so many of both that the first form costs more, each row gets its own factors side by side, in batched
  products.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from rlhf_ray.errors import InvariantError
from rlhf_ray.models.adapter_pool import (
    AdapterPool,
    Hook,
    Hooks,
    LayerGroup,
    PackedAdapter,
    add_product,
    layer_groups,
    pack,
)
from rlhf_ray.models.adapters import lora_layers, use_adapter
from rlhf_ray.models.lora_compute import adapter_precision
from rlhf_ray.models.zero3 import is_sharded
from rlhf_ray.sampler.factor_pages import FactorPages, Key

BY_ROW_SHARE = 8
"""All adapters' ranks together above an eighth of a layer's width cost more than each row's own factors, on a GPU."""
BY_ROW_BYTES = 1 << 30
"""Copies of factors, one for each row, may take so much memory."""
PAGE = 4
"""Entries of a page of shared factors: a rank that is no multiple of it has some that are 0."""

warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")


class Stacks:
    """Forwards of `peft_model` in which each row uses an adapter of its own: of `pool`, or without one of PEFT's.

    Build it anew when weights of an adapter change; those of a pool never do."""

    def __init__(self, peft_model: PeftModel, pool: AdapterPool | None = None) -> None:
        self._model = peft_model
        source = _PeftAdapters(peft_model) if pool is None else pool
        self.groups = source.groups
        self._get: Callable[[str], PackedAdapter] = source.__getitem__
        self._forms: dict[type[_Form], _Form] = {}

    def forward(self, adapters: Sequence[str | None], stage: str = "") -> Callable[..., Any]:
        """The model as a function for batches whose row i uses adapters[i]; valid until the next call for the same `stage`."""
        packed = [self._get(name) for name in adapters if name is not None]
        distinct = list({id(one): one for one in packed}.values())
        kind = form_of(self.groups, distinct, packed)
        form = self._forms.get(kind)
        if form is None:
            form = self._forms[kind] = kind(self.groups, self._get)
        return _Hooked(self._model, form.of(adapters, stage))

    def drop(self, stage: str) -> None:
        """Let go of what is kept for a stage."""
        for form in self._forms.values():
            form.pages.pop(stage, None)


class _PeftAdapters:
    """The adapters inside PEFT's layers, copied as they are asked for."""

    def __init__(self, peft_model: PeftModel) -> None:
        # Adapters of stacked expert weights are never stacked themselves (`can_stack`), but others may be beside them.
        layers = [(name, layer) for name, layer in lora_layers(peft_model) if not isinstance(layer, ParamWrapper)]
        model: Any = peft_model
        self._precision = adapter_precision(model.get_base_model())
        self.groups = layer_groups((name, layer, layer.in_features, layer.out_features) for name, layer in layers)
        self._packed: dict[str, PackedAdapter] = {}

    def __getitem__(self, name: str) -> PackedAdapter:
        if name not in self._packed:
            layers: list[Any] = [layer for group in self.groups for layer in group.layers]
            r = max((layer.r[name] for layer in layers if name in layer.lora_A), default=0)
            packed = pack(self.groups, r, 1.0, partial(_peft_halves, adapter=name, r=r))
            self._packed[name] = packed.to(self._precision)
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


class _Form(ABC):
    """Hooks for batches, one after the other, of adapters that `get` finds. pages: by stage."""

    def __init__(self, groups: Sequence[LayerGroup], get: Callable[[str], PackedAdapter]) -> None:
        self._groups, self._get = groups, get
        self.pages: dict[str, Any] = {}

    @abstractmethod
    def of(self, adapters: Sequence[str | None], stage: str) -> list[Hook]: ...


class _OwnEntries(_Form):
    """Each row is multiplied with the entries of its own adapter, where they lie among those of the others. All stages share them,
    so that what the prompt of a row brought is there for its reply. pages: the keys that a stage holds."""

    def __init__(self, groups: Sequence[LayerGroup], get: Callable[[str], PackedAdapter]) -> None:
        super().__init__(groups, get)
        self._factors = FactorPages(groups, get, PAGE, unused_are_read=False)

    def of(self, adapters: Sequence[str | None], stage: str) -> list[Hook]:
        self.pages[stage] = {(name, 0) for name in adapters if name is not None}
        others = [keys for other, keys in self.pages.items() if other != stage]
        pages = self._factors.of(sorted(self.pages[stage]), set().union(*others))
        entries = {
            name: [entry for page in own for entry in range(page * PAGE, (page + 1) * PAGE)][: self._get(name).r]
            for (name, _), own in pages.items()
        }
        size = self._factors.buffers[0][0].shape[1]
        rows = _RowEntries([[] if name is None else entries[name] for name in adapters], size)
        return [
            (layer, _OwnEntriesDelta(down[i], up[i], rows))
            for group, (down, up) in zip(self._groups, self._factors.buffers)
            for i, layer in enumerate(group.layers)
        ]


class _RowEntries:
    """Which of `size` entries each row of a batch is multiplied with, for inputs of one line a row or of several."""

    def __init__(self, rows: Sequence[list[int]], size: int) -> None:
        self._rows, self._size = rows, size
        self._by_lines: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def of(self, lines: int) -> tuple[Tensor, Tensor, Tensor]:
        """entries: i32[n], of all lines.  starts: i32[rows * lines + 1], where those of a line begin.  The same as a sparse matrix,
        f32[rows * lines, size], of zeros."""
        if lines not in self._by_lines:
            entries = torch.cat([torch.tensor(row, dtype=torch.int32).repeat(lines) for row in self._rows])
            counts = torch.tensor([len(row) for row in self._rows], dtype=torch.int32).repeat_interleave(lines)
            starts = nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
            shape = len(counts), self._size
            matrix = torch.sparse_csr_tensor(starts, entries, torch.zeros(len(entries)), shape, check_invariants=False)
            self._by_lines[lines] = entries, starts, matrix
        return self._by_lines[lines]


class _OwnEntriesDelta:
    """A forward hook: what row i's adapter adds. down: f32[K, in]. up: f32[K, out], of all adapters."""

    def __init__(self, down: Tensor, up: Tensor, rows: _RowEntries) -> None:
        self._down, self._up, self._rows = down.t(), up, rows

    def __call__(self, tokens: int, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x = _by_row(args[0], len(self._rows), tokens).to(self._down.dtype)
        entries, starts, wanted = self._rows.of(x.shape[1])
        inner = torch.sparse.sampled_addmm(wanted, x.reshape(-1, x.shape[-1]), self._down, beta=0.0).values()
        added = torch.embedding_bag(self._up, entries, starts, False, 0, False, inner, True)[0]
        return added.add_(output.reshape(added.shape)).to(output.dtype).view(output.shape)


class _SharedFactors(_Form):
    """One stack per group of layers: of the adapters of the batch, and of some that were in it before."""

    def of(self, adapters: Sequence[str | None], stage: str) -> list[Hook]:
        names = list(dict.fromkeys(name for name in adapters if name is not None))
        if stage not in self.pages:
            self.pages[stage] = FactorPages(self._groups, self._get, PAGE)
        factors: FactorPages = self.pages[stage]
        pages = factors.of([(name, 0) for name in names])
        top = 1 + max((page for own in pages.values() for page in own), default=-1)
        whose = [-1] * top
        for number, own in enumerate(pages.values()):
            for page in own:
                whose[page] = number
        wanted = torch.tensor([-2 if name is None else names.index(name) for name in adapters])
        foreign = (torch.tensor(whose) != wanted[:, None]).repeat_interleave(PAGE, dim=1)[:, None]
        foreign, size = foreign.to(factors.buffers[0][0].device), top * PAGE
        return [
            (layer, _Delta(down[i, :size], up[i, :size], foreign))
            for group, (down, up) in zip(self._groups, factors.buffers)
            for i, layer in enumerate(group.layers)
        ]


class _Delta:
    """A forward hook: what the adapters add to a layer's output. down: [K, in]. up: [K, out]. foreign: bool[N, 1, K], True on the
    entries of other rows' adapters."""

    def __init__(self, down: Tensor, up: Tensor, foreign: Tensor) -> None:
        self._down, self._up, self._foreign = down.t(), up, foreign

    def __call__(self, tokens: int, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x = _by_row(args[0], len(self._foreign), tokens)
        inner = x.reshape(-1, x.shape[-1]).to(self._down.dtype) @ self._down
        inner.view(*x.shape[:2], -1).masked_fill_(self._foreign, 0)
        return add_product(output, inner, self._up)


class _RowFactors(_Form):
    """Each row's own factors, all of the largest rank. A row keeps its copy as long as it is in the batch, at whichever place of
    it."""

    def of(self, adapters: Sequence[str | None], stage: str) -> list[Hook]:
        copies: Counter[str] = Counter()
        rows: dict[Key, int] = {}
        for row, name in enumerate(adapters):
            if name is not None:
                rows[name, copies[name]] = row
                copies[name] += 1
        rank = max(self._get(name).r for name, _ in rows)
        if stage not in self.pages or rank > self.pages[stage].unit:
            self.pages[stage] = FactorPages(self._groups, self._get, rank)
        factors: FactorPages = self.pages[stage]
        row_of = {page: rows[key] for key, own in factors.of([*rows]).items() for page in own}
        count = 1 + max(row_of, default=-1)
        factors.clear(page for page in range(count) if page not in row_of)  # 0, so that the first row may have them
        index = torch.tensor([row_of.get(page, 0) for page in range(count)]).to(factors.buffers[0][0].device)
        return [
            (layer, _RowDelta(down[i, :count], up[i, :count], index, len(adapters)))
            for group, buffers in zip(self._groups, factors.buffers)
            for down, up in [[one.unflatten(1, (-1, factors.unit)) for one in buffers]]
            for i, layer in enumerate(group.layers)
        ]


class _RowDelta:
    """A forward hook: what row i's adapter adds. down: [P, r, in]. up: [P, r, out]. row_of: i64[P], of the rows 0 to
    `rows`."""

    def __init__(self, down: Tensor, up: Tensor, row_of: Tensor, rows: int) -> None:
        self._down, self._up, self._row_of, self._rows = down.transpose(1, 2), up, row_of, rows

    def __call__(self, tokens: int, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x = _by_row(args[0], self._rows, tokens).to(self._down.dtype)
        inner = torch.bmm(x.index_select(0, self._row_of), self._down)
        base = output.reshape(*x.shape[:2], -1).to(inner.dtype)
        return base.index_add(0, self._row_of, torch.bmm(inner, self._up)).to(output.dtype).view(output.shape)


def form_of(
    groups: Sequence[LayerGroup], distinct: Sequence[PackedAdapter], packed: Sequence[PackedAdapter]
) -> type[_Form]:
    """What costs least. distinct: adapters of the rows, packed: of each row that has one."""
    one = distinct[0]
    if len(distinct) < 3:
        return _SharedFactors
    if one.device.type == "cpu" and one.dtype is torch.float32:
        return _OwnEntries
    widths = sum(group.width * len(group.names) for group in groups)
    copies = 4 * len(packed) * max(one.r for one in distinct) * widths
    if copies > BY_ROW_BYTES:
        return _SharedFactors
    return _RowFactors if 2 * BY_ROW_SHARE * sum(one.entries for one in distinct) > widths else _SharedFactors


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
