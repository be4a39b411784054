"""Several LoRA adapters in one batch by two matrix products per layer, however many adapters there are.

For row i with adapter a(i), every adapted layer adds  s_a B_a A_a x_i.  With the A of all adapters on top of each other and their
scaled B side by side, this is  B_all (M_i * (A_all x_i)),  where M_i keeps the entries of a(i) and sets the others to 0: the same
terms. PEFT's own `adapter_names` loops over the adapters in every layer instead. (Stacking: S-LoRA, arXiv:2311.03285, and Punica,
arXiv:2310.18547, which gather the factors by row in a kernel.) That computes rows x adapters products of which one a row is wanted.
Where there are so many of both that this costs more, each row gets its own factors side by side: batched products of the same
terms, in pieces of one rank, so that a row of rank 4 does not cost as much as one of rank 64.

Either form has a buffer for each group of layers of one shape, in pages that adapters of any rank take: a row that comes brings a
copy for each group and not one for each layer, and what it finds there already costs nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
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

PIECE = 8
"""Rank of a piece of a row's own factors on a CPU: adapters of rank 4 fill half of one, those of rank 64 have eight."""
BY_ROW_SPEED = 14
"""Multiplications of shared factors that take as long as one of a row's own, where a row is one token: the former are products of
matrices, the latter wait for memory (measured on two AVX-512 cores, layers of 64 to 2048, ranks 4 to 64)."""
BY_ROW_SHARE = 8
"""On a GPU: all adapters' ranks together above an eighth of a layer's width cost more than each row's own factors."""
BY_ROW_BYTES = 1 << 30
"""Copies of factors, one for each row, may take so much memory."""
PAGE = 4
"""Entries of a page of shared factors: a rank that is no multiple of it has some that are 0."""
KEPT = 4
SMALL = 64 << 20
"""Buffers of more bytes than SMALL are at most KEPT times as large as the adapters of the batch."""


class Stacks:
    """Forwards of `peft_model` in which each row uses an adapter of its own: of `pool`, or without one of PEFT's.

    Build it anew when weights of an adapter change; those of a pool never do."""

    def __init__(self, peft_model: PeftModel, pool: AdapterPool | None = None) -> None:
        self._model = peft_model
        source = _PeftAdapters(peft_model) if pool is None else pool
        self.groups = source.groups
        self._get: Callable[[str], PackedAdapter] = source.__getitem__
        self._forms: dict[
            str, tuple[_SharedFactors, _RowFactors]
        ] = {}  # by stage: one would replace what another has placed

    def forward(self, adapters: Sequence[str | None], stage: str = "", tokens: int = 1) -> Callable[..., Any]:
        """The model as a function for batches whose row i uses adapters[i]; valid until the next call for the same `stage`.

        tokens: of each row, as far as they are known."""
        packed = [self._get(name) for name in adapters if name is not None]
        distinct = list({id(one): one for one in packed}.values())
        shared, by_row = self._forms.setdefault(
            stage, (_SharedFactors(self.groups, self._get), _RowFactors(self.groups, self._get))
        )
        unit = piece_rank(distinct)
        if _prefers_rows(self.groups, distinct, packed, tokens, unit):
            return _Hooked(self._model, by_row.of(adapters, unit))
        return _Hooked(self._model, shared.of(adapters))

    def drop(self, stage: str) -> None:
        """Let go of the buffers of a stage."""
        self._forms.pop(stage, None)


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


Key = tuple[str, int]
"""An adapter's name, and which of its copies."""


class _Pages:
    """Buffers for each group of layers, down [layers, entries, in] and up [layers, entries, out] (scaled), cut into pages of `unit`
    entries, of which an adapter takes as many as its rank needs, wherever they are (as S-LoRA's unified paging). What is there
    already is not copied again; those that come take the first pages that no other one in the batch has, so that the pages in use
    are the first ones."""

    def __init__(self, groups: Sequence[LayerGroup], get: Callable[[str], PackedAdapter], unit: int) -> None:
        self._groups, self._get, self.unit = groups, get, unit
        self.buffers: list[tuple[Tensor, Tensor]] = []
        self._owners: list[Key | None] = []  # by page: whose factors are there, of this batch or of one before
        self._pages: dict[Key, list[int]] = {}

    def of(self, keys: Sequence[Key]) -> dict[Key, list[int]]:
        """The pages of each."""
        packed = {key: self._get(key[0]) for key in keys}
        counts = {key: -(-one.r // self.unit) for key, one in packed.items()}
        needed = sum(counts.values())
        is_wasteful = len(self._owners) > KEPT * needed and sum(b.nbytes for pair in self.buffers for b in pair) > SMALL
        if needed > len(self._owners) or is_wasteful:
            self._allocate(needed + needed // 2, next(iter(packed.values())))
        held = {page for key in keys for page in self._pages.get(key, ())}
        free = (page for page in range(len(self._owners)) if page not in held)
        for key in packed:
            if key not in self._pages:
                self._take(key, list(islice(free, counts[key])))
                self._fill(packed[key], self._pages[key])
        return {key: self._pages[key] for key in keys}

    def clear(self, pages: Iterable[int]) -> None:
        """Set them to 0, where they are not."""
        for page in pages:
            if self._owners[page] is not None:
                self._take(None, [page])
                self._zero(page * self.unit, (page + 1) * self.unit)

    def _allocate(self, pages: int, like: PackedAdapter) -> None:
        some = next(factors for factors in like.factors if factors is not None).down
        shapes = [(len(g.names), pages * self.unit, g) for g in self._groups]
        self.buffers = [(some.new_zeros(n, k, g.n_in), some.new_zeros(n, k, g.n_out)) for n, k, g in shapes]
        self._owners, self._pages = [None] * pages, {}

    def _take(self, key: Key | None, pages: list[int]) -> None:
        for page in pages:
            before = self._owners[page]
            if before is not None and page in self._pages.get(before, ()):
                del self._pages[before]  # what is in its other pages is of no use
            self._owners[page] = key
        if key is not None:
            self._pages[key] = pages

    def _zero(self, first: int, end: int) -> None:
        for down, up in self.buffers:
            down[:, first:end] = 0
            up[:, first:end] = 0

    def _fill(self, adapter: PackedAdapter, pages: Sequence[int]) -> None:
        done, unit = 0, self.unit
        for first, end in _runs(pages):
            own = slice(done, min(done + (end - first) * unit, adapter.r))
            there = slice(first * unit, first * unit + own.stop - own.start)
            is_whole = there.stop == end * unit
            for (down, up), factors in zip(self.buffers, adapter.factors):
                if factors is None or factors.which is not None or not is_whole:
                    down[:, first * unit : end * unit] = 0
                    up[:, first * unit : end * unit] = 0
                if factors is not None and factors.which is None:
                    down[:, there] = factors.down[:, own]
                    torch.mul(factors.up[:, own], adapter.scale, out=up[:, there])
                elif factors is not None:
                    which = list(factors.which or ())
                    down[which, there] = factors.down[:, own]
                    up[which, there] = factors.up[:, own] * adapter.scale
            done = own.stop


def _runs(pages: Sequence[int]) -> Iterator[tuple[int, int]]:
    """
    >>> list(_runs([3, 4, 5, 9]))
    [(3, 6), (9, 10)]
    """
    first = 0
    for i in range(1, len(pages) + 1):
        if i == len(pages) or pages[i] != pages[i - 1] + 1:
            yield pages[first], pages[i - 1] + 1
            first = i


class _SharedFactors:
    """One stack per group of layers: of the adapters of the batch, and of some that were in it before."""

    def __init__(self, groups: Sequence[LayerGroup], get: Callable[[str], PackedAdapter]) -> None:
        self._groups, self._pages = groups, _Pages(groups, get, PAGE)

    def of(self, adapters: Sequence[str | None]) -> list[Hook]:
        names = list(dict.fromkeys(name for name in adapters if name is not None))
        pages = self._pages.of([(name, 0) for name in names])
        top = 1 + max((page for own in pages.values() for page in own), default=-1)
        whose = [-1] * top
        for number, own in enumerate(pages.values()):
            for page in own:
                whose[page] = number
        wanted = torch.tensor([-2 if name is None else names.index(name) for name in adapters])
        foreign = (torch.tensor(whose) != wanted[:, None]).repeat_interleave(self._pages.unit, dim=1)[:, None]
        foreign, size = foreign.to(self._pages.buffers[0][0].device), top * self._pages.unit
        return [
            (layer, _Delta(down[i, :size], up[i, :size], foreign))
            for group, (down, up) in zip(self._groups, self._pages.buffers)
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


class _RowFactors:
    """Each row's own factors, in pieces of one rank: a row of a larger rank has several. A row costs what its own rank costs, and
    keeps its copy as long as it is in the batch, at whichever place of it."""

    def __init__(self, groups: Sequence[LayerGroup], get: Callable[[str], PackedAdapter]) -> None:
        self._groups, self._get = groups, get
        self._pages = _Pages(groups, get, 1)

    def of(self, adapters: Sequence[str | None], unit: int) -> list[Hook]:
        """unit: rank of a piece, at least."""
        copies: Counter[str] = Counter()
        rows: dict[Key, int] = {}
        for row, name in enumerate(adapters):
            if name is not None:
                rows[name, copies[name]] = row
                copies[name] += 1
        if unit > self._pages.unit:
            self._pages = _Pages(self._groups, self._get, unit)
        row_of = {page: rows[key] for key, own in self._pages.of([*rows]).items() for page in own}
        count = 1 + max(row_of, default=-1)
        self._pages.clear(page for page in range(count) if page not in row_of)  # 0, so that the first row may have them
        index = torch.tensor([row_of.get(page, 0) for page in range(count)]).to(self._pages.buffers[0][0].device)
        return [
            (layer, _RowDelta(down[i, :count], up[i, :count], index, len(adapters)))
            for group, buffers in zip(self._groups, self._pages.buffers)
            for down, up in [[one.unflatten(1, (-1, self._pages.unit)) for one in buffers]]
            for i, layer in enumerate(group.layers)
        ]


class _RowDelta:
    """A forward hook: what row i's adapter adds. down: [P, r, in] and up: [P, r, out], pieces. row_of: i64[P], of the rows 0 to
    `rows`."""

    def __init__(self, down: Tensor, up: Tensor, row_of: Tensor, rows: int) -> None:
        self._down, self._up, self._row_of, self._rows = down.transpose(1, 2), up, row_of, rows

    def __call__(self, tokens: int, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x = _by_row(args[0], self._rows, tokens).to(self._down.dtype)
        inner = torch.bmm(x.index_select(0, self._row_of), self._down)
        base = output.reshape(*x.shape[:2], -1).to(inner.dtype)
        return base.index_add(0, self._row_of, torch.bmm(inner, self._up)).to(output.dtype).view(output.shape)


def piece_rank(packed: Sequence[PackedAdapter]) -> int:
    """A GPU adds several pieces to a row in no certain order, so there each row has one, whose rank is that of the largest."""
    return PIECE if packed[0].device.type == "cpu" else max(one.r for one in packed)


def _prefers_rows(
    groups: Sequence[LayerGroup],
    distinct: Sequence[PackedAdapter],
    packed: Sequence[PackedAdapter],
    tokens: int,
    unit: int,
) -> bool:
    """Whether each row should get its own factors, by what both forms cost. distinct: adapters of the rows, packed: of each row."""
    if len(distinct) < 3:
        return False
    widths = sum(group.width * len(group.names) for group in groups)
    own = sum(-(-one.r // unit) * unit for one in packed)
    if 4 * own * widths > BY_ROW_BYTES:
        return False
    if distinct[0].device.type != "cpu":
        return 2 * BY_ROW_SHARE * sum(one.entries for one in distinct) > widths
    shared = len(packed) * sum(one.r for one in distinct)
    return shared * tokens > own * (BY_ROW_SPEED + tokens)


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
