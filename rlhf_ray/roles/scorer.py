"""The scorer: a rollout in, rewards and reference log-probabilities out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.batches import Rollout, Scores, Sequences
from rlhf_ray.data.records import Row
from rlhf_ray.models.forward import to_device
from rlhf_ray.models.zero3 import MaxOverRanks, lockstep_batches, padding_batch
from rlhf_ray.rewards.retokenised import RetokenisedReward, Reward
from rlhf_ray.rewards.sources import ModelReward, Texts


class Scorer:
    """rewards: in the job's order.  reference: the role whose log-probabilities the KL is taken against, None for none.

    rows_per_forward: memory only.  to_texts: the texts of a rollout's rows, for Python rewards.  device: where the models are.

    agree: under ZeRO-3, how ranks with chunks of different sizes come to make equally many forward passes."""

    def __init__(
        self,
        models: Callable[..., Any],
        rewards: Sequence[Reward],
        to_texts: Callable[[Rollout, Sequence[Row]], Texts],
        temperature: float,
        rows_per_forward: int,
        device: torch.device,
        reference: str | None = "reference",
        max_over_ranks: MaxOverRanks = int,
    ) -> None:
        self.models, self.rewards, self.to_texts = models, tuple(rewards), to_texts
        self.temperature, self.rows_per_forward, self.device = temperature, rows_per_forward, device
        self.reference, self.max_over_ranks = reference, max_over_ranks
        self.about: dict[str, Any] = {}

    def describe(self) -> dict[str, Any]:
        """Where it is and what it loaded, as whoever built it has noted."""
        return self.about

    def score(self, rollout: Rollout, rows: Sequence[Row]) -> Scores:
        """rows: the data rows behind the rollout's rows, in the same order."""
        return self.score_at(rollout, rows, self.temperature)

    @torch.no_grad()
    def score_at(self, rollout: Rollout, rows: Sequence[Row], temperature: float) -> Scores:
        """`score`, with the reference's log-probabilities at another temperature."""
        ref_logprobs = torch.zeros(rollout.response_mask.shape)
        parts = {reward.name: torch.zeros(len(rollout)) for reward in self.rewards}
        for batch in lockstep_batches(len(rollout), self.rows_per_forward, self.max_over_ranks):
            some = rollout.rows(batch)
            seq = to_device(Sequences.trim(some.tokens, some.prompt_mask, some.response_mask), self.device)
            found, rewards = self._passes(seq, temperature)
            if found is not None:
                ref_logprobs[batch, : seq.response_width] = found.float().cpu()
            for name, values in rewards.items():
                parts[name][batch] = values.cpu()
        on_text = [r for r in self.rewards if not isinstance(r, ModelReward)]
        drift = None
        if on_text:
            texts = self.to_texts(rollout, rows)
            for other in on_text:
                if isinstance(other, RetokenisedReward):
                    parts[other.name] = other.score(texts, rows, rollout.finished.tolist())
                    drift = other.drift(texts)
                else:
                    parts[other.name] = other.score(texts)
        total = torch.zeros(len(rollout))
        for reward in self.rewards:
            total += reward.weight * parts[reward.name]
        return Scores(reward=total, ref_logprobs=ref_logprobs, row_id=rollout.row_id, parts=parts, drift=drift)

    @torch.no_grad()
    def join(self) -> None:
        """Under ZeRO-3, what a rank without a rollout does while others score theirs: the same passes, over one token."""
        for _ in range(self.max_over_ranks(0)):
            self._passes(padding_batch(self.device), self.temperature)
        for reward in self.rewards:
            if isinstance(reward, RetokenisedReward):
                reward.join()

    def _passes(self, seq: Sequences, temperature: float) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Reference log-probabilities (None without a reference) and the rewards that read token ids."""
        found = None
        if self.reference is not None:
            found, _ = self.models("logprobs", self.reference, seq, temperature)
        return found, {r.name: r.score(seq) for r in self.rewards if isinstance(r, ModelReward)}
