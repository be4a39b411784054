"""What a PPO run says of its steps: metrics.jsonl and the progress line, samples.jsonl, roles.log, and warnings that nothing is
learnt, or something else than the reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from rlhf_ray.config import PPOConfig
from rlhf_ray.metrics import held_out_reward
from rlhf_ray.ppo.setup import PPOSetup
from rlhf_ray.ppo.state import PPOState
from rlhf_ray.roles import invariants
from rlhf_ray.roles.collector import Collected
from rlhf_ray.roles.heldout import sample_rows
from rlhf_ray.roles.learner import UpdateStats
from rlhf_ray.roles.over_optimisation import Sign
from rlhf_ray.roles.roles_log import peaks
from rlhf_ray.roles.rollouts import Sampled
from rlhf_ray.runtime.session import Session

SHOWN = ("reward/mean", "kl/k1_per_response", "response/length", "eval/reward")
"""The few worth a glance while a run goes on; beside them the reward that watches, if one does."""
FIRST_STEPS = 5
ENDING_SHARE = 0.33
"""Of the variance of scores, from which on missing_eos_penalty is warned of."""


def whole_step(
    metrics: Mapping[str, float],
    stats: UpdateStats,
    collected: Collected,
    rates: Mapping[str, float],
    state: PPOState,
    seconds: Mapping[str, float],
) -> dict[str, float]:
    """All metrics of a step. metrics: of its experience and checks.  seconds: of its phases, and `step`, of the whole."""
    return {
        **metrics,
        **stats.metrics(),
        **collected.seconds,
        **collected.faults,
        **{f"lr/{name}": rate for name, rate in rates.items()},
        "tokens/total": float(state.tokens),
        "time/update": seconds["evaluate"] + seconds["experience"] + seconds["update"],
        "time/publish": seconds["publish"],
        "time/step": seconds["step"],
    }


class StepReport:
    """One rank's; rank 0 writes and shows."""

    def __init__(self, config: PPOConfig, session: Session, setup: PPOSetup, state: PPOState) -> None:
        self.config, self.session, self.setup, self.state = config, session, setup, state
        self._warned_flat = self._warned_unrewarded = False
        self._first: list[tuple[float, float, float]] = []

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the step's metrics and show the few worth a glance. InvariantError if one is not finite."""
        invariants.check_finite(metrics, step)
        finite = {n: v for n, v in metrics.items() if v == v}
        self.state.record(finite)
        if not self.session.is_main:
            return
        self.setup.writers.metrics.write(step, finite)
        self.session.console.metrics(step, finite)
        shown = SHOWN if self.config.watch is None else (*SHOWN, held_out_reward(self.config.watch))
        known = {n: self.state.last[n] for n in shown if n in self.state.last}
        self.session.console.progress("ppo", step, self.setup.total_steps, known)

    def idle(self, collected: Collected, step_seconds: float, waited: float, what: str) -> dict[str, float]:
        """Under `placement: split`, idle shares and memory of the actors; roles.log gets its line. Else nothing.

        waited: seconds that this rank waited for the rollout."""
        if self.setup.remote_roles is None:
            return {}
        self.roles(collected, what)
        return self.setup.remote_roles.idle(collected.busy, step_seconds, waited) | peaks(collected.done)

    def roles(self, collected: Collected, what: str) -> None:
        """A line of roles.log, where there is one."""
        log, rollout = self.setup.writers.roles, collected.rollout
        if log is not None:
            again = int(collected.faults.get("faults/retries", 0.0))
            log.step(what, rollout.adapter_version, rollout.adapter_sha256, collected.done, again)

    def signs(self, signs: Sequence[Sign], step: int) -> None:
        """Warn of each kind of sign once a run."""
        for sign in self.state.alarm.news(list(signs)):
            if self.session.is_main:
                self.session.console.warn(str(sign.problem(step)))

    def warn_if_flat(self, std: float, step: int) -> None:
        """Once a run: equal rewards teach nothing, and leave only the KL penalty to follow."""
        if std == 0 and not self._warned_flat and self.session.is_main:
            self._warned_flat = True
            self.session.console.warn(
                f"reward std 0 at step {step}: all replies earned the same; is the reward at work?"
            )

    def warn_if_ending_is_learnt(self, reward_std: float, finished: float, step: int) -> None:
        """Once a run, of its first steps: where a good part of what sets scores apart is the penalty for replies that are cut off,
        PPO learns to end in time, whatever the reward says.   finished: share of the replies."""
        penalty, config = self.config.missing_eos_penalty, self.config
        # Not where the penalty has no effect, nor where replies with a budget of their own are spared it.
        if not penalty or config.bootstrap_truncated or config.min_response_length or len(self._first) == FIRST_STEPS:
            return
        self._first.append((reward_std**2, penalty**2 * finished * (1 - finished), finished))
        if len(self._first) < FIRST_STEPS or not self.session.is_main:
            return
        of_reward, of_penalty, share = (sum(column) / FIRST_STEPS for column in zip(*self._first))
        part = of_penalty / (of_reward + of_penalty) if of_penalty else 0.0
        if part >= ENDING_SHARE:
            self.session.console.warn(
                f"{1 - share:.0%} of the replies of {FIRST_STEPS} steps up to {step} did not end within response_length"
                f" {config.response_length}: missing_eos_penalty {penalty:g} is {part:.0%} of the variance of their scores,"
                " so PPO learns to end in time before it learns from the reward; raise response_length, or lower"
                " missing_eos_penalty"
            )

    def warn_if_unrewarded(self, reward: Tensor, step: int) -> None:
        """Once a run: of which replies an evaluation's mean is.   reward: f32[B] of all of them, NaN where none applies."""
        without, rows = int(reward.isnan().sum()), len(reward)
        if not without or self._warned_unrewarded or not self.session.is_main:
            return
        self._warned_unrewarded = True
        then = "eval/reward is that of the others"
        if without == rows:
            then = "there is no eval/reward" + (", and so no best step" if self.config.watch is None else "")
        self.session.console.warn(
            f"evaluation at step {step}: no reward applies to {without} of {rows} replies to held-out prompts (None): {then}"
        )

    def samples(self, sampled: Sampled) -> None:
        """The first replies of the step, with their figures."""
        if self.session.is_main and self.config.num_samples_logged:
            collected, prompts = sampled.collected, self.setup.schedule.step(sampled.step)
            shown = collected.rollout.row_id[: self.config.num_samples_logged].tolist()
            rows = [prompts[i].row for i in shown]
            texts = self.setup.to_texts(collected.rollout.rows(slice(0, len(rows))), rows)
            samples = sample_rows(collected, list(texts.prompts), list(texts.completions), len(rows))
            self.setup.writers.samples.write(sampled.step, samples)
