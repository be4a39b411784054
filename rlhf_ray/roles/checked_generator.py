"""A generator for evaluations: the log-probabilities of its replies are the model's own, in the reference's forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.batches import PromptBatch, Rollout
from rlhf_ray.models.batching import Batching
from rlhf_ray.rewards.protocol import sequences_of
from rlhf_ray.roles.generator import ActiveAdapter, Decoding, Generator
from rlhf_ray.roles.invariants import check_sampler_agrees
from rlhf_ray.sampler.engine import Sampler


class CheckedGenerator(Generator):
    """Samples as `Generator` does, then runs policy `role` over the replies in one pass, row for row as the scorer runs the
    reference. Two policies with equal weights are then at a KL of exactly 0, in any precision (F15), and a sampler that used
    another adapter than the one asked for is found out: `limit` bounds the mean difference to its log-probabilities.

    models: `RoleModels`, called through its `forward`.   batching: as the scorer's."""

    def __init__(
        self,
        sampler: Sampler,
        pad_id: int,
        seed: int,
        models: Callable[..., Any],
        policy: str,
        batching: Batching,
        device: torch.device,
        limit: float,
    ) -> None:
        super().__init__(sampler, pad_id, seed)
        self.models, self.policy, self.device = models, policy, device
        self.batching, self.limit = batching, limit

    def generate(
        self, prompts: PromptBatch, adapter: ActiveAdapter, decoding: Decoding, role: str, step: int
    ) -> Rollout:
        """See `Generator.generate`. Raises InvariantError if sampler and model disagree."""
        rollout = super().generate(prompts, adapter, decoding, role, step)
        logprobs = self._logprobs(rollout, decoding.temperature)
        check_sampler_agrees(rollout, logprobs, self.limit, step)
        return replace(rollout, sample_logprobs=logprobs)

    @torch.no_grad()
    def _logprobs(self, rollout: Rollout, temperature: float) -> Tensor:
        found = torch.zeros(rollout.response_mask.shape)
        for rows, seq in sequences_of(rollout, self.batching, self.device):
            logprobs, _ = self.models("logprobs", self.policy, seq, temperature)
            found[rows, : seq.response_width] = logprobs.float().cpu()
        return found
