"""The coefficient beta of the KL penalty over the run: fixed, or steered towards a target KL.

`measured_kl` is the batch mean, over all ranks, of the per-reply SUM of k1 (the true KL in nats per reply), whatever penalty is
active and whatever its sign. A target in nats per reply must not be compared with a mean over tokens.
"""

from __future__ import annotations

import math
from typing import Protocol

from rlhf_ray.maths import hexfloat

KINDS = ("fixed", "adaptive", "horizon")

MAX_ERROR = 0.2  # both published rules clip the relative error here


class KLController(Protocol):
    """What the training loop sees: read `value`, call `update` once per PPO step."""

    kind: str
    value: float

    def update(self, measured_kl: float, n_samples: int) -> float:
        """Move beta after a step of `n_samples` replies and return the new value."""

    def state_dict(self) -> dict[str, str]:
        """JSON-able; floats as hexadecimal text, so that a resumed run goes on from the same bits."""

    def load_state_dict(self, state: dict[str, str]) -> None:
        """Take over a `state_dict`.   Raises ValueError if it is of another kind or damaged."""


class FixedKLController:
    """beta_{t+1} = beta_t"""

    kind = "fixed"

    def __init__(self, kl_coef: float) -> None:
        self.value = _at_least_zero("kl_coef", kl_coef)

    def update(self, measured_kl: float, n_samples: int) -> float:
        """beta stays; see `KLController.update`.   Raises ValueError if measured_kl is not finite."""
        _error(measured_kl, 1.0)
        return self.value

    def state_dict(self) -> dict[str, str]:
        """See `KLController.state_dict`."""
        return {"kind": self.kind, "value": self.value.hex()}

    def load_state_dict(self, state: dict[str, str]) -> None:
        """See `KLController.load_state_dict`."""
        if state.get("kind") != self.kind:
            raise ValueError(f"kl_controller state: expected kind {self.kind!r}, got {state.get('kind')!r}")
        try:
            value = hexfloat.parse(state["value"])
        except (KeyError, ValueError) as error:
            raise ValueError(f"kl_controller state: expected 'value' as a hexadecimal float, got {state!r}") from error
        self.value = _at_least_zero("kl_controller state: value", value)


class AdaptiveKLController(FixedKLController):
    """beta_{t+1} = beta_t (1 + k_beta e_t),   e_t = clip(KL_t / target - 1, -0.2, 0.2)

    Once per step, whatever the batch size   (arXiv:1909.08593, section 2.2; AlpacaFarm).
    """

    kind = "adaptive"

    def __init__(self, kl_coef: float, kl_target: float, step_size: float) -> None:
        super().__init__(kl_coef)
        self.kl_target = _above_zero("kl_target", kl_target)
        self.step_size = _above_zero("kl_step_size", step_size)
        if step_size * MAX_ERROR >= 1:
            raise ValueError(
                f"kl_step_size: expected below {1 / MAX_ERROR:g}, or beta could turn negative, got {step_size}"
            )

    def update(self, measured_kl: float, n_samples: int) -> float:
        """Move beta; `n_samples` plays no part.   Raises ValueError if measured_kl is not finite."""
        self.value *= 1 + self.step_size * _error(measured_kl, self.kl_target)
        return self.value


class HorizonKLController(FixedKLController):
    """beta_{t+1} = beta_t (1 + e_t n / horizon),   e_t = clip(KL_t / target - 1, -0.2, 0.2),   n replies in the step

    The rule of OpenAI's lm-human-preferences and of TRL: the same run in half as many steps of twice the size moves about as far.
    """

    kind = "horizon"

    def __init__(self, kl_coef: float, kl_target: float, horizon: float) -> None:
        super().__init__(kl_coef)
        self.kl_target = _above_zero("kl_target", kl_target)
        self.horizon = _above_zero("kl_horizon", horizon)

    def update(self, measured_kl: float, n_samples: int) -> float:
        """Move beta.   Raises ValueError if measured_kl is not finite or n_samples / horizon could turn beta negative."""
        if n_samples < 1 or n_samples * MAX_ERROR >= self.horizon:
            raise ValueError(
                f"kl_horizon: expected above {MAX_ERROR:g} x the replies of a step, or beta could turn negative; "
                f"got horizon {self.horizon:g} and {n_samples} replies"
            )
        self.value *= 1 + _error(measured_kl, self.kl_target) * n_samples / self.horizon
        return self.value


def make_controller(
    kind: str, kl_coef: float, kl_target: float, kl_horizon: float, kl_step_size: float
) -> FixedKLController | AdaptiveKLController | HorizonKLController:
    """The controller named `kind`; arguments that the kind does not use are ignored.

    kl_target: nats per reply.   kl_horizon: replies.   Raises ValueError for an unknown kind or a number out of range.
    """
    if kind == "fixed":
        return FixedKLController(kl_coef)
    if kind == "adaptive":
        return AdaptiveKLController(kl_coef, kl_target, kl_step_size)
    if kind == "horizon":
        return HorizonKLController(kl_coef, kl_target, kl_horizon)
    raise ValueError(f"kl_controller: expected one of {', '.join(KINDS)}, got {kind!r}")


def _error(measured_kl: float, target: float) -> float:
    if not math.isfinite(measured_kl):
        raise ValueError(f"measured_kl: expected a finite number of nats per reply, got {measured_kl}")
    return min(max(measured_kl / target - 1, -MAX_ERROR), MAX_ERROR)


def _at_least_zero(name: str, value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")
    return float(value)


def _above_zero(name: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: expected a finite number above 0, got {value}")
    return float(value)
