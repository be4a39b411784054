"""Log-probabilities of chosen tokens and entropies, in float32, with or without the logits of all positions in memory.

One temperature divides the logits in every pass, sampling and scoring alike: two different temperatures are two different policies,
and the KL between them is then wrong (it often turns negative).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlhf_ray.maths.masks import full_precision


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature: expected a finite number above 0, got {temperature}")
    scaled = full_precision(logits)
    return scaled if temperature == 1.0 else scaled / temperature


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """log p_t = z_t[y_t] - logsumexp(z_t),   z = logits / temperature

    Only the chosen entry is kept, never a [.., V] table of log-probabilities.

    logits: [.., V], column t predicts tokens[.., t] (the caller shifts).   tokens: i64[..], every id inside the vocabulary.
    Returns f32[..] (float64 for float64 logits).
    """
    if logits.shape[:-1] != tokens.shape:
        raise ValueError(
            f"tokens: expected shape {tuple(logits.shape[:-1])} to match the logits, got {tuple(tokens.shape)}"
        )
    scaled = _scaled(logits, temperature)
    chosen = scaled.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return chosen - scaled.logsumexp(dim=-1)


def entropy(logits: Tensor, temperature: float) -> Tensor:
    """H_t = - sum_v p_tv log p_tv in nats, over the full vocabulary; a token with logit -inf contributes 0.

    logits: [.., V].   Returns f32[..] (float64 for float64 logits), between 0 and ln V.
    """
    logp = _scaled(logits, temperature).log_softmax(dim=-1)
    return -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(dim=-1)


def chunked_token_logprobs(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    tokens: Tensor,
    temperature: float,
    chunk_size: int,
    with_entropy: bool,
    min_calls: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """`token_logprobs(head(hidden), tokens)`, with the logits of at most `chunk_size` positions alive at any time.

    When a gradient is needed and there are several chunks, each is an activation checkpoint: its logits are dropped after the
    forward and computed again in the backward, which of a single chunk would be the next thing to do. For 64 x 300 positions and a
    vocabulary of 128,000 that is 0.5 GB (chunk_size 1024) in place of 10 GB.

    hidden: [B, R, D], column t is the state that predicts tokens[:, t].   head: maps [N, D] to logits [N, V], row by row.
    tokens: i64[B, R].   with_entropy: also the entropy of every position, with a gradient where one is needed (the entropy bonus).
    min_calls: at least this many calls of `head`, in the backward too; ZeRO-3 ranks with different widths pass their common maximum
    of `chunk_calls`, because under ZeRO-3 every call is a collective.
    Returns logprobs f32[B, R] and entropy f32[B, R] or None.
    """
    if hidden.shape[:-1] != tokens.shape:
        raise ValueError(
            f"tokens: expected shape {tuple(hidden.shape[:-1])} to match hidden, got {tuple(tokens.shape)}"
        )
    flat_hidden, flat_tokens = hidden.flatten(0, -2), tokens.flatten()
    positions = flat_tokens.numel()

    def one_chunk(chunk_hidden: Tensor, chunk_tokens: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(chunk_hidden)
        logprobs = token_logprobs(logits, chunk_tokens, temperature)
        if not with_entropy:
            return logprobs, logprobs.new_empty(0)
        return logprobs, entropy(logits, temperature)

    parts = []
    calls = max(min_calls, chunk_calls(positions, chunk_size))
    for call in range(calls):
        rows = slice(call * chunk_size, (call + 1) * chunk_size)
        if call and rows.start >= positions:
            rows = slice(0, 1)  # a surplus call of min_calls; its results are cut off below, its gradient is 0
        chunk = (flat_hidden[rows], flat_tokens[rows])
        parts.append(
            checkpoint(one_chunk, *chunk, use_reentrant=False)
            if calls > 1 and torch.is_grad_enabled()
            else one_chunk(*chunk)
        )
    logprobs = torch.cat([p[0] for p in parts])[:positions].view(tokens.shape)
    return logprobs, torch.cat([p[1] for p in parts])[:positions].view(tokens.shape) if with_entropy else None


def chunk_calls(positions: int, chunk_size: int) -> int:
    """How often `chunked_token_logprobs` calls the head: ceil(positions / chunk_size), and once for no positions at all."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1 position, got {chunk_size}")
    return max(1, -(-positions // chunk_size))
