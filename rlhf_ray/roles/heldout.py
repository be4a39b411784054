"""How a policy does on held-out prompts: reward with its standard error, KL to the policy that the run started from, length, share
finished."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.batches import Rollout, Scores
from rlhf_ray.maths import kl
from rlhf_ray.maths.masks import masked_sum
from rlhf_ray.maths.standard_errors import standard_error
from rlhf_ray.metrics import confirm_name
from rlhf_ray.roles.collector import Collected


@dataclass(frozen=True)
class HeldOut:
    """Per-reply figures, f32[B] each. k1, k3: summed over tokens, nats, of the sampler's own log-probabilities."""

    reward: Tensor
    parts: dict[str, Tensor]
    k1: Tensor
    k3: Tensor
    length: Tensor
    finished: Tensor

    @classmethod
    def of(cls, collected: Collected) -> HeldOut:
        rollout, scores = collected.rollout, collected.scores
        k1, k3 = response_kl(rollout, scores)
        return cls(scores.reward, scores.parts, k1, k3, rollout.lengths.float(), rollout.finished.float())

    def where(self, mask: Tensor) -> HeldOut:
        """The replies that `mask`, bool[B], names."""
        parts = {name: part[mask] for name, part in self.parts.items()}
        return HeldOut(self.reward[mask], parts, self.k1[mask], self.k3[mask], self.length[mask], self.finished[mask])

    def metrics(self, estimates_kl: bool = True) -> dict[str, float]:
        """Under the `eval/` names; none of a reward that applies to no reply.

        estimates_kl: false where replies are not drawn from the policy's whole distribution: the mean of k1 over
        greedy ones, say, is not a KL, and nothing should take it for one."""
        if not len(self.reward):
            return {"eval/rows": 0.0}
        reward = self.reward[torch.isfinite(self.reward)]
        found = {"eval/reward": float(reward.mean())} if len(reward) else {}
        found |= {
            "eval/length": float(self.length.mean()),
            "eval/finished": float(self.finished.mean()),
            "eval/rows": float(len(self.reward)),
        }
        if estimates_kl:
            found |= {
                "eval/kl_k1_per_response": float(self.k1.mean()),
                "eval/kl_k3_per_response": float(self.k3.mean()),
            }
        if len(reward) > 1:
            found["eval/reward_se"] = standard_error(reward)
        for name, part in self.parts.items():
            known = part[torch.isfinite(part)]
            if len(known):
                found[f"eval/reward/{name}"] = float(known.mean())
            if len(known) > 1:
                found[f"eval/reward_se/{name}"] = standard_error(known)
        return found


def held_out_metrics(collected: Collected, confirming: Sequence[bool], estimates_kl: bool) -> dict[str, float]:
    """The metrics of an evaluation: of all replies; where `confirming` says of each prompt whether it is set apart, of the others
    under `eval/` and of those under `eval/confirm/`.   estimates_kl: see `HeldOut.metrics`."""
    found = HeldOut.of(collected)
    if not any(confirming):
        return found.metrics(estimates_kl)
    apart = torch.tensor(confirming)[collected.rollout.row_id]
    metrics = found.where(~apart).metrics(estimates_kl)
    if bool(apart.any()):
        metrics |= {confirm_name(name): value for name, value in found.where(apart).metrics(estimates_kl).items()}
    return metrics


def response_kl(rollout: Rollout, scores: Scores) -> tuple[Tensor, Tensor]:
    """k1 and k3 of each reply, f32[B], against the policy that the run started from: summed over its tokens, under the distribution
    it was sampled from."""
    mask = rollout.response_mask
    pair = rollout.sample_logprobs, scores.start
    return masked_sum(kl.k1(*pair), mask, dim=1), masked_sum(kl.k3(*pair), mask, dim=1)


def sample_rows(collected: Collected, prompts: list[str], responses: list[str], count: int) -> list[dict[str, Any]]:
    """The first `count` replies with their figures, as samples.jsonl stores them."""
    k1, _ = response_kl(collected.rollout, collected.scores)
    return [
        {
            "row": i,
            "prompt": prompts[i],
            "reply": responses[i],
            "reward": float(collected.scores.reward[i]),
            "kl": float(k1[i]),
            "length": int(collected.rollout.lengths[i]),
            "finished": bool(collected.rollout.finished[i]),
        }
        for i in range(min(count, len(collected.rollout)))
    ]
