"""KL penalties per token, the estimators k1 and k3, and exact divergences over a full vocabulary.

Everything is a function of d = log p - log q at the SAMPLED token, p the policy and q the reference, in log space and float32.
As a penalty in the reward, r_t = -beta k(d_t) m_t plus the score; `returns.shape_rewards` does that.

| kind             | k(d)                              | as an estimate of KL(p||q), tokens drawn from p             |
|------------------|-----------------------------------|-------------------------------------------------------------|
| `kl`             | d                                 | k1: unbiased, any sign                                      |
| `clamped_kl`     | max(d, 0)                         | biased high, about half of |d| near 0                       |
| `squared_error`  | d^2 / 2                           | k2: biased                                                  |
| `bregman`        | expm1(-d) + d                     | k3: unbiased, never negative, heavy tail for d < 0          |
| `jensen_shannon` | -1/2 log1p(1/2 expm1(-|d|))       | none: bounded by ln(2)/2, and NOT the JS divergence (the    |
|                  |                                   | second term lacks its importance weight)                    |
| `none`           | 0                                 |                                                             |

k1, k2, k3: J. Schulman, "Approximating KL divergence", 2020.

What a penalty pulls towards depends on how it is used (exact, on-policy, in expectation; tests/unit/maths/test_kl_gradients.py):

- in the reward (stop-gradient, score-function gradient): k1 gives grad KL(p||q); k3 gives grad KL(p||q) - grad KL(q||p), which
  is of higher order near the reference and therefore a far weaker pull at the same coefficient;
- as a differentiable loss (`losses.kl_loss_sum`): k1 gives 0, k2 gives grad KL(p||q), k3 gives grad KL(q||p).

So compare kinds at equal measured KL, never at equal coefficient.
"""

from __future__ import annotations

import difflib
import math

import torch
from torch import Tensor

from rlhf_ray.maths.masks import full_precision, masked_mean

KINDS = ("kl", "clamped_kl", "bregman", "jensen_shannon", "squared_error", "none")
ALIASES = {"k1": "kl", "k2": "squared_error", "k3": "bregman"}

# e^20 = 4.85e8: large enough that no sane policy gets there, small enough that sums of it stay exact in float32's range.
LOG_RATIO_LIMIT = 20.0


def canonical(kind: str) -> str:
    """The name in `KINDS` that `kind` stands for; k1, k2, k3 are aliases.   Raises ValueError listing the valid names."""
    name = ALIASES.get(kind, kind)
    if name not in KINDS:
        close = difflib.get_close_matches(kind, [*KINDS, *ALIASES], n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"kl_penalty: expected one of {', '.join(KINDS)} (or k1, k2, k3), got {kind!r}{hint}")
    return name


def penalty(kind: str, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k(d_t), d_t = logprobs_t - ref_logprobs_t: the penalty named `kind`, before the coefficient.

    logprobs, ref_logprobs: [B, R] (any equal shape), log-probabilities of the sampled tokens under policy and reference, in any
    float dtype.   Returns f32 of the same shape (float64 for float64 inputs); unmasked, so multiply by the response mask.
    Finite for all log-probabilities above -1e19.   Raises ValueError for an unknown kind or unequal shapes.

    >>> penalty("kl", torch.tensor([[-1.0]]), torch.tensor([[-1.5]])).item()
    0.5
    """
    name = canonical(kind)
    d = _log_ratio(logprobs, ref_logprobs)
    if name == "kl":
        return d
    if name == "clamped_kl":
        return d.clamp_min(0.0)
    if name == "squared_error":
        return d.square() / 2
    if name == "bregman":
        return _bregman(d)
    if name == "jensen_shannon":
        return _jensen_shannon(d)
    return torch.zeros_like(d)


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """d: the unbiased estimate of KL(policy || reference) that is logged whatever the penalty is.   Negative values are kept."""
    return _log_ratio(logprobs, ref_logprobs)


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(e^-d - 1) + d: unbiased like k1, never negative; below d = -20 it goes on as a straight line."""
    return _bregman(_log_ratio(logprobs, ref_logprobs))


def clamped_share(logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor) -> Tensor:
    """The share of real tokens with d < -20, where k3 is a straight line. Anything above 0 means that policy and reference parted.

    All [B, R].   Returns a scalar in [0, 1]; 0 for an empty mask.
    """
    beyond = _log_ratio(logprobs, ref_logprobs) < -LOG_RATIO_LIMIT
    return masked_mean(beyond, response_mask)


def reverse_kl_full(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """KL(p||q) = sum_v p_v (log p_v - log q_v), exactly, over the whole vocabulary.

    logits_p, logits_q: [.., V], already divided by the temperature.   Returns f32[..] (float64 for float64), infinite where p puts
    mass on a token that q excludes. "Reverse" because the policy, not the reference, weighs the tokens.
    """
    logp, logq = _log_softmax_pair(logits_p, logits_q)
    return _expected(logp, logp - logq)


def js_full(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """JS(p, q) = KL(p||m)/2 + KL(q||m)/2, m = (p+q)/2: the true Jensen-Shannon divergence, between 0 and ln 2.

    logits_p, logits_q: [.., V].   Returns f32[..] (float64 for float64).   (J. Lin, 1991)
    """
    logp, logq = _log_softmax_pair(logits_p, logits_q)
    logm = torch.logaddexp(logp, logq) - math.log(2.0)
    return (_expected(logp, logp - logm) + _expected(logq, logq - logm)) / 2


def _log_ratio(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    if logprobs.shape != ref_logprobs.shape:
        raise ValueError(
            f"ref_logprobs: expected the shape of logprobs {tuple(logprobs.shape)}, got {tuple(ref_logprobs.shape)}"
        )
    return full_precision(logprobs) - full_precision(ref_logprobs)


def _bregman(d: Tensor) -> Tensor:
    bounded = d.clamp_min(-LOG_RATIO_LIMIT)
    curved = (torch.expm1(-bounded) + bounded).clamp_min(0.0)  # where expm1 is an ulp off, tiny d could give -1e-15
    # Beyond the limit its tangent: e^-d would overflow, and a constant would have no gradient where the pull is needed most.
    slope = math.expm1(LOG_RATIO_LIMIT)
    tangent = slope - LOG_RATIO_LIMIT - slope * (d + LOG_RATIO_LIMIT)
    return torch.where(d < -LOG_RATIO_LIMIT, tangent, curved)


def _jensen_shannon(d: Tensor) -> Tensor:
    # Of the several equal forms this one keeps its relative precision near 0 and is never negative.
    return -0.5 * torch.log1p(0.5 * torch.expm1(-d.abs()))


def _log_softmax_pair(logits_p: Tensor, logits_q: Tensor) -> tuple[Tensor, Tensor]:
    if logits_p.shape != logits_q.shape:
        raise ValueError(
            f"logits_q: expected the shape of logits_p {tuple(logits_p.shape)}, got {tuple(logits_q.shape)}"
        )
    return full_precision(logits_p).log_softmax(dim=-1), full_precision(logits_q).log_softmax(dim=-1)


def _expected(logp: Tensor, values: Tensor) -> Tensor:
    """sum_v p_v x_v with 0 * anything = 0, so that a token of probability 0 adds nothing."""
    p = logp.exp()
    return (p * values.masked_fill(p == 0, 0.0)).sum(dim=-1)
