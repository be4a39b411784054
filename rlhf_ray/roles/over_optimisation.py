"""Signs that a policy maximises its reward and nothing else: what is maximised rises while what watches falls (Gao et al. 2022,
arXiv:2210.10760), or replies change in length, repeat themselves, or lose their spread.

An alarm is a sign, not a verdict. It goes by numbers that are measured anyhow, and keeps the few that it compares with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf_ray.config import AlarmConfig, PPOConfig
from rlhf_ray.errors import Problem
from rlhf_ray.maths.standard_errors import error_of_difference
from rlhf_ray.metrics import held_out_reward, standard_error_name

IN_A_ROW = 2
"""Steps out of a band after which it counts: one noisy step is none."""
ADVICE = "take the best checkpoint, raise kl_coef or lower learning_rate"
GO_ON = "or resume with alarm.action=warn at the end of the command"
LENGTH, REPETITION, ENTROPY = "response/length", "response/repetition", "policy/entropy"
WORDS = {
    LENGTH: ("have become shorter", "have become longer"),
    REPETITION: ("", "repeat themselves"),
    ENTROPY: ("have lost their spread", "have become random"),
}
"""Metric -> what it says below its band, and above it."""


@dataclass(frozen=True)
class Sign:
    """kind: watch, length, repetition or entropy.  what: in words.  expected, got: figures."""

    kind: str
    what: str
    expected: str
    got: str

    def problem(self, step: int, stops: bool = False) -> Problem:
        """stops: the run is ended by it."""
        fix = f"{ADVICE}, {GO_ON}" if stops else ADVICE
        return Problem(f"step {step}", f"over-optimisation: {self.what}", self.expected, self.got, fix)


@dataclass
class OverOptimisation:
    """What must be remembered from step to step; a checkpoint stores it.

    first: metric -> its value in the first step.  outside: kind -> steps in a row.  best: {proxy, watch, error} of watch's best
    evaluation.  told: kinds that were warned of."""

    first: dict[str, float] = field(default_factory=dict)
    outside: dict[str, int] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """As JSON, which writes floats so that they read back bit for bit."""
        return {"first": self.first, "outside": self.outside, "best": self.best, "told": self.told}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.first, self.outside = dict(state.get("first", {})), dict(state.get("outside", {}))
        self.best, self.told = dict(state.get("best", {})), list(state.get("told", ()))

    def look(self, config: PPOConfig, metrics: Mapping[str, float]) -> list[Sign]:
        """The signs in the metrics of a step, or of an evaluation alone."""
        if config.alarm.action == "none":
            return []
        found = []
        for sign, metric in self._bands(config, metrics):
            self.outside[metric] = self.outside.get(metric, 0) + 1 if sign is not None else 0
            if sign is not None and self.outside[metric] >= IN_A_ROW:
                found.append(sign)
        against = self._against_watch(config, metrics)
        return found if against is None else [against, *found]

    def news(self, signs: list[Sign]) -> list[Sign]:
        """Those that have not been told yet, which are told from now on."""
        new = [sign for sign in signs if sign.kind not in self.told]
        self.told += [sign.kind for sign in new]
        return new

    def _bands(self, config: PPOConfig, metrics: Mapping[str, float]) -> Iterator[tuple[Sign | None, str]]:
        """The sign, or None inside the band, and the metric, of each metric that is there and has a band."""
        for metric, (less, more) in WORDS.items():
            if metric not in metrics:
                continue
            value, first = metrics[metric], self.first.setdefault(metric, metrics[metric])
            low, high = _band(metric, first, config.alarm)
            if low <= value <= high:
                yield None, metric
                continue
            what = f"replies {less if value < low else more}: {metric} left its band"
            expected = f"{low:.3g} to {high:.3g} ({first:.3g} in the first step)"
            yield Sign(metric.partition("/")[2], what, expected, f"{value:.3g}, {IN_A_ROW} steps in a row"), metric

    def _against_watch(self, config: PPOConfig, metrics: Mapping[str, float]) -> Sign | None:
        name, errors = held_out_reward(config.watch), config.alarm.watch_errors
        if config.watch is None or errors is None or not {name, "eval/reward"} <= metrics.keys():
            return None
        watch, proxy = metrics[name], metrics["eval/reward"]
        error = metrics.get(standard_error_name(name), 0.0)
        if not self.best or watch > self.best["watch"]:
            self.best = {"watch": watch, "proxy": proxy, "error": error}
            return None
        noise = errors * error_of_difference(error, self.best["error"])
        if not (proxy > self.best["proxy"] and watch < self.best["watch"] - noise):
            return None
        return Sign(
            "watch",
            f"the reward that is maximised rises and {config.watch} falls",
            f"{name} above {self.best['watch'] - noise:.4g}: {self.best['watch']:.4g} at its best, less {errors:g} standard errors",
            f"{watch:.4g}, while eval/reward rose from {self.best['proxy']:.4g} to {proxy:.4g}",
        )


def _band(metric: str, first: float, alarm: AlarmConfig) -> tuple[float, float]:
    """Where `metric` may be, given its value in the first step; everywhere if it has no band."""
    if metric == REPETITION:
        return 0.0, math.inf if alarm.repetition_rise is None else first + alarm.repetition_rise
    factor = alarm.length_factor if metric == LENGTH else alarm.entropy_factor
    return (0.0, math.inf) if factor is None or first <= 0 else (first / factor, first * factor)
