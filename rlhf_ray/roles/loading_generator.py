"""The adapter hand-over: what a learner publishes is what a generator on another GPU samples with.

A request names the adapter by version and sha256 and brings its tensors. A generator that holds another one, or none since it was
restarted, loads the named one first and hashes what its model then holds. Before every chunk it hashes the model's tensors again,
so that a rollout tells what really was active, not what was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from rlhf_ray.batches import PromptBatch, Rollout
from rlhf_ray.roles.generator import ActiveAdapter, Decoding, Generator
from rlhf_ray.roles.loaded_adapter import LoadedAdapter
from rlhf_ray.sampler.engine import Sampler


class LoadingGenerator(Generator):
    """A generator without a learner beside it. model: the base with adapter `name` on it, whose weights change from request to
    request."""

    def __init__(self, sampler: Sampler, pad_id: int, seed: int, model: nn.Module, name: str) -> None:
        super().__init__(sampler, pad_id, seed)
        self.adapter = LoadedAdapter(model, name, "generator")
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
        active = ActiveAdapter(self.adapter.name, self.adapter.version or 0, self.adapter.held_sha256())
        return self.generate(prompts, active, decoding, role, step)

    def tensors(self) -> dict[str, Tensor]:
        """The adapter that the model holds now, f32 on the CPU."""
        return self.adapter.tensors()
