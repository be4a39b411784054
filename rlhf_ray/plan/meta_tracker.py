"""Counts the bytes of tensors that are only described: torch's meta device runs a job's own code, and no weight is ever made.

Every operation goes through `MetaMemoryTracker`, which notes the storages that come and go, as an allocator would. What a meta run
cannot know is added here: what a kernel allocates inside, and what reading a value gives. Attention kernels: attention.py.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf_ray.plan.memory import Device

GRANULE = {"cuda": 512, "cpu": 64}
"""Bytes that every tensor is rounded up to: torch's CUDA allocator, and its alignment on the CPU."""

_aten = torch.ops.aten


@dataclass
class Peak:
    """The most bytes alive at one time, by part, resident ones included."""

    bytes: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


class MetaMemoryTracker(TorchDispatchMode):
    """`with MetaMemoryTracker(device) as tracker:` run code on meta tensors; `own` says what some of them are; `watch` gives a
    phase's peak.

    device: the one whose memory is meant.   vocabulary: tensors of this last dimension are logits."""

    def __init__(self, device: Device, vocabulary: Iterable[int] = ()) -> None:
        super().__init__()
        self.device: Device = device
        self.vocabulary = set(vocabulary)
        self.live: Counter[str] = Counter()
        self._known: dict[int, tuple[weakref.ref[Any], str, int]] = {}
        self._peak = Peak()
        self._total = 0
        self._true: set[int] = set()
        self.packs = False
        """Rows are packed, and the attention kernel keeps them apart by a mask, which is then made."""

    def own(self, part: str, tensors: Iterable[Tensor | None]) -> int:
        """Put the storages of `tensors` under `part`; the bytes that this moved."""
        moved = 0
        for tensor in tensors:
            key = None if tensor is None or not tensor.is_meta else tensor.untyped_storage()._cdata
            if key in self._known:
                reference, before, size = self._known[key]
                self._known[key] = reference, part, size
                self.live[before] -= size
                self.live[part] += size
                moved += size
        return moved

    @contextmanager
    def watch(self) -> Iterator[Peak]:
        """The peak of what happens inside; it is complete when the block ends."""
        outer, self._peak = self._peak, Peak()
        self._note()
        try:
            yield self._peak
        finally:
            if outer.total < self._peak.total:
                outer.bytes = dict(self._peak.bytes)
            self._peak = outer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _aten._local_scalar_dense.default and args[0].is_meta:
            return self._read(args[0])
        if func is _aten._to_copy.default and args[0].is_meta and str(kwargs.get("device")) == "cpu":
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if func is _aten.nonzero.default and args[0].is_meta:  # asked for what is wrong, of which there is nothing
            return torch.empty(0, args[0].dim(), dtype=torch.int64, device="meta")
        if func is _aten.index.Tensor:
            args = (args[0], _positions(args[1]))
        elif func in (_aten.index_put_.default, _aten.index_put.default, _aten._index_put_impl_.default):
            args = (args[0], _positions(args[1]), *args[2:])
        if func is _aten.split_with_sizes.default and args[0].is_meta and not any(args[1]):
            args = (args[0], _even(args[0].shape[args[2] if len(args) > 2 else 0], len(args[1])), *args[2:])
        if func is _aten._grouped_mm.default and args[0].is_meta:
            out: Any = _grouped_product(*args, **(kwargs or {}))
        else:
            out = _RESULTS.of(func, args, kwargs or {})
        part = _part_by_maker(func, args, out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._add(tensor, part)
        if func is _aten.all.default and args[0].dim() == 1 and not (self.packs and args[0].numel() == 1):
            self._true.add(out.untyped_storage()._cdata)
        inside = _INSIDE.get(func)
        if inside is not None:
            self._note(inside(*args), self._part(args[0]))
        return out

    def _read(self, tensor: Tensor) -> Any:
        """A value of a tensor that has none: every row is in order; a batch has some padding, so that its mask is made."""
        if tensor.dtype is torch.bool:
            return tensor.untyped_storage()._cdata in self._true
        return 0.0 if tensor.is_floating_point() else 0

    def _part(self, tensor: Tensor) -> str:
        return "logits" if tensor.dim() and tensor.shape[-1] in self.vocabulary else "activations"

    def _add(self, tensor: Tensor, part: str | None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        granule = GRANULE[self.device]
        size, part = -(-storage.nbytes() // granule) * granule, part or self._part(tensor)
        self._known[key] = weakref.ref(storage, lambda _: self._forget(key)), part, size
        self.live[part] += size
        self._total += size
        self._note()

    def _forget(self, key: int) -> None:
        _, part, size = self._known.pop(key)
        self._true.discard(key)
        self.live[part] -= size
        self._total -= size

    def _note(self, extra: int = 0, part: str = "activations") -> None:
        if self._total + extra > self._peak.total:
            self._peak.bytes = {name: size for name, size in self.live.items() if size}
            self._peak.bytes[part] = self._peak.bytes.get(part, 0) + extra


class _Results:
    """What operations return, by their arguments' shapes: layers are alike, and torch works each result's shape out in Python.

    Operations that return or change an argument are left to torch."""

    def __init__(self) -> None:
        self._pure: dict[Any, bool] = {}
        self._known: dict[Any, Any] = {}

    def of(self, func: Any, args: Any, kwargs: Any) -> Any:
        pure = self._pure.get(func)
        if pure is None:
            schema = func._schema
            pure = self._pure[func] = not any(x.alias_info for x in (*schema.arguments, *schema.returns))
        if not pure:
            return func(*args, **kwargs)
        try:
            # the default precision decides where no argument does
            key = func, torch.get_default_dtype(), _described(args), _described(tuple(sorted(kwargs.items())))
            found = self._known.get(key)
        except TypeError:  # an argument that cannot be hashed
            return func(*args, **kwargs)
        if found is not None:
            return _made(found)
        out = func(*args, **kwargs)
        made = tree_leaves(out)
        if all(isinstance(t, Tensor) and t.is_meta for t in made):
            given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            if given.isdisjoint(t.untyped_storage()._cdata for t in made):  # not all views say so: _unsafe_view
                self._known[key] = _described(out)
            else:
                self._pure[func] = False
        return out


_RESULTS = _Results()


@dataclass(frozen=True)
class _Shape:
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int


def _described(value: Any) -> Any:
    """`value` with shapes in the place of tensors; TypeError for a tensor that has values."""
    if isinstance(value, Tensor):
        if not value.is_meta:
            raise TypeError
        return _Shape(tuple(value.shape), value.stride(), value.dtype, int(value.storage_offset()))
    if isinstance(value, (tuple, list)):
        return tuple(map(_described, value))
    # 1, 1.0 and True are equal, and make results of different types
    return value if value is None else (type(value), value)


def _made(shape: Any) -> Any:
    if isinstance(shape, _Shape):
        return torch.empty_strided(shape.size, shape.stride, dtype=shape.dtype, device="meta")
    return tuple(map(_made, shape))


def _part_by_maker(func: Any, args: Any, out: Any) -> str | None:
    """Key-value caches are made by nobody else: buffers [slots, heads, columns, width], and new columns put behind old ones."""
    is_cache = func is _aten.new_zeros.default or (func is _aten.cat.default and args[1:] == (-2,))
    return "kv cache" if is_cache and out.dim() == 4 else None


def _grouped_product(left: Tensor, right: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """The product of every expert with its own rows, which torch's own meta kernel makes in bfloat16 alone. Experts are a matrix's
    third dimension; where neither has one, the result does."""
    experts = (offs.numel(),) if offs is not None and left.dim() == right.dim() == 2 else ()
    both = left.shape[:1] if left.dim() == right.dim() == 3 else ()
    return left.new_empty(*experts, *both, left.shape[-2], right.shape[-1])


def _even(rows: int, parts: int) -> list[int]:
    """How many of `rows` each of `parts` experts gets (JetMoE), when the counts were read and are all 0: as many as the others."""
    return [rows // parts + (i < rows % parts) for i in range(parts)]


def _positions(indices: Iterable[Tensor | None]) -> list[Tensor | None]:
    """A mask used as an index, as the positions it stands for. It picks everything: no batch needs more."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype is torch.bool and index.is_meta:
            found += [torch.empty(index.numel(), dtype=torch.int64, device="meta")] * index.dim()
        else:
            found.append(index)
    return found


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


_INSIDE: dict[Any, Callable[..., int]] = {
    # logsumexp makes exp(x - max) in a buffer of its own
    _aten.logsumexp.default: lambda x, *_: _size(x),
    # the backward kernel sums the queries' gradient in float32
    _aten._scaled_dot_product_efficient_attention_backward.default: lambda grad, *_: (
        0 if grad.dtype is torch.float32 else 2 * _size(grad)
    ),
}
