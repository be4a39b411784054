"""What moves from step to step of an SFT, DPO or reward run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class SupervisedState:
    """What moves from step to step besides weights, optimizer state and the task's own; a checkpoint stores all of it.

    best: the weights (adapter, head) of the evaluation with the lowest loss, where the job wants to end with them.  window: of a
    run that was resumed, what it had summed up since its last logged step."""

    step: int = 0
    seconds: float = 0.0
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    best_step: int = 0
    best_loss: float = math.inf
    best: tuple[dict[str, Tensor], Tensor | None] | None = None
    window: Mapping[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """As JSON, without the best weights, which are a file of their own."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "first": self.first,
            "last": self.last,
            "best": {"step": self.best_step, "loss": self.best_loss.hex()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.step, self.seconds = state["step"], state["seconds"]
        self.first, self.last = state["first"], state["last"]
        best = state["best"]  # in older versions perhaps the start, which is no result
        self.best_step, self.best_loss = best["step"], float.fromhex(best["loss"]) if best["step"] else math.inf
