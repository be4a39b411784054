"""Who samples and who scores get what the learner has published: the policy after every step, the reference when it is reset.

Where they use the learner's own model nothing moves; an engine beside the learner and the actors of a split job are given tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rlhf_ray.config import PPOConfig
from rlhf_ray.models.assembly import SYNCED_REFERENCE
from rlhf_ray.ppo.setup import PPOSetup
from rlhf_ray.ppo.state import PPOState
from rlhf_ray.roles.generator import ActiveAdapter
from rlhf_ray.runtime.session import Session


class HandOver:
    """Of one rank. Every rank calls all of it at the same points of a step."""

    def __init__(self, config: PPOConfig, session: Session, setup: PPOSetup, state: PPOState) -> None:
        self.config, self.session, self.setup, self.state = config, session, setup, state

    def active(self) -> ActiveAdapter:
        """The policy adapter that is in the model now."""
        learner = self.setup.learner
        return ActiveAdapter(
            learner.models.bindings["policy"].adapter, learner.published.version, learner.published.sha256
        )

    def reference(self) -> ActiveAdapter | None:
        """The policy to which the reference was reset; None while it is the one that the run started from."""
        kept = self.state.reference
        return None if kept is None else ActiveAdapter(SYNCED_REFERENCE, kept.version, kept.sha256)

    def policy(self) -> int:
        """Let the samplers have the published adapter; its size in bytes."""
        published = self.setup.learner.published
        if self.setup.engine_adapter is not None:
            with self.engine_awake():
                self.setup.engine_adapter.load(self.active(), published.tensors)
        if self.setup.remote_roles is None:
            return published.size_bytes
        return self.session.from_main(self.setup.remote_roles.publish(published))

    def reset_reference_if_due(self, step: int) -> None:
        """Every ref_model_sync_steps steps the reference of the next rollout that is begun becomes the policy as it is now
        (arXiv:2505.24864). What is measured against the start (evaluations, max_kl) goes on so."""
        every = self.config.ref_model_sync_steps
        if every is None or step % every or step == self.setup.total_steps:
            return
        self.state.reference = self.setup.learner.published
        self.synced_reference()
        if self.config.ref_model_sync_resets_optimizer:
            self.setup.learner.forget_optimizer("policy")

    def synced_reference(self) -> None:
        """Let whoever scores have the reference, if it was reset."""
        active = self.reference()
        if active is None or self.state.reference is None:
            return
        if self.setup.remote_roles is not None:
            self.setup.remote_roles.sync_reference(self.state.reference)
        elif self.setup.synced_reference is not None:
            self.setup.synced_reference.load(active, self.state.reference.tensors)

    @contextmanager
    def engine_awake(self) -> Iterator[None]:
        """Around sampling: an engine beside this learner has its memory back meanwhile, if it gives it away at all."""
        engine = None if self.setup.engine_adapter is None else self.setup.engine_adapter.engine
        if engine is not None:
            engine.wake()
        yield
        if engine is not None:
            engine.sleep()
