"""The generator: prompts in, replies out, sampled by the adapter that the request names.

Randomness is derived, never drawn: row i of step s has the seed hash(run seed, role, s, i), and a chunk is sampled alone in an
engine that starts empty. So a chunk's tokens depend on the adapter and on the chunk, not on who samples it or when, and a
repeated chunk comes out the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlhf_ray.batches import PromptBatch, Rollout
from rlhf_ray.maths.rng import row_seed
from rlhf_ray.sampler.requests import DecodeEngine, DecodeRequest, DecodeResult, KeepStepping


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen. stop_ids: any of them ends a reply and belongs to it."""

    stop_ids: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    greedy: bool = False


@dataclass(frozen=True)
class ActiveAdapter:
    """name: the adapter in the model, None for the base.  version, sha256: of its weights, as the learner published them."""

    name: str | None
    version: int = 0
    sha256: str = ""


class Generator:
    """seed: the run's.  role: separates the randomness of rollouts from that of evaluations.

    keep_stepping: under ZeRO-3, whether any rank still decodes; all ranks then decode until none does."""

    def __init__(
        self, sampler: DecodeEngine, pad_id: int, seed: int, keep_stepping: KeepStepping | None = None
    ) -> None:
        self.sampler, self.pad_id, self.seed, self.keep_stepping = sampler, pad_id, seed, keep_stepping

    def generate(
        self, prompts: PromptBatch, adapter: ActiveAdapter, decoding: Decoding, role: str, step: int
    ) -> Rollout:
        """One chunk. Rows keep their order; the rollout echoes the adapter."""
        requests = [
            DecodeRequest(
                prompt_ids=tuple(ids[mask].tolist()),
                row_seed=row_seed(self.seed, role, step, int(row)),
                max_new_tokens=int(budget),
                stop_ids=decoding.stop_ids,
                temperature=decoding.temperature,
                top_p=decoding.top_p,
                top_k=decoding.top_k,
                greedy=decoding.greedy,
                adapter=adapter.name,
            )
            for ids, mask, row, budget in zip(
                prompts.prompt_ids, prompts.prompt_mask, prompts.row_id, prompts.max_new_tokens
            )
        ]
        results = self.sampler.run(requests, self.keep_stepping, adapter.name)
        return to_rollout(prompts, results, adapter, self.pad_id)

    def join(self, adapter: ActiveAdapter) -> None:
        """Under ZeRO-3, what a rank without a chunk does while others sample theirs."""
        self.sampler.run([], self.keep_stepping, adapter.name)


def to_rollout(prompts: PromptBatch, results: list[DecodeResult], adapter: ActiveAdapter, pad_id: int) -> Rollout:
    """Right-pad the replies to the longest and join them to their left-padded prompts."""
    width = max(len(r.token_ids) for r in results)
    tokens = torch.full((len(results), width), pad_id, dtype=torch.int64)
    logprobs = torch.zeros(len(results), width)
    for i, result in enumerate(results):
        tokens[i, : len(result.token_ids)] = torch.tensor(result.token_ids)
        logprobs[i, : len(result.token_ids)] = torch.tensor(result.logprobs)
    lengths = torch.tensor([len(r.token_ids) for r in results])
    return Rollout(
        tokens=torch.cat([prompts.prompt_ids, tokens], dim=1),
        prompt_mask=prompts.prompt_mask,
        response_mask=torch.arange(width)[None, :] < lengths[:, None],
        sample_logprobs=logprobs,
        finished=torch.tensor([r.finished for r in results]),
        row_id=prompts.row_id,
        adapter_version=adapter.version,
        adapter_sha256=adapter.sha256,
    )
