"""The scorer: a rollout in, rewards and reference log-probabilities out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.batches import Rollout, Scores
from rlhf_ray.data.records import Row
from rlhf_ray.models.assembly import SYNCED_REFERENCE
from rlhf_ray.models.batching import Batching
from rlhf_ray.models.zero3 import MaxOverRanks, padding_batch
from rlhf_ray.rewards.protocol import Reward, RewardInputs, Texts
from rlhf_ray.roles import invariants
from rlhf_ray.roles.generator import ActiveAdapter
from rlhf_ray.roles.loaded_adapter import LoadedAdapter
from rlhf_ray.runtime.beside import Beside


def weighted_sum(rewards: Sequence[Reward], parts: Mapping[str, Tensor], rows: int) -> Tensor:
    """f32[B]: sum_r weight_r x part_r over the rewards that apply to a reply. NaN where none does; not finite where one is broken.

    Rewards of weight 0 play no part; 0 where none has a weight.   parts: name -> f32[B], see `Reward.score`.   rows: B."""
    total = torch.zeros(rows)
    counted = [reward for reward in rewards if reward.weight]
    applies = torch.zeros(rows, dtype=torch.bool)
    for reward in counted:
        part = parts[reward.name]
        total += torch.where(part.isnan(), 0.0, reward.weight * part)
        applies |= ~part.isnan()
    return total.masked_fill(~applies, math.nan) if counted else total


def _quiet_where_broken(rewards: Sequence[Reward], parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`parts`; a reward without a weight watches: where it is broken it says nothing, and the run goes on without it."""
    found = dict(parts)
    for reward in rewards:
        if not reward.weight:
            for name in found:
                if name == reward.name or name.startswith(f"{reward.name}/"):
                    found[name] = found[name].nan_to_num(math.nan, math.nan, math.nan)
    return found


@dataclass
class PendingScores:
    """Scores of which the models' part is there. answers: the parts that are asked for elsewhere, to come; None if there are none.
    finish: puts both together."""

    answers: Future[dict[str, dict[str, Tensor]]] | None
    finish: Callable[[Mapping[str, Mapping[str, Tensor]]], Scores]

    def check(self) -> None:
        """Raise what has gone wrong elsewhere, as far as it is known by now."""
        if self.answers is not None and self.answers.done():
            self.answers.result()

    def result(self) -> Scores:
        """Wait for what is still missing. Raises what went wrong."""
        return self.finish({} if self.answers is None else self.answers.result())


class Scorer:
    """rewards: in the job's order.  reference: the role whose log-probabilities the KL is taken against, None for none.

    batching: how rows are cut into passes.  to_texts: the texts of a rollout's rows, for Python rewards.  device: of the models.

    max_over_ranks: under ZeRO-3, how ranks with chunks of different sizes come to make equally many forward passes.

    synced: the adapter that is the reference after a reset (ref_model_sync_steps), with a role of its name; None without resets.

    overlaps: ask the rewards that wait for others (`Reward.waits`) beside the models' passes; else everything on one thread."""

    def __init__(
        self,
        models: Callable[..., Any],
        rewards: Sequence[Reward],
        to_texts: Callable[[Rollout, Sequence[Row]], Texts],
        temperature: float,
        batching: Batching,
        device: torch.device,
        reference: str | None = "reference",
        max_over_ranks: MaxOverRanks = int,
        synced: LoadedAdapter | None = None,
        overlaps: bool = True,
    ) -> None:
        self.models, self.rewards, self.to_texts = models, tuple(rewards), to_texts
        self.temperature, self.batching, self.device = temperature, batching, device
        self.reference, self.max_over_ranks, self.synced = reference, max_over_ranks, synced
        self.beside, self.overlaps = Beside(), overlaps
        self.about: dict[str, Any] = {}

    def describe(self) -> dict[str, Any]:
        """Where it is and what it loaded, as whoever built it has noted."""
        return self.about

    def score(self, rollout: Rollout, rows: Sequence[Row], reference: ActiveAdapter | None = None) -> Scores:
        """rows: the data rows behind the rollout's rows, in the same order.

        reference: the adapter that is the reference by now, which `synced` must hold; None for what the run started from."""
        return self.begin(rollout, rows, reference).result()

    def begin(self, rollout: Rollout, rows: Sequence[Row], reference: ActiveAdapter | None = None) -> PendingScores:
        """`score`, without waiting for rewards that come from elsewhere: what the models say is there when this returns."""
        if reference is None:
            return self._begin(rollout, rows, self.temperature)
        synced = self._synced()
        if not synced.holds(reference):
            raise invariants.stale_reference("scorer", synced.sha256, reference.sha256)
        return self._begin(rollout, rows, self.temperature, synced.sha256)

    def score_with(
        self,
        rollout: Rollout,
        rows: Sequence[Row],
        temperature: float,
        reference: ActiveAdapter,
        tensors: Mapping[str, Any],
    ) -> Scores:
        """`score_at` against the reference that `reference` names. tensors: plain PEFT key -> f32 array. The scores echo the sha256
        of what the model holds. Raises InvariantError if `tensors` is not what was named."""
        synced = self._synced()
        if not synced.holds(reference):
            synced.load(reference, tensors)
        return self.score_at(rollout, rows, temperature, synced.held_sha256())

    def score_at(self, rollout: Rollout, rows: Sequence[Row], temperature: float, reference_sha256: str = "") -> Scores:
        """`score`, with log-probabilities at another temperature.

        reference_sha256: of what `synced` holds, which is then the reference; "" for the one that the run started from."""
        return self._begin(rollout, rows, temperature, reference_sha256).result()

    @torch.no_grad()
    def _begin(
        self, rollout: Rollout, rows: Sequence[Row], temperature: float, reference_sha256: str = ""
    ) -> PendingScores:
        inputs = RewardInputs(rollout, rows, self.to_texts)
        asked = [reward for reward in self.rewards if self.overlaps and reward.waits]
        answers = self._ask(asked, inputs) if asked else None

        def logprobs(role: str) -> Tensor:
            found = torch.zeros(rollout.response_mask.shape)
            for batch, seq in inputs.sequences(self.batching, self.device, self.max_over_ranks):
                passed, _ = self.models("logprobs", role, seq, temperature)
                found[batch, : seq.response_width] = passed.float().cpu()
            return found

        start = torch.zeros(rollout.response_mask.shape) if self.reference is None else logprobs(self.reference)
        moved = logprobs(SYNCED_REFERENCE) if reference_sha256 else None
        own = {reward.name: reward.parts(inputs) for reward in self.rewards if reward not in asked}
        drift = next((d for d in (reward.drift(inputs) for reward in reversed(self.rewards)) if d is not None), None)

        def finish(answered: Mapping[str, Mapping[str, Tensor]]) -> Scores:
            every = {**own, **answered}
            parts = {name: part for reward in self.rewards for name, part in every[reward.name].items()}
            return Scores(
                reward=weighted_sum(self.rewards, parts, len(rollout)),
                ref_logprobs=start if moved is None else moved,
                row_id=rollout.row_id,
                parts=_quiet_where_broken(self.rewards, parts),
                drift=drift,
                start_logprobs=None if moved is None else start,
                reference_sha256=reference_sha256,
            )

        return PendingScores(answers, finish)

    def _ask(self, rewards: Sequence[Reward], inputs: RewardInputs) -> Future[dict[str, dict[str, Tensor]]]:
        """What `rewards` say, by name, to come."""
        _ = (
            inputs.texts
        )  # here: the tokenizer is not for two threads, and models with tokenizers of their own read these texts too

        def ask() -> dict[str, dict[str, Tensor]]:
            with torch.no_grad():  # it is each thread's own
                return {reward.name: reward.parts(inputs) for reward in rewards}

        return self.beside.begin(ask)

    @torch.no_grad()
    def join(self, reference: ActiveAdapter | None = None) -> None:
        """Under ZeRO-3, what a rank without a rollout does while others score theirs: the same passes, over one token."""
        for role in (self.reference, None if reference is None else SYNCED_REFERENCE):
            for _ in range(self.max_over_ranks(0) if role is not None else 0):
                self.models("logprobs", role, padding_batch(self.device), self.temperature)
        for reward in self.rewards:
            reward.join()

    def _synced(self) -> LoadedAdapter:
        if self.synced is None:
            raise TypeError("a reference is named, and this scorer has no adapter for it")
        return self.synced
