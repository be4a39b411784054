"""A GPU for tests on machines that have none: a device of its own, whose tensors refuse to meet those of the CPU.

    with pretend_gpu() as device:
        model.to(device)(tokens)        # RuntimeError: aten.embedding.default: tensors on pretend:0 and on the CPU

So every forgotten `.to(device)` fails here, and not on a rented card. What a GPU computes, how fast, and how much it holds
cannot be learnt from it.

How it works, and what was tried (torch 2.13, CPU build):

- A wrapper subclass (`torch.Tensor._make_wrapper_subclass`) around a CPU tensor says that it is on `pretend:0`; its
  `__torch_dispatch__` does every operation on what it wraps. Together with a `TorchDispatchMode`, which also sees operations that
  have no such tensor among their arguments (`torch.zeros(3, device=device)`, `x.to(device)`), this walks everything here, backward
  passes, optimizers, DeepSpeed, PEFT and transformers' Trainer included. Chosen.
- `torch.utils.rename_privateuse1_backend` alone gives a device that can be named, and nothing can be made on it. It is needed for
  the wrappers to name it, and autograd wants a device guard for it: torch's own backend in Python, an experimental function
  (`_setup_privateuseone_for_python_backend`), brings guard, hooks and module.
- The device `meta` needs no registration, but PEFT leaves adapters where they are if a base is on `meta`, and it has no values.
- torch's `FakeTensorMode` refuses to mix devices by itself, without values: a sampler cannot choose a token.

As on CUDA, these may mix: a CPU tensor without dimensions, CPU indices into a tensor on the device, and copies in either direction.
The registration cannot be undone and makes torch believe in an accelerator: use it in a process of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

NAME = "pretend"
MAY_MIX = (
    "aten._to_copy",
    "aten.copy_",
    "aten.index.",
    "aten.index_put",
    "aten._index_put",
    "aten.is_pinned",
    "aten.set_",
)


refused: list[str] = []
"""What was not done, also where somebody caught the error."""


class _Backend:
    """What torch asks of the module of a device."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def manual_seed_all(self, seed: int) -> None:
        pass

    def _is_in_bad_fork(self) -> bool:
        return False

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class PretendTensor(torch.Tensor):
    """A tensor on the device. inner: its values, on the CPU."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls: Any, inner: torch.Tensor) -> Any:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    @property
    def data(self) -> Any:
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, other: Any) -> None:  # torch would exchange what is behind this tensor, and leave what it wraps
        torch.Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.inner = other.inner

    def tolist(self) -> Any:  # torch refuses it for subclasses
        return self.inner.tolist()

    def __format__(self, spec: str) -> str:
        return self.inner.__format__(spec)

    def __repr__(self, **_: Any) -> str:
        return f"{self.inner} on {NAME}"

    def __deepcopy__(self, memo: Any) -> Any:
        copied = PretendTensor(self.inner.clone()).requires_grad_(self.requires_grad)
        return torch.nn.Parameter(copied, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copied


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation, on the values."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    on_device = any(isinstance(t, PretendTensor) for t in tensors)
    strangers = [t for t in tensors if not isinstance(t, PretendTensor) and t.dim() > 0]
    if on_device and strangers and not str(func).startswith(MAY_MIX):
        shapes = ", ".join(str(tuple(t.shape)) for t in strangers)
        refused.append(f"{func}: tensors on {NAME}:0 and on the CPU (of shape {shapes})")
        raise RuntimeError(refused[-1])
    if (wanted := kwargs.get("device")) is not None:
        on_device = torch.device(wanted).type == NAME
        kwargs = {**kwargs, "device": torch.device("cpu") if on_device else wanted}
    plain_args, plain_kwargs = tree_map_only(PretendTensor, lambda t: t.inner, (args, kwargs))
    out = func(*plain_args, **plain_kwargs)
    returned = func._schema.returns
    if returned and returned[0].alias_info is not None and returned[0].alias_info.is_write and "out" not in kwargs:
        return args[0]  # in place
    if str(func).startswith("c10d."):  # a collective gives back what it was given, as (tensors, work)
        return out
    return tree_map_only(torch.Tensor, PretendTensor, out) if on_device else out


class _EveryOperation(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _MadeFromLists(TorchFunctionMode):
    """`torch.tensor([...], device=...)` is made below every dispatch; here it is made on the CPU, and moved."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == NAME:
            return func(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        return func(*args, **kwargs)


@contextmanager
def pretend_gpu() -> Iterator[torch.device]:
    """The device, for as long as this is open. Registers it with torch, for the rest of the process."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    if not hasattr(torch, NAME):
        _setup_privateuseone_for_python_backend(NAME, _Backend())
    run = threading.Thread.run

    def run_on_device(thread: threading.Thread) -> None:  # modes belong to a thread
        with _EveryOperation(), _MadeFromLists():
            run(thread)

    threading.Thread.run = run_on_device  # type: ignore[method-assign]
    try:
        with _EveryOperation(), _MadeFromLists():
            yield torch.device(NAME, 0)
    finally:
        threading.Thread.run = run  # type: ignore[method-assign]
