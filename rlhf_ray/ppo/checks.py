"""What must hold of every step of a PPO run: the adapter that was asked for sampled it, as the learner would have, and it was
scored against the reference in force."""

from __future__ import annotations

from rlhf_ray.config import PPOConfig
from rlhf_ray.errors import InvariantError
from rlhf_ray.ppo.setup import PPOSetup
from rlhf_ray.roles import invariants
from rlhf_ray.roles.experience import Evaluation
from rlhf_ray.roles.rollouts import Sampled, probed_rows
from rlhf_ray.runtime.session import Session


def check_rollout(
    config: PPOConfig, session: Session, setup: PPOSetup, sampled: Sampled, evaluation: Evaluation, step: int
) -> dict[str, float]:
    """Returns what was measured: staleness, with ref_model_sync_steps the step of the reference, and every `probe_steps` steps the
    mean difference of log-probabilities, nats.

    InvariantError if another adapter sampled or was the reference, if sampler and learner disagree, or if the policy of step 1, or
    of a step after a reset, is not its reference."""
    rollout, limit, newest = sampled.collected.rollout, setup.tolerance, setup.learner.published
    if rollout.adapter_sha256 != sampled.adapter.sha256:
        raise invariants.stale_adapter(rollout, sampled.adapter.sha256, step)
    scores, reference = sampled.collected.scores, sampled.reference
    wanted_reference = "" if reference is None else reference.sha256
    if scores.reference_sha256 != wanted_reference:
        raise invariants.stale_reference(f"step {step}", scores.reference_sha256, wanted_reference)
    metrics = {"sampler/staleness": float(newest.version - sampled.adapter.version)}
    if config.ref_model_sync_steps is not None:
        metrics["kl/reference_step"] = float(0 if reference is None else reference.version)
    if (step - 1) % config.probe_steps == 0:
        probed, logprobs = rollout, evaluation.logprobs
        if sampled.adapter.version != newest.version:
            wanted = config.per_device_train_batch_size * session.world_size
            probed = rollout.rows(probed_rows(len(rollout), config.chunk_rows, wanted))
            logprobs = setup.learner.logprobs_under(sampled.adapter, probed)
        try:
            metrics["sampler/probe_difference"] = invariants.check_sampler_agrees(probed, logprobs, limit, step)
        except InvariantError as error:
            raise setup.collector.explain(error, newest) from error
    if step == 1 or wanted_reference == newest.sha256:
        mask = rollout.response_mask
        invariants.check_starts_at_reference(evaluation.logprobs, scores.ref_logprobs, mask, limit, step)
    return metrics
