"""An adapter whose weights come from elsewhere, each time named by version and sha256: a generator's policy, the reference after a
reset (ref_model_sync_steps). It is in a model of ours, or in an engine that has a model of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_ray.errors import InvariantError
from rlhf_ray.models.adapters import adapter_tensors, load_adapter_tensors
from rlhf_ray.roles.generator import ActiveAdapter
from rlhf_ray.runtime.fault_injection import inject_nan
from rlhf_ray.sampler.vllm_engine import VLLMEngine
from rlhf_ray.storage.files import sha256_tensors


class HeldAdapter(ABC):
    """Adapter `name`.  role: whose it is, for faults made on purpose.

    version, sha256: of what was loaded last; None and "" before that."""

    def __init__(self, name: str, role: str) -> None:
        self.name, self.role = name, role
        self.version: int | None = None
        self.sha256 = ""

    def holds(self, adapter: ActiveAdapter) -> bool:
        """Whether `adapter` was loaded last."""
        return (self.version, self.sha256) == (adapter.version, adapter.sha256)

    def load(self, adapter: ActiveAdapter, tensors: Mapping[str, Any]) -> None:
        """Put `tensors` where they are used and make sure that they are the adapter named: by hash, read back from there.

        tensors: plain PEFT key -> f32 array or tensor. Raises InvariantError if they are not finite, or another adapter."""
        where = f"adapter version {adapter.version}"
        # arrays from the object store are read-only views of shared memory
        copied = {key: torch.asarray(value, copy=True) for key, value in tensors.items()}
        first = next(iter(copied))
        copied[first] = inject_nan(self.role, "adapter", copied[first])
        broken = [key for key, value in copied.items() if not bool(torch.isfinite(value).all())]
        if broken:
            raise InvariantError.at(
                where, f"{broken[0]} is not finite ({len(broken)} of {len(copied)} tensors)", got="a poisoned adapter"
            )
        self.version, self.sha256 = None, ""
        self._put(copied)
        found = self.held_sha256()
        if found != adapter.sha256:
            raise InvariantError.at(
                where,
                "the tensors handed over are not the adapter that was published",
                f"sha256 {adapter.sha256}",
                f"sha256 {found}",
            )
        self.version, self.sha256 = adapter.version, found

    @abstractmethod
    def _put(self, tensors: dict[str, Tensor]) -> None:
        """Have `tensors`, f32 on the CPU, used from now on."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What is held now, f32 on the CPU."""

    @abstractmethod
    def held_sha256(self) -> str:
        """Of what is held now, whatever was loaded."""


class LoadedAdapter(HeldAdapter):
    """In `model`. Under ZeRO-3 all methods but `holds` are collectives, which every rank calls."""

    def __init__(self, model: nn.Module, name: str, role: str) -> None:
        super().__init__(name, role)
        self.model = model

    def _put(self, tensors: dict[str, Tensor]) -> None:
        load_adapter_tensors(self.model, self.name, tensors)

    def tensors(self) -> dict[str, Tensor]:
        return adapter_tensors(self.model, self.name)

    def held_sha256(self) -> str:
        return sha256_tensors(self.tensors())


class EngineAdapter(HeldAdapter):
    """In the layers of vLLM, which hold it in their own number format and with the scale multiplied in. The engine compares them
    with what it is given, once; that they still hold that is seen by their hash.

    config: in the form of `AdapterFiles.config`."""

    def __init__(self, engine: VLLMEngine, config: Mapping[str, Any], name: str, role: str) -> None:
        super().__init__(name, role)
        self.engine, self.config = engine, config
        self._given: dict[str, Tensor] = {}
        self._layers_sha256 = ""

    def _put(self, tensors: dict[str, Tensor]) -> None:
        self._given = {}
        self.engine.load_adapter(self.name, self.config, tensors)
        self._given, self._layers_sha256 = tensors, self.engine.layers_sha256(self.name)

    def tensors(self) -> dict[str, Tensor]:
        """What was loaded; `held_sha256` says whether it is still what the layers hold."""
        return self._given

    def held_sha256(self) -> str:
        found = self.engine.layers_sha256(self.name)
        return sha256_tensors(self._given) if self._given and found == self._layers_sha256 else found
