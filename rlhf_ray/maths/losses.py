"""Losses as (sum, count), to be divided once by the GLOBAL count of the optimizer step.

The mean of the means of microbatches with unequal token counts is wrong: four tokens of loss 1 in one microbatch and one token of
loss 3 in another are (4 + 3) / 5 = 1.4, not (1 + 3) / 2 = 2. So nothing here divides. `count` is an i64 scalar, ready to be
all-reduced; every value of `stats` is a detached scalar, a sum over real tokens unless its name says max.

A row whose mask is all False adds exactly 0 to sum, count, stats and gradient: a padding row for ranks that must run equally often.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf_ray.maths import kl
from rlhf_ray.maths.masks import check_mask, full_precision, masked_mean, masked_sum, zero_outside

Stats = dict[str, Tensor]


def policy_loss_sum(
    new_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    cliprange: float,
    token_weights: Tensor | None = None,
    *,
    cliprange_high: float | None = None,
    dual_clip: float | None = None,
    ratio_level: str = "token",
    row_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Stats]:
    """sum_i a_i sum_t m_t w_t max(-A_t rho_t, -A_t clip(rho_t, 1 - e, 1 + e')),   rho_t = exp(new_t - old_t)

    (arXiv:1707.06347, equation 7). The log-ratio is clamped to +-20, so that an overflowing ratio cannot put inf x 0 into a
    gradient.

    new_logprobs (with gradient), old_logprobs, advantages: f32[B, R].   response_mask: bool[B, R].
    token_weights: w, f32[B, R] or None for 1, from `truncated_importance_weights`; taken as constants.
    cliprange_high: e', None for e (clip-higher of DAPO, arXiv:2503.14476).
    dual_clip: c > 1: where A_t < 0 the loss is at most -c A_t, whatever the ratio (arXiv:1912.09729, equation 5); None: no bound.
    ratio_level: `token`, or `sequence`: rho_t = exp(mean_t (new_t - old_t)) for all tokens of a reply (GSPO, arXiv:2507.18071).
    row_weights: a, f32[B] or None for 1, from `aggregation_weights`.
    Returns sum, count of real tokens, stats:
      clip_fraction        tokens on which the clipped term is active
      approx_kl            (rho - 1) - ln rho, the k3 estimate of KL(old || new), the tokens having been drawn from old
      ratio                rho
      ratio_max            max rho over real tokens
      ratio_max_deviation  max |rho - 1|: 0 on the first minibatch of a step, or dropout, dtype or temperature differ
    """
    check_mask(response_mask, new_logprobs=new_logprobs, old_logprobs=old_logprobs, advantages=advantages)
    change = zero_outside(full_precision(new_logprobs) - full_precision(old_logprobs), response_mask)
    log_change = change.clamp(-kl.LOG_RATIO_LIMIT, kl.LOG_RATIO_LIMIT)
    ratio = log_change.exp()
    if ratio_level == "sequence":
        mean = masked_mean(change, response_mask, dim=1).clamp(-kl.LOG_RATIO_LIMIT, kl.LOG_RATIO_LIMIT)
        ratio = mean.exp()[:, None].expand(change.shape)
    elif ratio_level != "token":
        raise ValueError(f"ratio_level: expected token or sequence, got {ratio_level!r}")
    weighted = zero_outside(full_precision(advantages), response_mask)
    if token_weights is not None:
        check_mask(response_mask, token_weights=token_weights)
        weighted = weighted * zero_outside(full_precision(token_weights).detach(), response_mask)
    free = -weighted * ratio
    clipped = -weighted * ratio.clamp(1 - cliprange, 1 + (cliprange if cliprange_high is None else cliprange_high))
    loss = torch.maximum(free, clipped)
    if dual_clip is not None:
        loss = torch.where(weighted < 0, torch.minimum(loss, -dual_clip * weighted), loss)
    if row_weights is not None:
        loss = loss * row_weights[:, None]
    with torch.no_grad():
        deviation = zero_outside((ratio - 1).abs(), response_mask)
        stats = {
            "clip_fraction": masked_sum(clipped > free, response_mask),
            "approx_kl": masked_sum(torch.expm1(log_change) - log_change, response_mask),
            "ratio": masked_sum(ratio, response_mask),
            "ratio_max_deviation": deviation.amax() if deviation.numel() else deviation.sum(),
            "ratio_max": zero_outside(ratio, response_mask).amax() if ratio.numel() else ratio.sum(),
        }
    return loss.sum(), response_mask.sum(), stats


def aggregation_weights(aggregation: str, lengths: Tensor) -> Tensor | None:
    """a_i with which sum_i a_i sum_t l_it / sum_i n_i is the loss of an optimizer step of B replies of n_i tokens; None for all 1.

    token_mean           a_i = 1                   mean over tokens: long replies weigh more (DAPO, arXiv:2503.14476)
    seq_mean_token_sum   a_i = sum_j n_j / B       mean over replies of the sum over tokens (the policy gradient of whole replies)
    seq_mean_token_mean  a_i = sum_j n_j / (B n_i) mean over replies of the mean over tokens (GRPO, arXiv:2402.03300)

    The names are verl's. lengths: [B], of all replies of the step, over all ranks.   Returns f32[B] or None. Raises ValueError.

    >>> aggregation_weights("seq_mean_token_mean", torch.tensor([1, 3])).tolist()
    [2.0, 0.6666666865348816]
    """
    if aggregation == "token_mean":
        return None
    mean = lengths.double().mean()
    if aggregation == "seq_mean_token_sum":
        return mean.expand(len(lengths)).float()
    if aggregation == "seq_mean_token_mean":
        return (mean / lengths.double()).float()
    raise ValueError(
        f"loss_aggregation: expected token_mean, seq_mean_token_sum or seq_mean_token_mean, got {aggregation!r}"
    )


def value_loss_sum(
    values: Tensor, old_values: Tensor, returns: Tensor, response_mask: Tensor, cliprange_value: float | None
) -> tuple[Tensor, Tensor, Stats]:
    """sum_t m_t 1/2 max((V_t - R_t)^2, (V_old,t + clip(V_t - V_old,t, -c, c) - R_t)^2);   without clipping the first term alone

    (OpenAI baselines, PPO2; arXiv:2403.17031). The clip is in the unit of the returns: a c far below their spread stops the
    value model.

    values (with gradient), old_values, returns: f32[B, R].   response_mask: bool[B, R].   cliprange_value: c, or None for no clip.
    Returns sum, count of real tokens, stats: clip_fraction, squared_error (V - R)^2, value V.
    """
    check_mask(response_mask, values=values, old_values=old_values, returns=returns)
    v, old, target = (zero_outside(full_precision(x), response_mask) for x in (values, old_values, returns))
    free = (v - target).square()
    loss, active = free, torch.zeros_like(response_mask)
    if cliprange_value is not None:
        clipped = (old + (v - old).clamp(-cliprange_value, cliprange_value) - target).square()
        loss = torch.maximum(free, clipped)
        # Inside the range the two differ by rounding alone, which is no clipping.
        active = (clipped > free) & ((v - old).abs() > cliprange_value)
    with torch.no_grad():
        stats = {
            "clip_fraction": masked_sum(active, response_mask),
            "squared_error": free.sum(),
            "value": v.sum(),
        }
    return loss.sum() / 2, response_mask.sum(), stats


def kl_loss_sum(
    kind: str,
    new_logprobs: Tensor,
    ref_logprobs: Tensor,
    response_mask: Tensor,
    token_weights: Tensor | None = None,
    row_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """sum_i a_i sum_t m_t w_t k(new_t - ref_t): a KL penalty as a differentiable loss term rather than inside the reward.

    On-policy and in expectation its gradient is 0 for `kl` (k1; a job is refused), grad KL(policy||reference) for `squared_error`
    (k2) and grad KL(reference||policy) for `bregman` (k3). `squared_error` has the gradient that `kl` has in the reward.

    new_logprobs (with gradient), ref_logprobs: f32[B, R].   response_mask: bool[B, R].   token_weights, row_weights: w
    and a, see `policy_loss_sum`.   Returns sum, count of real tokens.
    """
    check_mask(response_mask, new_logprobs=new_logprobs, ref_logprobs=ref_logprobs)
    new, ref = zero_outside(new_logprobs, response_mask), zero_outside(ref_logprobs, response_mask)
    penalty = kl.penalty(kind, new, ref)
    if token_weights is not None:
        check_mask(response_mask, token_weights=token_weights)
        penalty = penalty * zero_outside(full_precision(token_weights).detach(), response_mask)
    if row_weights is not None:
        penalty = penalty * row_weights[:, None]
    return penalty.sum(), response_mask.sum()


def ptx_loss_sum(logprobs: Tensor, learnt: Tensor) -> tuple[Tensor, Tensor]:
    """sum_t m_t (-log p_t): the supervised loss that PPO-ptx mixes into the policy's (arXiv:2203.02155, equation 2)

    logprobs: f32[B, R], with gradient, at temperature 1.   learnt: m, bool[B, R].   Returns sum, count of learnt tokens.
    """
    check_mask(learnt, logprobs=logprobs)
    return -zero_outside(full_precision(logprobs), learnt).sum(), learnt.sum()


def pairwise_reward_loss_sum(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """sum_i -log sigmoid(s_chosen,i - s_rejected,i - margin_i)   (Bradley-Terry; arXiv:2203.02155, eq. 1; margin: arXiv:2307.09288)

    chosen, rejected: f32[N] scores of the two replies of a pair.   margin: f32[N] or None for 0.   Returns sum, count of pairs.
    """
    if chosen.shape != rejected.shape or (margin is not None and margin.shape != chosen.shape):
        raise ValueError(
            f"rejected and margin: expected the shape of chosen {tuple(chosen.shape)}, got {tuple(rejected.shape)}"
            + ("" if margin is None else f" and {tuple(margin.shape)}")
        )
    gap = full_precision(chosen) - full_precision(rejected)
    if margin is not None:
        gap = gap - margin
    return -F.logsigmoid(gap).sum(), torch.tensor(gap.numel(), device=gap.device)


def centring_loss_sum(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    """sum_i (s_chosen,i + s_rejected,i)^2: keeps the scores of a reward model near 0, which pairs alone leave free

    (arXiv:2312.09244, appendix B; TRL's center_rewards_coefficient). chosen, rejected: f32[N].   Returns sum, count of pairs.
    """
    if chosen.shape != rejected.shape:
        raise ValueError(f"rejected: expected the shape of chosen {tuple(chosen.shape)}, got {tuple(rejected.shape)}")
    total = full_precision(chosen) + full_precision(rejected)
    return total.square().sum(), torch.tensor(total.numel(), device=total.device)


def dpo_loss_sum(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Stats]:
    """sum_i -(1 - e) log sigmoid(beta g_i) - e log sigmoid(-beta g_i),   g = (chosen - ref_chosen) - (rejected - ref_rejected)

    (DPO's sigmoid loss, arXiv:2305.18290, equation 7; TRL's loss_type sigmoid. e: a label is wrong with this probability,
    conservative DPO, ericmitchell.ai/cdpo.pdf). beta (log p - log p_ref) is the reward that the policy implies, up to a term of
    the prompt alone.

    chosen, rejected (with gradient), ref_chosen, ref_rejected: f32[N] log-probabilities of whole replies, summed over their tokens.
    beta > 0.   label_smoothing: e, 0 <= e < 1/2.
    Returns sum, count of pairs, stats: chosen and rejected (implied rewards), won (pairs with g > 0, a tie half).

    >>> loss, pairs, stats = dpo_loss_sum(*torch.tensor([[-3.0], [-5.0], [-4.0], [-4.0]]), beta=0.5)
    >>> round(float(loss), 4), int(pairs), float(stats["chosen"] - stats["rejected"])
    (0.3133, 1, 1.0)
    """
    for name, given in (("rejected", rejected), ("ref_chosen", ref_chosen), ("ref_rejected", ref_rejected)):
        if given.shape != chosen.shape:
            raise ValueError(f"{name}: expected the shape of chosen {tuple(chosen.shape)}, got {tuple(given.shape)}")
    if not 0 < beta < float("inf") or not 0 <= label_smoothing < 0.5:
        raise ValueError(f"expected beta above 0 and label_smoothing in [0, 0.5), got {beta} and {label_smoothing}")
    better = beta * (full_precision(chosen) - full_precision(ref_chosen))
    worse = beta * (full_precision(rejected) - full_precision(ref_rejected))
    gap = better - worse
    loss = -(1 - label_smoothing) * F.logsigmoid(gap) - label_smoothing * F.logsigmoid(-gap)
    with torch.no_grad():
        stats = {"chosen": better.sum(), "rejected": worse.sum(), "won": ((gap.sign() + 1) / 2).sum()}
    return loss.sum(), torch.tensor(gap.numel(), device=gap.device), stats


def truncated_importance_weights(
    old_logprobs: Tensor, behaviour_logprobs: Tensor, response_mask: Tensor, cap: float
) -> Tensor:
    """w_t = min(exp(old_t - behaviour_t), cap), as constants: corrects tokens sampled by a policy other than `old`

    (arXiv:1802.01561, section 4.1). `behaviour` is what the generator really sampled from: an older adapter when rollouts are
    stale, or the same one through other kernels.

    old_logprobs, behaviour_logprobs: f32[B, R].   response_mask: bool[B, R].   cap > 0.   Returns f32[B, R], 0 outside the mask.
    """
    if not 0 < cap < float("inf"):
        raise ValueError(f"cap: expected a finite number above 0, got {cap}")
    check_mask(response_mask, old_logprobs=old_logprobs, behaviour_logprobs=behaviour_logprobs)
    gap = (full_precision(old_logprobs) - full_precision(behaviour_logprobs)).detach()
    return zero_outside(gap.clamp_max(math.log(cap)).exp().clamp_max(cap), response_mask)
