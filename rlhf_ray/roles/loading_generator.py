"""The adapter hand-over: what a learner publishes is what a generator on another GPU samples with.

A request names the adapter by version and sha256 and brings its tensors. A generator that holds another one, or none since it was
restarted, loads the named one first and hashes what its model then holds. Before every chunk it hashes the model's tensors again,
so that a rollout tells what really was active, not what was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_ray.batches import PromptBatch, Rollout
from rlhf_ray.errors import InvariantError
from rlhf_ray.models.adapters import adapter_tensors, load_adapter_tensors
from rlhf_ray.roles.generator import ActiveAdapter, Decoding, Generator
from rlhf_ray.runtime.fault_injection import inject_nan
from rlhf_ray.sampler.engine import Sampler
from rlhf_ray.storage.files import sha256_tensors


class LoadingGenerator(Generator):
    """A generator without a learner beside it. model: the base with adapter `name` on it, whose weights change from request to
    request."""

    def __init__(self, sampler: Sampler, pad_id: int, seed: int, model: nn.Module, name: str) -> None:
        super().__init__(sampler, pad_id, seed)
        self.model, self.name = model, name
        self.version: int | None = None
        self.loaded = ""
        self.about: dict[str, Any] = {}

    def describe(self) -> dict[str, Any]:
        """Where it is and what it loaded, as whoever built it has noted."""
        return self.about

    def generate_with(
        self,
        prompts: PromptBatch,
        adapter: ActiveAdapter,
        tensors: Mapping[str, Any],
        decoding: Decoding,
        role: str,
        step: int,
    ) -> Rollout:
        """`generate` with the adapter that `adapter` names. tensors: plain PEFT key -> f32 array. The rollout echoes version and
        sha256 of what the model holds. Raises InvariantError if `tensors` is not what was named."""
        if (self.version, self.loaded) != (adapter.version, adapter.sha256):
            self.load(adapter, tensors)
        active = ActiveAdapter(self.name, self.version or 0, sha256_tensors(self.tensors()))
        return self.generate(prompts, active, decoding, role, step)

    def load(self, adapter: ActiveAdapter, tensors: Mapping[str, Any]) -> None:
        """Put `tensors` into the model and make sure that they are the adapter named: by hash, read back from the model."""
        where = f"adapter version {adapter.version}"
        # arrays from the object store are read-only views of shared memory
        copied = {key: torch.tensor(value) for key, value in tensors.items()}
        first = next(iter(copied))
        copied[first] = inject_nan("generator", "adapter", copied[first])
        broken = [key for key, value in copied.items() if not bool(torch.isfinite(value).all())]
        if broken:
            raise InvariantError.at(
                where, f"{broken[0]} is not finite ({len(broken)} of {len(copied)} tensors)", got="a poisoned adapter"
            )
        self.version, self.loaded = None, ""
        load_adapter_tensors(self.model, self.name, copied)
        found = sha256_tensors(self.tensors())
        if found != adapter.sha256:
            raise InvariantError.at(
                where,
                "the tensors handed over are not the adapter that was published",
                f"sha256 {adapter.sha256}",
                f"sha256 {found}",
            )
        self.version, self.loaded = adapter.version, found

    def tensors(self) -> dict[str, Tensor]:
        """The adapter that the model holds now, f32 on the CPU."""
        return adapter_tensors(self.model, self.name)
