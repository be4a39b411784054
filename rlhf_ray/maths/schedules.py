"""Learning-rate multipliers and piecewise schedules. Steps are counted from 0: `step` is the number of updates already made."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

KINDS = ("linear", "cosine", "constant")


def resolve_warmup(warmup_steps: float, total_steps: int) -> int:
    """ceil(share x total_steps) for a number below 1, the number itself from 1 on, as in transformers 5.

    >>> resolve_warmup(0.05, 90), resolve_warmup(5, 90), resolve_warmup(0, 90)
    (5, 5, 0)
    """
    if not (math.isfinite(warmup_steps) and warmup_steps >= 0):
        raise ValueError(f"warmup_steps: expected a share below 1 or a number of steps, got {warmup_steps}")
    return math.ceil(total_steps * warmup_steps) if warmup_steps < 1 else int(warmup_steps)


def value_warmup(warmup_steps: float, total_steps: int) -> int:
    """Steps that train the value model alone: floor(share x total_steps) for a number below 1, else the number itself.

    Rounded down, unlike `resolve_warmup`: in a short run the policy waits for nothing.

    >>> value_warmup(0.05, 19), value_warmup(0.05, 100), value_warmup(3, 100)
    (0, 5, 3)
    """
    return math.floor(total_steps * warmup_steps) if warmup_steps < 1 else int(warmup_steps)


def lr_multiplier(kind: str, step: int, total_steps: int, warmup_steps: int, min_ratio: float) -> float:
    """The factor on the peak learning rate for the update after `step` updates.

    warm-up    (step + 1) / (warmup_steps + 1)                   for step < warmup_steps
    linear     min + (1 - min) (1 - x)                           x = (step - warmup_steps) / (total_steps - warmup_steps)
    cosine     min + (1 - min) (1 + cos(pi x)) / 2
    constant   1

    No update of 0 .. total_steps - 1 has factor 0, the first and the last included, even with min_ratio 0: a first update with a
    rate of 0 moves nothing. `min_ratio` is reached at total_steps and kept after it.

    >>> [round(lr_multiplier("linear", s, 6, 2, 0.0), 3) for s in range(7)]
    [0.333, 0.667, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if kind not in KINDS:
        raise ValueError(f"lr_scheduler_type: expected one of {', '.join(KINDS)}, got {kind!r}")
    if step < 0 or warmup_steps < 0 or not 0 <= min_ratio <= 1:
        raise ValueError(
            f"lr_multiplier: expected step >= 0, warmup_steps >= 0 and 0 <= min_ratio <= 1, got {step}, {warmup_steps}, {min_ratio}"
        )
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if kind == "constant":
        return 1.0
    if step >= total_steps:
        return min_ratio
    x = (step - warmup_steps) / (total_steps - warmup_steps)
    shape = 1 - x if kind == "linear" else (1 + math.cos(math.pi * x)) / 2
    return min_ratio + (1 - min_ratio) * shape


def peak_multiplier(kind: str, total_steps: int, warmup_steps: int, min_ratio: float) -> float:
    """The largest factor the run ever sees: 1, or less if the warm-up outlasts the run (100 warm-up steps in 7 steps: 0.069)."""
    return max(
        (lr_multiplier(kind, step, total_steps, warmup_steps, min_ratio) for step in range(total_steps)), default=0.0
    )


def piecewise_linear(step: int, points: Sequence[tuple[int, float]]) -> float:
    """The value at `step` on the line through `points` (step, value); constant before the first and after the last.

    >>> [piecewise_linear(s, [(0, 0.0), (4, 1.0), (8, 1.0)]) for s in (-1, 1, 4, 99)]
    [0.0, 0.25, 1.0, 1.0]
    """
    steps = [s for s, _ in points]
    if not points or steps != sorted(set(steps)):
        raise ValueError(f"points: expected at least one, with strictly increasing steps, got steps {steps}")
    if step <= steps[0]:
        return points[0][1]
    for (left, low), (right, high) in itertools.pairwise(points):
        if step <= right:
            return low + (high - low) * (step - left) / (right - left)
    return points[-1][1]
