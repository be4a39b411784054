"""From logits to tokens: temperature, min_p, top-k, top-p, greedy or inverse-CDF sampling; log-probabilities of what is taken."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_ray.maths.rng import sample_inverse_cdf, uniforms
from rlhf_ray.sampler.logits import LogitsPlan


@dataclass(frozen=True)
class Truncation:
    """The K rows of a batch that sample from a part of the vocabulary. rows, top_k: i64[K]. top_p: f32[K].
    log_min_p: f32[K], None if no row has min_p."""

    rows: Tensor
    top_k: Tensor
    top_p: Tensor
    log_min_p: Tensor | None = None


@dataclass(frozen=True)
class SamplingPlan:
    """How each of N rows is sampled.

    seeds: i64[N], row seeds.   temperature: f32[N].   truncation: None if no row has top-k or top-p.
    greedy: bool[N], None if no row is greedy.   all_greedy: no row samples.
    logits: what is done to logits before, None if nothing.   reported: f32[N], temperature of the log-probabilities that are
    returned, where it is another.   top: how many of the likeliest tokens each row lists; None if no row does.
    """

    seeds: Tensor
    temperature: Tensor
    truncation: Truncation | None = None
    greedy: Tensor | None = None
    all_greedy: bool = False
    logits: LogitsPlan | None = None
    reported: Tensor | None = None
    top: tuple[int, ...] | None = None


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


def keep_min_p(logprobs: Tensor, log_min_p: Tensor) -> Tensor:
    """Set the log-probabilities of tokens less than min_p times as likely as the likeliest to -inf (Nguyen et al. 2024,
    arXiv:2407.01082).   logprobs: f[K, V].   log_min_p: f32[K], -inf keeps all.   Returns f[K, V]."""
    least = logprobs.amax(-1, keepdim=True) + log_min_p[:, None]
    return logprobs.masked_fill(logprobs < least, -torch.inf)


def sample_tokens(logits: Tensor, plan: SamplingPlan, token_index: Tensor) -> tuple[Tensor, Tensor]:
    """The next token of each row and its log-probability under softmax(logits / temperature), before top-k and top-p.

    logits: f[N, V].   token_index: i64[N], how many tokens of the reply came before.   Returns i64[N], f32[N].
    Log-probabilities are those of the model: `plan.logits` does not change them, and `plan.reported` may be their temperature.
    A row whose logits are not finite, or that has no token left, gets the log-probability nan and some token; the other rows are
    not touched by it.
    """
    scores = logits if plan.logits is None else plan.logits.apply(logits.float())
    logprobs = torch.log_softmax(scores.float() / plan.temperature[:, None], dim=-1)
    if plan.all_greedy:
        tokens = scores.argmax(-1)
    else:
        tokens = sample_inverse_cdf(_probabilities(logprobs, plan.truncation), uniforms(plan.seeds, token_index))
        if plan.greedy is not None:
            tokens = torch.where(plan.greedy, scores.argmax(-1), tokens)
    if plan.logits is not None or plan.reported is not None:
        broken = logprobs[:, :1].isnan()
        logprobs = _reported(logits, plan).masked_fill(broken, torch.nan)
    return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1)


def likeliest(logits: Tensor, plan: SamplingPlan) -> list[tuple[tuple[int, float], ...]]:
    """(token id, log-probability) of the tokens that each row lists, the likeliest first; as many as `plan.top` says.

    logits: f[N, V]."""
    if plan.top is None:
        return [()] * logits.shape[0]
    best = _reported(logits, plan).topk(min(max(plan.top), logits.shape[-1]))
    rows = zip(best.indices.tolist(), best.values.tolist(), plan.top)
    return [tuple(zip(ids[:top], values[:top])) for ids, values, top in rows]


def _reported(logits: Tensor, plan: SamplingPlan) -> Tensor:
    temperature = plan.temperature if plan.reported is None else plan.reported
    return torch.log_softmax(logits.float() / temperature[:, None], dim=-1)


def _probabilities(logprobs: Tensor, truncation: Truncation | None) -> Tensor:
    """Not normalised after truncation: the inverse CDF divides by the sum."""
    if truncation is not None:
        t = truncation
        cut = logprobs[t.rows]
        if t.log_min_p is not None:
            cut = keep_min_p(cut, t.log_min_p)
        logprobs = logprobs.index_copy(0, t.rows, truncate(cut, t.top_k, t.top_p))
    broken = logprobs[:, :1].isnan()  # one nan or inf makes the whole row nan; whether there are any a GPU is not asked
    # Some token: such rows must not fail the batch, and are known by their log-probability.
    return logprobs.exp().masked_fill_(broken, 1.0)
