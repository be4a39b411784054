"""From what was sampled and scored to what the update learns from: one pure function over all rows of a step.

Every rank holds all rows here (a 256 x 492 step is about 3 MB) and computes the same thing, so that whitening, KL control and
metrics do not depend on the world size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_ray.batches import Experience, Rollout, Scores
from rlhf_ray.config import PPOConfig
from rlhf_ray.maths import kl, losses, returns, stats
from rlhf_ray.maths.masks import masked_mean, masked_sum, zero_outside
from rlhf_ray.metrics import START_KL

WHITEN_EPS = 1e-8
GROUP_EPS = 1e-4


@dataclass(frozen=True)
class Evaluation:
    """The learner's own view of a rollout before any update of the step, 0 outside the response mask.

    logprobs, entropy: f32[B, R].  values: f32[B, R], None without a value model.  bootstrap: f32[B], value after the last token.
    """

    logprobs: Tensor
    entropy: Tensor
    values: Tensor | None
    bootstrap: Tensor | None


def penalised_scores(scores: Scores, rollout: Rollout, config: PPOConfig) -> Tensor:
    """f32[B]: the raw reward after the penalties of replies without an end and of those near the limit.

    A reply that its drawn budget (min_response_length) cut off is not charged for having no end: it could not know of it."""
    at_fault = ~rollout.finished & (rollout.lengths >= config.response_length)
    found = returns.penalise_unfinished(scores.reward, ~at_fault, config.missing_eos_penalty)
    if config.overlong_buffer is not None:
        limit, penalty = config.response_length, config.overlong_penalty
        found = found - returns.overlong_penalties(rollout.lengths, limit, config.overlong_buffer, penalty)
    return found


def informative_rows(scores: Scores, rollout: Rollout, config: PPOConfig) -> Tensor | None:
    """bool[B], with filter_groups: False on replies to prompts whose replies all score the same. None: all rows count."""
    if not config.filter_groups:
        return None
    return ~returns.equal_groups(penalised_scores(scores, rollout, config), config.num_generations)


def final_scores(scores: Scores, rollout: Rollout, config: PPOConfig, moments: stats.RunningMoments) -> Tensor:
    """f32[B]: the raw reward after penalties, baseline, normalisation (which takes this step in first) and clip."""
    final = penalised_scores(scores, rollout, config) - config.reward_baseline
    if config.normalize_rewards:
        moments.update(final)
        final = moments.normalise(final, subtract_mean=False, eps=WHITEN_EPS)
    if config.reward_clip is not None:
        final, _ = stats.clip_scores(final, config.reward_clip)
    return final


def make_experience(
    rollout: Rollout,
    scores: Scores,
    evaluation: Evaluation,
    config: PPOConfig,
    kl_coef: float,
    moments: stats.RunningMoments,
) -> tuple[Experience, dict[str, float]]:
    """Shape rewards, estimate advantages, whiten; and the step's metrics. `kl_coef` is the controller's value for this step."""
    mask = rollout.response_mask
    per_token = zero_outside(kl.penalty(config.kl_penalty, evaluation.logprobs, scores.ref_logprobs), mask)
    in_reward = 0.0 if config.use_kl_loss else kl_coef
    final = final_scores(scores, rollout, config, moments)
    if config.advantage_estimator == "gae":
        advantages, targets, shaped = _gae(final, per_token, in_reward, rollout, evaluation, config)
    else:
        penalties = returns.response_penalties(per_token, in_reward, mask)
        shaped, targets = final - penalties, torch.zeros_like(per_token)
        advantages = _group_advantages(final, penalties, mask, config)
    if config.whiten_advantages:
        white = returns.whiten(advantages, mask, subtract_mean=True, eps=WHITEN_EPS)
    else:
        white = advantages
    experience = Experience(
        tokens=rollout.tokens,
        prompt_mask=rollout.prompt_mask,
        response_mask=mask,
        old_logprobs=evaluation.logprobs,
        ref_logprobs=scores.ref_logprobs,
        old_values=torch.zeros_like(per_token) if evaluation.values is None else evaluation.values,
        advantages=white,
        returns=targets,
        token_weights=importance_weights(rollout, evaluation, config),
    )
    metrics = step_metrics(rollout, scores, evaluation, per_token, kl_coef, experience.token_weights)
    if config.ref_model_sync_steps is not None:
        start = kl.k1(evaluation.logprobs, scores.start)
        weights = torch.ones_like(start) if experience.token_weights is None else experience.token_weights
        metrics[START_KL] = float(masked_sum(weights * start, mask, dim=1).mean())
    if config.num_generations > 1:
        equal = returns.equal_groups(penalised_scores(scores, rollout, config), config.num_generations)
        metrics["advantage/equal_groups"] = float(equal.float().mean())
    metrics |= {
        "reward/score": float(final.mean()),
        "advantage/std": float(masked_std(advantages, mask)),
        "reward/shaped": float(shaped.sum() / len(rollout)),
    }
    if evaluation.values is not None:
        metrics["value/explained_variance"] = stats.explained_variance(evaluation.values, targets, mask)
        metrics["value/mean"] = float(masked_mean(evaluation.values, mask))
        metrics["returns/mean"] = float(masked_mean(targets, mask))
    if experience.token_weights is not None:
        metrics |= importance_metrics(experience.token_weights, mask, config.importance_sampling_cap)
    return experience, metrics


def importance_weights(rollout: Rollout, evaluation: Evaluation, config: PPOConfig) -> Tensor | None:
    """f32[B, R]: corrects for tokens that an older adapter (max_staleness 1) or another engine (rollout.engine) sampled; None where
    the newest one samples by the learner's own probabilities."""
    if not config.samples_off_policy:
        return None
    cap = config.importance_sampling_cap
    return losses.truncated_importance_weights(evaluation.logprobs, rollout.sample_logprobs, rollout.response_mask, cap)


def importance_metrics(weights: Tensor, mask: Tensor, cap: float) -> dict[str, float]:
    """weights: f32[B, R] of `importance_weights`.  mask: bool[B, R]."""
    clipped = (weights >= cap) & mask
    return {
        "sampler/importance_weight": float(masked_mean(weights, mask)),
        "sampler/importance_clipped": float(clipped.sum() / mask.sum()),
    }


def _gae(
    final: Tensor, per_token: Tensor, kl_coef: float, rollout: Rollout, evaluation: Evaluation, config: PPOConfig
) -> tuple[Tensor, Tensor, Tensor]:
    if evaluation.values is None or evaluation.bootstrap is None:
        raise ValueError("advantage_estimator gae needs the value model's values")
    mask, nothing = rollout.response_mask, torch.zeros_like(evaluation.bootstrap)
    after_end = nothing
    if config.bootstrap_truncated:
        # What a reply that was cut off is still to earn is in the value after it, its score included: not both.
        after_end = torch.where(rollout.finished, nothing, evaluation.bootstrap)
        final = torch.where(rollout.finished, final, nothing)
    shaped = returns.shape_rewards(final, per_token, kl_coef, mask)
    if config.whiten_rewards:
        shaped = returns.whiten(shaped, mask, subtract_mean=False, eps=WHITEN_EPS)
    advantages, targets = returns.gae(shaped, evaluation.values, mask, config.gamma, config.lam, after_end)
    return advantages, targets, shaped


def _group_advantages(final: Tensor, penalties: Tensor, mask: Tensor, config: PPOConfig) -> Tensor:
    size = config.num_generations
    if config.advantage_estimator == "rloo":
        per_response = returns.rloo_advantages(final - penalties, size)
    else:
        per_response = returns.grpo_advantages(final, penalties, size, config.scale_rewards, GROUP_EPS)
    return returns.to_tokens(per_response, mask)


def masked_std(values: Tensor, mask: Tensor) -> Tensor:
    return values[mask].double().std(correction=0)


def step_metrics(
    rollout: Rollout,
    scores: Scores,
    evaluation: Evaluation,
    per_token: Tensor,
    kl_coef: float,
    token_weights: Tensor | None = None,
) -> dict[str, float]:
    """The contract's names for what was sampled: raw reward, true KL at the old policy, lengths, entropy, agreement.

    token_weights: as the loss has them. Tokens that an older adapter sampled estimate the KL of the newest one by the same
    weights."""
    mask, old, ref = rollout.response_mask, evaluation.logprobs, scores.ref_logprobs
    weights = torch.ones_like(old) if token_weights is None else token_weights
    per_response = {
        name: masked_sum(weights * f(old, ref), mask, dim=1).mean() for name, f in (("k1", kl.k1), ("k3", kl.k3))
    }
    reward = scores.reward
    metrics: dict[str, Tensor | float] = {
        "reward/mean": reward.mean(),
        "reward/std": reward.std(correction=0),
        "kl/k1_per_response": per_response["k1"],
        "kl/k3_per_response": per_response["k3"],
        "kl/penalty_per_response": per_token.sum(dim=1).mean(),
        "kl/coef": kl_coef,
        "kl/clamped_share": kl.clamped_share(old, ref, mask),
        "response/length": rollout.lengths.float().mean(),
        "response/finished": rollout.finished.float().mean(),
        "response/repetition": stats.repetition(rollout.tokens[:, -mask.shape[1] :], mask).mean(),
        "policy/entropy": masked_mean(evaluation.entropy, mask),
        "sampler/logprob_difference": masked_mean((rollout.sample_logprobs - old).abs(), mask),
        "tokens/generated": int(mask.sum()),
    }
    for name, part in scores.parts.items():
        applies = ~part.isnan()
        if not bool(applies.all()):
            metrics[f"reward_applies/{name}"] = applies.float().mean()
        if bool(applies.any()):
            metrics[f"reward/{name}"] = part[applies].mean()
    if scores.drift is not None:
        metrics["response/retokenised_drift"] = scores.drift.mean()
    return {name: float(value) for name, value in metrics.items()}
