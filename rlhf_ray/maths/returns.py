"""From scores and penalties to advantages and returns.

Column t of every [B, R] tensor is about reply token t: values[:, t] is V of the state BEFORE token t, rewards[:, t] is paid
after it. Every function takes the response mask and returns exactly 0 outside it; what stands there in its inputs does not matter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_ray.maths.masks import (
    check_mask,
    full_precision,
    last_index,
    masked_mean,
    masked_sum,
    masked_var,
    zero_outside,
)


def penalise_unfinished(scores: Tensor, finished: Tensor, missing_eos_penalty: float | None) -> Tensor:
    """s'_i = s_i - p if reply i has no eos, else s_i   (TRL's missing_eos_penalty; None or 0 changes nothing)

    Comes before normalisation, so that p is in the reward model's own unit.
    scores: f32[B].   finished: bool[B], decided on ids where the tokens were sampled.   p >= 0.   Returns f32[B].
    """
    if finished.dtype != torch.bool or finished.shape != scores.shape:
        raise ValueError(
            f"finished: expected bool of shape {tuple(scores.shape)}, got {finished.dtype} {tuple(finished.shape)}"
        )
    if missing_eos_penalty is None:
        return full_precision(scores)
    if not 0 <= missing_eos_penalty < float("inf"):
        raise ValueError(f"missing_eos_penalty: expected a finite number of at least 0, got {missing_eos_penalty}")
    return full_precision(scores) - missing_eos_penalty * (~finished).float()


def overlong_penalties(lengths: Tensor, response_length: int, buffer: int, penalty: float) -> Tensor:
    """o_i = p clip((n_i - (L - b)) / b, 0, 1): a reply is charged more and more in the last b tokens before the limit L

    (the soft overlong punishment of DAPO, arXiv:2503.14476, equation 13, which charges the whole p to what is cut off).
    lengths: [B], tokens.   0 < b <= L.   Returns f32[B].

    >>> overlong_penalties(torch.tensor([10, 14, 20]), response_length=20, buffer=8, penalty=1.0).tolist()
    [0.0, 0.25, 1.0]
    """
    if not 0 < buffer <= response_length:
        raise ValueError(f"overlong_buffer: expected 1 to {response_length}, got {buffer}")
    return penalty * ((lengths.float() - (response_length - buffer)) / buffer).clamp(0.0, 1.0)


def shape_rewards(scores: Tensor, kl_penalty: Tensor, kl_coef: float, response_mask: Tensor) -> Tensor:
    """r_t = -beta k_t m_t,   then r_last += s, once.

    scores: f32[B], already penalised and normalised.   kl_penalty: f32[B, R], before the coefficient.   response_mask: bool[B, R].
    Returns f32[B, R].   With kl_coef 0 the penalty part is exactly 0, even where the penalty is not finite.
    Raises ValueError for a reply without tokens.

    >>> mask = torch.tensor([[True, True, False]])
    >>> shape_rewards(torch.tensor([1.0]), torch.tensor([[0.5, 0.25, 9.0]]), 0.5, mask).tolist()
    [[-0.25, 0.875, 0.0]]
    """
    check_mask(response_mask, kl_penalty=kl_penalty)
    _check_rows("scores", scores, response_mask)
    penalties = full_precision(kl_penalty)
    rewards = torch.zeros_like(penalties) if kl_coef == 0 else zero_outside(-kl_coef * penalties, response_mask)
    return rewards.scatter_add(1, last_index(response_mask)[:, None], scores.to(rewards.dtype)[:, None])


def gae(
    rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float, bootstrap: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A_t = sum_k (gamma lam)^k delta_{t+k},   delta_t = r_t + gamma V_{t+1} - V_t;   returns_t = A_t + V_t

    (arXiv:1506.02438, equation 16). Columns outside the mask do not exist: no value is read or bootstrapped from there.

    rewards, values: f32[B, R].   response_mask: bool[B, R], True on real tokens, eos included.
    bootstrap: f32[B], V of the state after the last real token: 0 for a finished reply, the value model's value for one that was
    cut off by length. None is 0 for all.
    Returns (advantages, returns), f32[B, R] each, 0 outside the mask; returns are taken before any whitening.

    >>> mask = torch.tensor([[True, True, True, False]])
    >>> r, v = torch.tensor([[-0.01, 0.02, 0.98, 0.0]]), torch.tensor([[0.5, 0.6, 0.7, 9.9]])
    >>> [[round(x, 4) for x in row] for row in gae(r, v, mask, gamma=1.0, lam=0.95)[0].tolist()]
    [[0.4567, 0.386, 0.28, 0.0]]
    """
    check_mask(response_mask, rewards=rewards, values=values)
    rewards, values = full_precision(rewards), full_precision(values)
    next_value = rewards.new_zeros(rewards.shape[0])
    if bootstrap is not None:
        _check_rows("bootstrap", bootstrap, response_mask)
        next_value = bootstrap.to(rewards.dtype)
    next_advantage = torch.zeros_like(next_value)
    columns = []
    for t in reversed(range(rewards.shape[1])):
        real = response_mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(real, delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(real, values[:, t], next_value)
        columns.append(next_advantage)
    stacked = torch.stack(columns[::-1], dim=1) if columns else torch.zeros_like(rewards)
    advantages = zero_outside(stacked, response_mask)
    return advantages, zero_outside(advantages + values, response_mask)


def response_penalties(kl_penalty: Tensor, kl_coef: float, response_mask: Tensor) -> Tensor:
    """p_i = beta sum_t k_it m_it: what a reply taken as ONE action pays, as RLOO and GRPO take it here.   (arXiv:2402.14740)

    kl_penalty: f32[B, R].   response_mask: bool[B, R].   Returns f32[B], exactly 0 for kl_coef 0, even where the penalty is not
    finite.
    """
    check_mask(response_mask, kl_penalty=kl_penalty)
    total = masked_sum(kl_penalty, response_mask, dim=1)
    return torch.zeros_like(total) if kl_coef == 0 else kl_coef * total


def rloo_advantages(scores: Tensor, group_size: int) -> Tensor:
    """A_i = R_i - (sum of R_j, j != i, in the group) / (k - 1): the baseline of a reply is the mean of its siblings.

    scores: f32[B], rows g*k .. g*k + k-1 answer the same prompt.   Returns f32[B].   (arXiv:2402.14740)
    Raises ValueError if k < 2 or k does not divide B.

    >>> rloo_advantages(torch.tensor([1.0, 2.0, 6.0]), 3).tolist()
    [-3.0, -1.5, 4.5]
    """
    grouped = _groups(scores, group_size)
    siblings = (grouped.sum(dim=1, keepdim=True) - grouped) / (group_size - 1)
    return (grouped - siblings).flatten().to(full_precision(scores).dtype)


def grpo_advantages(scores: Tensor, penalties: Tensor, group_size: int, scale: str, eps: float) -> Tensor:
    """A_i = (s_i - mean of s over the group) / (std of s + eps) - (p_i - mean of p over the group)

    The spread is that of the scores alone: divided by the spread of score minus penalty, replies of equal score would learn
    nothing but the noise of the penalty, at full size. So the coefficient in p weighs the KL against scores of spread 1, as it does
    where GRPO has the KL in its loss. The standard deviation is the sample one (n - 1), as in TRL.

    scale: `group`, the std of each group (arXiv:2402.03300, section 4.1); `batch`, of all scores, which does not weigh up prompts
    on which all replies score nearly the same (arXiv:2508.08221); `none`, no division (Dr. GRPO, arXiv:2503.20783).
    scores, penalties: f32[B], rows g*k .. g*k + k-1 answer the same prompt; penalties after the coefficient.   Returns f32[B].
    Raises ValueError if k < 2 or k does not divide B.
    """
    grouped = _groups(scores, group_size)
    advantages = _centred(grouped)
    if scale == "group":
        advantages = advantages / (grouped.std(dim=1, keepdim=True) + eps)
    elif scale == "batch":
        advantages = advantages / (grouped.std() + eps)
    elif scale != "none":
        raise ValueError(f"scale_rewards: expected group, batch or none, got {scale!r}")
    return (advantages - _centred(_groups(penalties, group_size))).flatten().to(full_precision(scores).dtype)


def equal_groups(scores: Tensor, group_size: int) -> Tensor:
    """bool[B]: True where all replies to a reply's prompt have the same score, which says nothing about any of them.

    scores: f32[B], rows g*k .. g*k + k-1 answer the same prompt.   Raises ValueError as `rloo_advantages` does."""
    grouped = _groups(scores, group_size)
    equal = grouped.amax(dim=1) == grouped.amin(dim=1)
    return equal[:, None].expand(grouped.shape).flatten()


def to_tokens(advantages: Tensor, response_mask: Tensor) -> Tensor:
    """A_it = A_i m_it.   advantages: f32[B].   response_mask: bool[B, R].   Returns f32[B, R]."""
    _check_rows("advantages", advantages, response_mask)
    return zero_outside(full_precision(advantages)[:, None].expand(response_mask.shape), response_mask)


def whiten(values: Tensor, response_mask: Tensor, subtract_mean: bool, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the real entries of the whole tensor; with subtract_mean False the mean is added back.

    Mean and biased variance are taken under the mask, in float64. Call it on the whole step, over all ranks: per microbatch it
    would erase the differences between microbatches.

    values: f32[B, R].   response_mask: bool[B, R].   Returns f32[B, R], 0 outside the mask.   One NaN inside the mask makes all of
    it NaN: check scores for finiteness before.
    """
    check_mask(response_mask, values=values)
    exact = values.double()
    mean, var = masked_mean(exact, response_mask), masked_var(exact, response_mask)
    white = (exact - mean) * torch.rsqrt(var + eps)
    if not subtract_mean:
        white = white + mean
    return zero_outside(white, response_mask).to(full_precision(values).dtype)


def _check_rows(name: str, per_response: Tensor, response_mask: Tensor) -> None:
    if per_response.shape != response_mask.shape[:1]:
        raise ValueError(f"{name}: expected shape {tuple(response_mask.shape[:1])}, got {tuple(per_response.shape)}")


def _centred(grouped: Tensor) -> Tensor:
    return grouped - grouped.mean(dim=1, keepdim=True)


def _groups(scores: Tensor, group_size: int) -> Tensor:
    if group_size < 2:
        raise ValueError(
            f"num_generations: expected at least 2 replies per prompt for a group baseline, got {group_size}"
        )
    if scores.ndim != 1 or scores.shape[0] % group_size:
        raise ValueError(f"scores: expected [B] with B a multiple of {group_size}, got shape {tuple(scores.shape)}")
    return scores.double().view(-1, group_size)  # float64: a group of equal scores has advantages of exactly 0
