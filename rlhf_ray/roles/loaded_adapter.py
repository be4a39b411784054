"""An adapter whose weights come from elsewhere, each time named by version and sha256: a generator's policy, the reference after a
reset (ref_model_sync_steps)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_ray.errors import InvariantError
from rlhf_ray.models.adapters import adapter_tensors, load_adapter_tensors
from rlhf_ray.roles.generator import ActiveAdapter
from rlhf_ray.runtime.fault_injection import inject_nan
from rlhf_ray.storage.files import sha256_tensors


class LoadedAdapter:
    """Adapter `name` on `model`.  role: whose it is, for faults made on purpose.

    version, sha256: of what was loaded last; None and "" before that.

    Under ZeRO-3 all methods but `holds` are collectives, which every rank calls."""

    def __init__(self, model: nn.Module, name: str, role: str) -> None:
        self.model, self.name, self.role = model, name, role
        self.version: int | None = None
        self.sha256 = ""

    def holds(self, adapter: ActiveAdapter) -> bool:
        """Whether `adapter` was loaded last."""
        return (self.version, self.sha256) == (adapter.version, adapter.sha256)

    def load(self, adapter: ActiveAdapter, tensors: Mapping[str, Any]) -> None:
        """Put `tensors` into the model and make sure that they are the adapter named: by hash, read back from the model.

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
        load_adapter_tensors(self.model, self.name, copied)
        found = self.held_sha256()
        if found != adapter.sha256:
            raise InvariantError.at(
                where,
                "the tensors handed over are not the adapter that was published",
                f"sha256 {adapter.sha256}",
                f"sha256 {found}",
            )
        self.version, self.sha256 = adapter.version, found

    def tensors(self) -> dict[str, Tensor]:
        """What the model holds now, f32 on the CPU."""
        return adapter_tensors(self.model, self.name)

    def held_sha256(self) -> str:
        """Of what the model holds now, whatever was loaded."""
        return sha256_tensors(self.tensors())
