"""When a PPO run must not go on: numbers that are not finite, rewards that cannot be trusted, a policy that runs away.

A single bad update or reward is left out and counted; three in a row stop the run. `StopTraining` says why; the loop makes of it
the error that names the checkpoint to go on from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.config import PPOConfig
from rlhf_ray.errors import InvariantError, Problem
from rlhf_ray.metrics import held_out_reward, standard_error_name, start_kl
from rlhf_ray.roles.collector import Collected

IN_A_ROW = 3
"""Bad updates, or steps with bad rewards, in a row after which a run stops."""
BAD_SHARE = 0.05
"""Share of a step's rewards that may be missing."""
SAMPLES = "look at the rewards and lengths of this step in samples.jsonl"
CLEAR = 2.0
"""Standard errors between a held-out reward and the best one for it to count as worse."""


LOWER_RATE = "lower learning_rate in a new run (another output_dir; a resumed one keeps its own)"


class StopTraining(Exception):
    """A guard stops the run. saves: what is in memory is a whole step, worth a checkpoint.  is_limit: of the job's own."""

    def __init__(self, problem: Problem, saves: bool = False, is_limit: bool = False) -> None:
        super().__init__(str(problem))
        self.problem, self.saves, self.is_limit = problem, saves, is_limit


@dataclass
class Guards:
    """What must be remembered from step to step; a checkpoint stores it.

    skipped: updates left out in a row.  bad_rewards: steps in a row with a reward left out.  worse: evaluations in a row.
    best, best_kl: held-out reward and KL at the best evaluation."""

    skipped: int = 0
    bad_rewards: int = 0
    worse: int = 0
    best: float = -math.inf
    best_kl: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {**vars(self), "best": self.best.hex(), "best_kl": self.best_kl.hex()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in vars(self).keys() & state.keys():  # an older version stored more
            value = state[name]
            setattr(self, name, float.fromhex(value) if name.startswith("best") else int(value))

    def note_update(self, finite: bool, norms: Mapping[str, float], step: int, advice: str = SAMPLES) -> None:
        """Take note of an update that was made, or left out. Raises StopTraining at the third in a row.   advice: where to look."""
        self.skipped = 0 if finite else self.skipped + 1
        if self.skipped >= IN_A_ROW:
            figures = ", ".join(f"{name} {norm:g}" for name, norm in norms.items())
            raise StopTraining(
                Problem(
                    f"step {step}",
                    f"{IN_A_ROW} updates in a row had a gradient that is not finite and were left out",
                    "finite gradient norms",
                    figures,
                    f"{LOWER_RATE}, or {advice}",
                )
            )

    def sound(self, collected: Collected, generations: int, step: int, counts: bool = True) -> Collected:
        """`collected` without the replies whose reward or reference is not finite, nor the other replies to the same prompt.

        generations: replies per prompt.  counts: whether the step counts for "in a row" (an evaluation does not, and is of the
        replies that have a reward: those that none applies to stay). Raises StopTraining if too many are bad or no reply is left,
        InvariantError if rewards are not of the replies they are said to be of."""
        rollout, scores = collected.rollout, collected.scores
        if not torch.equal(rollout.row_id, scores.row_id):
            raise InvariantError.at(
                f"step {step}", "rewards are of other replies", _some(rollout.row_id), _some(scores.row_id)
            )
        fine = _is_finite(collected, needs_reward=counts)
        bad = int((~fine).sum())
        if counts:
            self.bad_rewards = self.bad_rewards + 1 if bad else 0
        if not bad:
            return collected
        group = rollout.row_id // generations
        keep = ~torch.isin(group, group[~fine])
        too_many = bad > BAD_SHARE * len(rollout) or self.bad_rewards >= IN_A_ROW
        if too_many or not bool(keep.any()):
            besides = "" if too_many else ", and all others are of the same prompts"
            problem = self._bad_rewards(collected, fine, step, besides)
            self.bad_rewards -= counts  # the step will be taken again
            raise StopTraining(problem, saves=counts)
        return replace(
            collected,
            rollout=rollout.rows(keep),
            scores=scores.rows(keep),
            faults={**collected.faults, "faults/rewards_left_out": float(len(rollout) - int(keep.sum()))},
        )

    def _bad_rewards(self, collected: Collected, fine: Tensor, step: int, besides: str = "") -> Problem:
        bad, rows = int((~fine).sum()), len(fine)
        scores = collected.scores
        names = [n for n, part in scores.parts.items() if bool(part.isinf().any())]
        first = int(collected.rollout.row_id[~fine][0])
        silent = bool(scores.parts) and all(bool(part[~fine].isnan().all()) for part in scores.parts.values())
        who = f"reward {', '.join(names)} is not finite" if names else "the reward or reference is not finite"
        who = "no reward applies (all say None)" if silent else who
        again = f", in {self.bad_rewards} steps in a row" if self.bad_rewards >= IN_A_ROW else ""
        return Problem(
            f"step {step}",
            f"{who} for {bad} of {rows} replies (first row {first}){again}{besides}",
            f"at most {BAD_SHARE:.0%} of a step, and not in {IN_A_ROW} steps in a row",
            fix="fix the reward, then resume the run",
        )

    def check(self, config: PPOConfig, metrics: Mapping[str, float], step: int) -> None:
        """The limits that the job sets. Raises StopTraining naming figure and limit."""
        limits = (
            ("max_kl", config.max_kl, start_kl(metrics), 1),
            ("max_clip_fraction", config.max_clip_fraction, "policy/clip_fraction", 1),
            ("min_finished", config.min_finished, "response/finished", -1),
        )
        for name, limit, metric, sign in limits:
            if limit is not None and metric in metrics and sign * (metrics[metric] - limit) > 0:
                bound = "at most" if sign > 0 else "at least"
                fix = f"{'raise' if sign > 0 else 'lower'} {name}, by {name}=VALUE at the end of the command"
                what = f"{metric} is beyond {name}: the policy runs away"
                problem = Problem(f"step {step}", what, f"{bound} {limit:g}", f"{metrics[metric]:.4g}", fix)
                raise StopTraining(problem, saves=True, is_limit=True)
        metric = held_out_reward(config.watch)
        if config.over_optimisation_patience is not None and metric in metrics:
            self._check_evaluation(config.over_optimisation_patience, metric, metrics, step)

    def _check_evaluation(self, patience: int, metric: str, metrics: Mapping[str, float], step: int) -> None:
        # Where evaluations do not sample, the KL is that of the step's rollouts.
        reward, kl = (
            metrics[metric],
            metrics.get("eval/kl_k1_per_response", metrics.get(start_kl(metrics), 0.0)),
        )
        if reward > self.best:
            self.best, self.best_kl, self.worse = reward, kl, 0
            return
        is_worse = reward < self.best - CLEAR * metrics.get(standard_error_name(metric), 0.0) and kl > self.best_kl
        self.worse = self.worse + 1 if is_worse else 0
        if self.worse >= patience:
            raise StopTraining(
                Problem(
                    f"step {step}",
                    f"over-optimisation: {patience} evaluations in a row are clearly below the best one, at a larger KL",
                    f"{metric} near {self.best:.4g} (at {self.best_kl:.3g} nats per reply)",
                    f"{reward:.4g} at {kl:.3g} nats",
                    "take the best checkpoint, or raise kl_coef",
                ),
                saves=True,
                is_limit=True,
            )


def _is_finite(collected: Collected, needs_reward: bool) -> Tensor:
    """bool[B]: the reward and the log-probabilities under the reference, and under the start, are finite.   needs_reward: false if
    none may apply to a reply."""
    scores = collected.scores
    finite = torch.isfinite(scores.ref_logprobs) & torch.isfinite(scores.start)
    rewarded = torch.isfinite(scores.reward)
    if not needs_reward:
        rewarded |= scores.reward.isnan() & ~torch.stack([scores.reward, *scores.parts.values()]).isinf().any(dim=0)
    return rewarded & finite.all(dim=1)


def _some(ids: Tensor) -> str:
    shown = ", ".join(str(int(i)) for i in ids[:5])
    return f"rows {shown}{', ...' if len(ids) > 5 else ''} ({len(ids)})"
