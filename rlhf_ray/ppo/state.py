"""What moves from step to step of a PPO run besides the learner's weights and optimizer. A checkpoint stores all of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rlhf_ray.config import PPOConfig
from rlhf_ray.maths.controllers import KLController, make_controller
from rlhf_ray.maths.stats import RunningMoments
from rlhf_ray.roles.guards import Guards
from rlhf_ray.roles.learner import PublishedAdapter
from rlhf_ray.roles.over_optimisation import OverOptimisation


@dataclass
class Best:
    """The step with the best held-out reward so far."""

    step: int = 0
    reward: float = -math.inf

    def offer(self, step: int, reward: float) -> bool:
        """Whether it is the best so far, which it then is from now on."""
        if reward > self.reward:
            self.step, self.reward = step, reward
            return True
        return False


@dataclass
class PPOState:
    """controller: of the KL coefficient.  moments: of the rewards (normalize_rewards).  guards: what the limits must remember.
    alarm: what the signs of over-optimisation are compared with.

    step: the last whole one.  tokens: generated so far.  seconds: of training.  first, last: every metric's first and last value.
    best_policy: what load_best_model_at_end ends with.  reference: the policy to which the reference was reset last, None before
    that. The tensors of both are files of their own."""

    controller: KLController
    moments: RunningMoments
    guards: Guards
    alarm: OverOptimisation = field(default_factory=OverOptimisation)
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best: Best = field(default_factory=Best)
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    best_policy: dict[str, Tensor] | None = None
    reference: PublishedAdapter | None = None

    @classmethod
    def of(cls, config: PPOConfig, guards: Guards) -> PPOState:
        """Before the first step."""
        controller = make_controller(
            config.kl_controller, config.kl_coef, config.kl_target, config.kl_horizon, config.kl_step_size
        )
        return cls(controller, RunningMoments(), guards)

    def record(self, metrics: Mapping[str, float]) -> None:
        """Remember the last value of every metric, and the first one."""
        self.last |= metrics
        for name, value in metrics.items():
            self.first.setdefault(name, value)

    def summary(self) -> dict[str, float]:
        """The last value of every metric, and where the telling ones started."""
        found = dict(self.last)
        for name, value in self.first.items():
            if name == "reward/mean" or (name.startswith("eval/reward") and not name.endswith("_se")):
                found[f"{name}_start"] = value
        if self.best.step or self.best.reward > -math.inf:
            found["best/step"], found["best/eval_reward"] = float(self.best.step), self.best.reward
        return found

    def state_dict(self) -> dict[str, Any]:
        """As JSON; floats that must come back bit for bit are written as hexadecimal."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "best": {"step": self.best.step, "reward": self.best.reward.hex()},
            "first": self.first,
            "last": self.last,
            "kl_controller": self.controller.state_dict(),
            "reward_moments": self.moments.state_dict(),
            "guards": self.guards.state_dict(),
            "alarm": self.alarm.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.controller.load_state_dict(state["kl_controller"])
        self.moments.load_state_dict(state["reward_moments"])
        self.guards.load_state_dict(state.get("guards", {}))
        self.alarm.load_state_dict(state.get("alarm", {}))
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self.best = Best(state["best"]["step"], float.fromhex(state["best"]["reward"]))
        self.first, self.last = dict(state["first"]), dict(state["last"])
