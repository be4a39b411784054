"""From logits to tokens: temperature, top-k, top-p, greedy or inverse-CDF sampling, and the log-probability of what was taken."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_ray.maths.rng import sample_inverse_cdf, uniforms


@dataclass(frozen=True)
class Truncation:
    """The K rows of a batch that sample from a part of the vocabulary. rows, top_k: i64[K]. top_p: f32[K]."""

    rows: Tensor
    top_k: Tensor
    top_p: Tensor


@dataclass(frozen=True)
class SamplingPlan:
    """How each of N rows is sampled.

    seeds: i64[N], row seeds.   temperature: f32[N].   truncation: None if no row has top-k or top-p.
    greedy: bool[N], None if no row is greedy.   all_greedy: no row samples.
    """

    seeds: Tensor
    temperature: Tensor
    truncation: Truncation | None = None
    greedy: Tensor | None = None
    all_greedy: bool = False


def truncate(logprobs: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Set the log-probabilities of tokens outside top-k, then outside the nucleus of what is left, to -inf.

    top-k keeps every token at least as likely as the k-th (0: all). top-p (Holtzman et al. 2020, arXiv:1904.09751) keeps a token if
    those ahead of it hold less than p: the smallest set that reaches p, never empty, also for a p that is 0 in float32.

    logprobs: f[K, V].   top_k: i64[K].   top_p: f32[K].   Returns f[K, V].
    """
    vocabulary = logprobs.shape[-1]
    ranked, order = logprobs.sort(dim=-1, descending=True, stable=True)
    last = torch.where(top_k > 0, top_k, vocabulary).clamp(max=vocabulary) - 1
    keep = ranked >= ranked.gather(-1, last[:, None])
    probs = ranked.masked_fill(~keep, -torch.inf).double().softmax(-1)
    ahead = probs.cumsum(-1) - probs
    keep &= (ahead < top_p[:, None]) | (top_p[:, None] >= 1)
    keep[:, 0] = True
    return logprobs.masked_fill(~torch.zeros_like(keep).scatter_(-1, order, keep), -torch.inf)


def sample_tokens(logits: Tensor, plan: SamplingPlan, token_index: Tensor) -> tuple[Tensor, Tensor]:
    """The next token of each row and its log-probability under softmax(logits / temperature), before top-k and top-p.

    logits: f[N, V].   token_index: i64[N], how many tokens of the reply came before.   Returns i64[N], f32[N].
    A row whose logits are not finite gets the log-probability nan and some token; the other rows are not touched by it.
    """
    logprobs = torch.log_softmax(logits.float() / plan.temperature[:, None], dim=-1)
    if plan.all_greedy:
        tokens = logits.argmax(-1)
    else:
        tokens = sample_inverse_cdf(_probabilities(logprobs, plan.truncation), uniforms(plan.seeds, token_index))
        if plan.greedy is not None:
            tokens = torch.where(plan.greedy, logits.argmax(-1), tokens)
    return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1)


def _probabilities(logprobs: Tensor, truncation: Truncation | None) -> Tensor:
    """Not normalised after truncation: the inverse CDF divides by the sum."""
    if truncation is not None:
        t = truncation
        logprobs = logprobs.index_copy(0, t.rows, truncate(logprobs[t.rows], t.top_k, t.top_p))
    broken = logprobs[:, :1].isnan()  # one nan or inf makes the whole row nan
    # some token: such rows must not fail the batch, and are known by their log-probability
    return logprobs.exp().masked_fill_(
        broken, 1.0
    )  # not asked whether there are any: a GPU would have to be waited for
