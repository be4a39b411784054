"""Forward passes under named LoRA adapters, on a model that is found again exactly as it was left.

Rows that share one adapter run under `use_adapter`. Rows of different adapters share a batch by stacking (stacked_lora.py), if all
are plain LoRA, else through PEFT's `adapter_names`; both equal separate passes. No adapter is the base with its adapters off.
Where a pool of adapters is beside the model (models/adapter_pool.py), rows mix adapters of the pool, and PEFT's take turns.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft import PeftModel
from torch import nn

from rlhf_ray.errors import ArtifactError, ConfigError
from rlhf_ray.models.adapter_pool import AdapterPool, pool_of
from rlhf_ray.models.adapters import lora_layers, use_adapter
from rlhf_ray.sampler.stacked_lora import Stacks, can_stack

BASE = "__base__"
"""PEFT's name, in `adapter_names`, for rows without an adapter."""


class AdapterRouter:
    """forward: how the model is called; None calls it directly."""

    def __init__(self, model: nn.Module, forward: Callable[..., Any] | None = None) -> None:
        self._model: Any = model
        self._forward: Callable[..., Any] = model if forward is None else forward
        self._peft: Any = model if isinstance(model, PeftModel) else None
        self.is_open = False
        self._can_stack: dict[str, bool] = {}  # of this session
        self._stacks: Stacks | None = None

    @property
    def names(self) -> Collection[str]:
        """The adapters that rows may name, as they are at any time."""
        if self._peft is None:
            return ()
        return self._peft.peft_config if self._pool is None else ChainMap(self._peft.peft_config, self._pool.packed)  # type: ignore[no-any-return]

    @property
    def _pool(self) -> AdapterPool | None:
        return None if self._peft is None else pool_of(self._peft)

    @contextmanager
    def session(self) -> Iterator[None]:
        """Evaluation mode for every module, and each module's own mode again afterwards; inner sessions do nothing.

        Raises ArtifactError if adapters are merged into the base or switched off: rows would silently get another model."""
        if self.is_open:
            yield
            return
        self._check()
        training = [module for module in self._model.modules() if module.training]
        self.is_open = True
        self._can_stack.clear()
        self._forget()
        try:
            for module in training:
                module.training = False
            yield
        finally:
            self.is_open = False
            self._forget()
            for module in training:
                module.training = True

    def _forget(self) -> None:
        """Copies of weights, which may change between sessions: not those of a pool."""
        if self._pool is None:
            self._stacks = None

    def forward(self, adapters: Sequence[str | None], stage: str = "") -> Callable[..., Any]:
        """The model as a function for batches whose row i uses adapters[i]; valid while the adapters' weights stay the same, and
        until the next call for the same `stage`.

        Raises ConfigError if rows of a DoRA adapter are among rows of others."""
        if self._peft is None:
            return self._forward
        first = adapters[0]
        if all(name == first for name in adapters):
            return partial(_under_one, self._peft, self._forward, first)
        if self.mixes(adapters):
            self._stacks = self._stacks or Stacks(self._peft, self._pool)
            return self._stacks.forward(adapters, stage)
        self._refuse_dora(adapters)
        return partial(self._forward, adapter_names=[BASE if name is None else name for name in adapters])

    def drop(self, stage: str) -> None:
        """There will be no call for this stage soon: what it has placed is let go."""
        if self._stacks is not None:
            self._stacks.drop(stage)

    def mixes(self, adapters: Iterable[str | None]) -> bool:
        """Whether rows under these adapters can share a forward at no more cost than rows of one: all are plain LoRA."""
        return self._peft is not None and all(self._stackable(name) for name in set(adapters) if name is not None)

    def together(self, adapters: Iterable[str | None]) -> bool:
        """Whether rows under these adapters can share a forward at all: not where one of several adapts stacked expert weights."""
        names = set(adapters)
        if len(names) < 2 or self._peft is None:
            return True
        if self._pool is not None:
            return all(name is None or name in self._pool for name in names)
        return not any(self._peft.peft_config[name].target_parameters for name in names if name is not None)

    def _stackable(self, name: str) -> bool:
        if self._pool is not None:
            return name in self._pool
        if name not in self._can_stack:
            self._can_stack[name] = can_stack(self._peft, name)
        return self._can_stack[name]

    def _refuse_dora(self, adapters: Sequence[str | None]) -> None:
        # PEFT refuses them too, but from inside the forward, and leaves its hooks on the model.
        for name in adapters:
            if name is not None and getattr(self._peft.peft_config[name], "use_dora", False):
                fix = "decode its rows in a run of their own"
                raise ConfigError.at(f"adapter {name}", "DoRA adapters cannot share a batch", "plain LoRA", fix=fix)

    def _check(self) -> None:
        if self._peft is None:
            return
        for name, layer in lora_layers(self._peft):
            if layer.merged or layer.disable_adapters:
                found = f"merged {layer.merged_adapters}" if layer.merged else "switched off"
                fix = "unmerge, or leave disable_adapter(), before decoding"
                raise ArtifactError.at(name, "rows cannot choose their adapter", "adapters unmerged and on", found, fix)


def _under_one(peft_model: PeftModel, forward: Callable[..., Any], adapter: str | None, **inputs: Any) -> Any:
    with use_adapter(peft_model, adapter):
        return forward(**inputs)
