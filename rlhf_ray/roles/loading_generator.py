"""The adapter hand-over: what a learner publishes is what a generator on another GPU samples with.

A request names the adapter by version and sha256 and brings its tensors. A generator that holds another one, or none since it was
restarted, loads the named one first and hashes what its model then holds. Before every chunk it hashes the model's tensors again,
so that a rollout tells what really was active, not what was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rlhf_ray.batches import PromptBatch, Rollout
from rlhf_ray.roles.generator import ActiveAdapter, Decoding, Generator
from rlhf_ray.roles.loaded_adapter import EngineAdapter, HeldAdapter
from rlhf_ray.sampler.requests import DecodeEngine


class LoadingGenerator(Generator):
    """A generator without a learner beside it. adapter: on the sampler's model; its weights change from request to request."""

    def __init__(self, sampler: DecodeEngine, pad_id: int, seed: int, adapter: HeldAdapter) -> None:
        super().__init__(sampler, pad_id, seed)
        self.adapter = adapter
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
        if not self.adapter.holds(adapter):
            self.adapter.load(adapter, tensors)
        return self.generate(prompts, held(self.adapter), decoding, role, step)

    def tensors(self) -> dict[str, Tensor]:
        """The adapter that the model holds now, f32 on the CPU."""
        return self.adapter.tensors()


class BesideGenerator(Generator):
    """A generator in the learner's process whose engine has a base of its own. The learner hands each adapter over by
    `adapter.load`; the rollout tells what the engine holds."""

    def __init__(self, pad_id: int, seed: int, adapter: EngineAdapter) -> None:
        super().__init__(adapter.engine, pad_id, seed)
        self.adapter = adapter

    def generate(
        self, prompts: PromptBatch, adapter: ActiveAdapter, decoding: Decoding, role: str, step: int
    ) -> Rollout:
        """See `Generator.generate`; `adapter` is what was asked for, which whoever asked compares with what is told."""
        return super().generate(prompts, held(self.adapter), decoding, role, step)


def held(adapter: HeldAdapter) -> ActiveAdapter:
    """What is there now, by the hash of the weights themselves."""
    return ActiveAdapter(adapter.name, adapter.version or 0, adapter.held_sha256())
