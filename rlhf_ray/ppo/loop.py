"""PPO, one step at a time: prompts in, an adapter that earns more reward out. The algorithm without everything around it:
minimal.py.

One step, on every rank (arXiv:1909.08593; details: arXiv:2403.17031):

    1  sample    a reply to each prompt, with the policy adapter as it is now
    2  score     rewards; log-probabilities of the same tokens under the frozen reference
    3  evaluate  the learner's own log-probabilities and values of the same tokens, before any update
    4  shape     reward - kl_coef x KL penalty per token; advantages; whitening              (roles/experience.py)
    5  update    num_ppo_epochs x num_mini_batches optimizer steps on the clipped losses     (roles/learner.py)
    6  publish   the new adapter gets a version and a hash, and goes to who samples; the KL coefficient moves once
                                                                                           (ppo/hand_over.py)

With max_staleness 1 the next step's 1 and 2 go on meanwhile, by the adapter from before 5 (roles/rollouts.py).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace

from rlhf_ray.config import PPOConfig
from rlhf_ray.errors import Interrupted
from rlhf_ray.metrics import held_out_reward
from rlhf_ray.ppo.checkpoint import enter_run, finish, restore, save
from rlhf_ray.ppo.checks import check_rollout
from rlhf_ray.ppo.hand_over import HandOver
from rlhf_ray.ppo.reporting import StepReport, whole_step
from rlhf_ray.ppo.setup import PPOSetup, set_up
from rlhf_ray.ppo.state import PPOState
from rlhf_ray.roles import invariants
from rlhf_ray.roles.experience import informative_rows, make_experience
from rlhf_ray.roles.generator import Decoding
from rlhf_ray.roles.guards import StopTraining
from rlhf_ray.roles.heldout import held_out_metrics
from rlhf_ray.roles.rollouts import Rollouts, Sampled
from rlhf_ray.runtime.session import Session, peak_memory, seed_everything
from rlhf_ray.runtime.signals import Abandoned
from rlhf_ray.storage.run import Run
from rlhf_ray.training.monitor import TrainingMonitor
from rlhf_ray.training.run_entry import discarded_on_error


def train_ppo(config: PPOConfig, session: Session) -> Run:
    """The body of the stage; every rank of the learner group runs it."""
    with ExitStack() as held:
        folder = enter_run(config, session, held)
        if session.from_main(folder.manifest()["status"]) == "done":
            session.console.log(f"ppo: {config.output_dir} is finished; nothing to do")
            return Run.load(folder.path)
        seed_everything(config.seed)
        with discarded_on_error(folder):
            setup = set_up(config, session, folder, held)
        loop = PPOLoop(config, session, setup)
        with setup.writers, session.stop.deferred(), loop.monitor.watchdog.watching():
            loop.restore()
            loop.run()
        return finish(config, session, setup, loop.state)


class PPOLoop:
    """One run. `setup` holds the roles of this rank, the prompts and the writers; `state` what moves from step to step."""

    def __init__(self, config: PPOConfig, session: Session, setup: PPOSetup) -> None:
        self.config, self.session, self.setup = config, session, setup
        self.learner, self.collector = setup.learner, setup.collector
        self.monitor = TrainingMonitor(config, session, setup.folder)
        self.state = PPOState.of(config, self.monitor.guards)
        self.hand_over = HandOver(config, session, setup, self.state)
        self.report = StepReport(config, session, setup, self.state)
        self.rollouts = Rollouts(
            self.collector,
            lambda step: (setup.schedule.step(step), setup.budgets(step)),
            Decoding(setup.stop_ids, temperature=config.temperature),
            self.hand_over.active().name,
            ahead=config.max_staleness > 0,
            last_step=setup.total_steps,
        )
        self.collector.abandons = config.max_staleness == 0
        self.saved_step = 0

    def step(self, step: int) -> dict[str, float]:
        """One PPO step. Returns its metrics; raises InvariantError when something that must hold does not."""
        phase, started = self.monitor.phases(step), time.perf_counter()
        state, before = self.state, self.learner.published

        with phase("rollout"), self.hand_over.engine_awake():  # 1 and 2: sample and score
            sampled = self._sampled(step)
            collected = sampled.collected

        with phase("evaluate"):
            learnt = informative_rows(collected.scores, collected.rollout, self.config)
            evaluation = self.learner.evaluate(collected.rollout, step, learnt)
            checked = check_rollout(self.config, self.session, self.setup, sampled, evaluation, step)

        with phase("experience"):
            kl_coef = state.controller.value
            experience, metrics = make_experience(
                collected.rollout, collected.scores, evaluation, self.config, kl_coef, state.moments
            )

        with phase("update"):
            rates = self.setup.learning_rates(step)
            trained_on = experience if learnt is None else experience.rows(learnt)
            stats = self.learner.update(trained_on, step, rates, kl_coef, state.guards)

        with phase("publish"):
            after = self.learner.publish()
            if rates["policy"] > 0 and stats.updates and bool(trained_on.advantages.any()):
                invariants.check_adapter_changed(before.sha256, after.sha256, after.tensors, step)
            moved = self.hand_over.policy()
            self.hand_over.reset_reference_if_due(step)
            state.controller.update(metrics["kl/k1_per_response"], len(experience))
            state.tokens += int(metrics["tokens/generated"])

        seconds = {**phase.seconds, "step": time.perf_counter() - started}
        found = whole_step(metrics | checked, stats, collected, rates, state, seconds) | {"sync/bytes": float(moved)}
        found |= self.report.idle(collected, seconds["step"], seconds["rollout"], f"step {step}")
        self.report.warn_if_flat(metrics["reward/std"], step)
        self.report.warn_if_ending_is_learnt(metrics["reward/std"], metrics["response/finished"], step)
        self.report.samples(sampled)
        return found

    def _sampled(self, step: int) -> Sampled:
        """The rollout of `step`, without replies whose reward or reference is not finite."""
        try:
            sampled = self.rollouts.take(step, self.learner.published, self.hand_over.reference())
        except Interrupted:  # no generator is left, a reward cannot be had: the step before is whole
            if self.session.world_size == 1 and self.config.max_staleness == 0:
                self.save_if_new()
            raise
        sound = self.state.guards.sound(sampled.collected, self.config.num_generations, step)
        return replace(sampled, collected=sound)

    def evaluate(self, step: int) -> dict[str, float]:
        """Sample and score replies to the held-out prompts, always with the same random numbers."""
        if not self.setup.held_out:
            return {}
        phase, started = self.monitor.phases(step), time.perf_counter()
        with phase("settle"):
            self.rollouts.settle()  # generators answer in turn: a rollout under way comes first
        with phase("heldout"), self.hand_over.engine_awake():
            budgets = [self.config.response_length] * len(self.setup.held_out)
            collected = self.setup.eval_collector.collect(
                self.setup.held_out, budgets, self.hand_over.active(), self.setup.eval_decoding, "eval", 0
            )
            collected = self.state.guards.sound(collected, 1, step, counts=False)
        metrics = held_out_metrics(collected, self.setup.confirming, self.config.eval_sampling.estimates_kl)
        self.report.roles(collected, f"evaluation at step {step}")
        self.report.warn_if_unrewarded(collected.scores.reward, step)
        judged = metrics.get(held_out_reward(self.config.watch))
        is_best = judged is not None and self._is_near(metrics) and self.state.best.offer(step, judged)
        if is_best and self.config.load_best_model_at_end:
            self.state.best_policy = self.learner.published.tensors
        return {**metrics, "time/evaluate": time.perf_counter() - started}

    def _is_near(self, metrics: Mapping[str, float]) -> bool:
        """Whether an evaluation may be the best one: within the KL cap, where its KL was measured."""
        cap = self.config.max_kl if self.config.kl_cap is None else self.config.kl_cap
        return cap is None or metrics.get("eval/kl_k1_per_response", 0.0) <= cap

    def run(self) -> None:
        """All steps that are left. Raises Interrupted, after saving what can be saved, if somebody or a guard ends the run."""
        try:
            self._steps()
        except Abandoned as why:
            raise self.monitor.stopped(str(why), self.state.step, self.save_if_new) from None
        except StopTraining as found:
            found.saves &= (
                found.is_limit or self.config.max_staleness == 0
            )  # a rollout that was started early is used up
            raise self.monitor.stopped_by_guard(found, self.save_if_new) from None
        finally:
            self.monitor.watchdog.enter("", 0)

    def _steps(self) -> None:
        """With evaluations and checkpoints where they are due."""
        state, setup = self.state, self.setup
        self.hand_over.policy()
        self.hand_over.synced_reference()
        if state.step == 0 and self.config.eval_on_start:
            first = self.evaluate(0)
            self.state.alarm.look(self.config, first)
            self.report.metrics(0, first)
        checkpoint_time: dict[str, float] = {}  # told with the step after the one it was spent on
        for step in range(state.step + 1, setup.total_steps + 1):
            if (reason := self.session.must_stop()) != "":
                raise Abandoned(reason)
            if step > 1 and self.session.is_preempted():
                self.save_if_new()
            started = time.perf_counter()
            metrics = self.step(step)
            if step == setup.total_steps or step % setup.eval_every == 0:
                metrics |= self.evaluate(step)
            state.step = step
            state.seconds += time.perf_counter() - started
            signs = state.alarm.look(self.config, metrics)
            told = {f"alarm/{sign.kind}": 1.0 for sign in signs}
            self.report.metrics(step, metrics | told | checkpoint_time | peak_memory(self.session.device))
            self.report.signs(signs, step)
            checkpoint_time = {}
            if setup.save_due(step, setup.total_steps):
                started = time.perf_counter()
                self.save_if_new()
                checkpoint_time = {"time/checkpoint": time.perf_counter() - started}
            state.guards.check(self.config, metrics, step)
            if signs and self.config.alarm.action == "stop":
                raise StopTraining(signs[0].problem(step, stops=True), saves=True, is_limit=True)
            self.monitor.enter("step_end", step)

    def save_if_new(self) -> None:
        """A checkpoint of the step that was done last. Every rank calls it."""
        step = self.state.step
        if step != self.saved_step:
            self.monitor.enter("settle", step)
            pending = self.rollouts.settle()
            self.monitor.enter("save", step)
            save(self.config, self.session, self.setup, self.state, pending)
            self.saved_step = step

    def restore(self) -> None:
        """Resume from the newest valid checkpoint, if there is one."""
        self.rollouts.pending = restore(self.config, self.session, self.setup, self.state)
        self.saved_step = self.state.step
