"""PPO: prompts in, an adapter that earns more reward out. The loop is `PPOLoop.step`; this is the file to read first.

One step, on every rank (arXiv:1909.08593; details: arXiv:2403.17031):

    1  sample    a reply to each prompt, with the policy adapter as it is now
    2  score     rewards; log-probabilities of the same tokens under the frozen reference
    3  evaluate  the learner's own log-probabilities and values of the same tokens, before any update
    4  shape     reward - kl_coef x KL penalty per token; advantages; whitening              (roles/experience.py)
    5  update    num_ppo_epochs x num_mini_batches optimizer steps on the clipped losses     (roles/learner.py)
    6  publish   the new adapter gets a version and a hash; the KL coefficient moves once

With max_staleness 1 the next step's 1 and 2 go on meanwhile, by the adapter from before 5 (roles/rollouts.py).
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from torch import Tensor

from rlhf_ray.config import PPOConfig
from rlhf_ray.config.deepspeed import read_deepspeed_json
from rlhf_ray.console import Console, LocalConsole
from rlhf_ray.errors import Interrupted, InvariantError
from rlhf_ray.launch.launch import launch
from rlhf_ray.maths.controllers import make_controller
from rlhf_ray.maths.schedules import lr_multiplier, resolve_warmup
from rlhf_ray.maths.stats import RunningMoments
from rlhf_ray.ppo.actors import BUILDERS
from rlhf_ray.ppo.checkpoint import Best, enter_run, finish, restore, save
from rlhf_ray.ppo.setup import PPOSetup, set_up
from rlhf_ray.roles import invariants
from rlhf_ray.roles.collector import Collected
from rlhf_ray.roles.experience import Evaluation, make_experience
from rlhf_ray.roles.generator import ActiveAdapter, Decoding
from rlhf_ray.roles.guards import StopTraining
from rlhf_ray.roles.heldout import HeldOut, sample_rows
from rlhf_ray.roles.roles_log import peaks
from rlhf_ray.roles.rollouts import Rollouts, Sampled, probed_rows
from rlhf_ray.runtime.session import Session, peak_memory, seed_everything
from rlhf_ray.runtime.signals import Abandoned
from rlhf_ray.storage.run import Run
from rlhf_ray.storage.run_folder import is_run
from rlhf_ray.training.monitor import TrainingMonitor
from rlhf_ray.training.run_entry import discarded_on_error


def ppo(config: PPOConfig, console: Console | None = None) -> Run:
    """Run PPO as `config` says and return the finished run. Raises the error tree of errors.py."""
    if config.learner.deepspeed is not None:
        read_deepspeed_json(config.learner.deepspeed, config.learner.zero_stage)  # refused before anything is started
    return launch(train_ppo, config, console or LocalConsole(), BUILDERS)


def train_ppo(config: PPOConfig, session: Session) -> Run:
    """The body of the stage; every rank of the learner group runs it."""
    is_new = session.is_main and not is_run(config.output_dir)
    with ExitStack() as held:
        folder = enter_run(config, session, held)
        if session.from_main(folder.manifest()["status"]) == "done":
            session.console.log(f"ppo: {config.output_dir} is finished; nothing to do")
            return Run.load(folder.path)
        seed_everything(config.seed)
        with discarded_on_error(folder, is_new):
            setup = set_up(config, session, folder)
        loop = PPOLoop(config, session, setup)
        with setup.writers, session.stop.deferred(), loop.monitor.watchdog.watching():
            restore(loop)
            loop.run()
        return finish(loop)


@dataclass
class PPOProgress:
    """What moves from step to step besides weights and optimizer state; a checkpoint stores all of it."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best: Best = field(default_factory=Best)
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)


class PPOLoop:
    """One run. `setup` holds the roles of this rank, the prompts and the writers."""

    def __init__(self, config: PPOConfig, session: Session, setup: PPOSetup) -> None:
        self.config, self.session, self.setup = config, session, setup
        self.learner, self.collector = setup.learner, setup.collector
        self.controller = make_controller(
            config.kl_controller, config.kl_coef, config.kl_target, config.kl_horizon, config.kl_step_size
        )
        self.moments = RunningMoments()
        self.progress = PPOProgress()
        self.monitor = TrainingMonitor(config, session, setup.folder)
        self.total_steps = setup.total_steps
        self._told_flat = False
        self.rollouts = Rollouts(
            self.collector,
            lambda step: (setup.schedule.step(step), setup.budgets(step)),
            Decoding(setup.stop_ids, temperature=config.temperature),
            self.learner.models.bindings["policy"].adapter,
            ahead=config.max_staleness > 0,
            last_step=self.total_steps,
        )
        self.collector.abandons = config.max_staleness == 0
        self.saved_step = 0
        self.best_policy: dict[str, Tensor] | None = None  # what load_best_model_at_end ends with

    def run(self) -> None:
        """All steps that are left. Raises Interrupted, after saving what can be saved, if somebody or a guard ends the run."""
        try:
            self._steps()
        except Abandoned as why:
            raise self.monitor.stopped(str(why), self.progress.step, self._save_if_new) from None
        except StopTraining as found:
            found.saves &= found.is_limit or self.config.max_staleness == 0  # a rollout that was begun early is used up
            raise self.monitor.stopped_by_guard(found, self._save_if_new) from None
        finally:
            self.monitor.watchdog.enter("", 0)

    def _steps(self) -> None:
        """With evaluations and checkpoints where they are due."""
        self.hand_over()
        if self.progress.step == 0 and self.config.eval_on_start:
            self._report(0, self.evaluate(0))
        checkpoint_time: dict[str, float] = {}  # told with the step after the one it was spent on
        for step in range(self.progress.step + 1, self.total_steps + 1):
            if (reason := self.session.must_stop()) != "":
                raise Abandoned(reason)
            if step > 1 and self.session.is_preempted():
                self._save_if_new()
            started = time.perf_counter()
            metrics = self.step(step)
            if step == self.total_steps or step % self.setup.eval_every == 0:
                metrics |= self.evaluate(step)
            self.progress.step = step
            self.progress.seconds += time.perf_counter() - started
            self._report(step, metrics | checkpoint_time | peak_memory(self.session.device))
            checkpoint_time = {}
            if self.setup.save_due(step, self.total_steps):
                started = time.perf_counter()
                self._save_if_new()
                checkpoint_time = {"time/checkpoint": time.perf_counter() - started}
            self.monitor.guards.check(self.config, metrics, step)
            self.monitor.enter("step_end", step)

    def _save_if_new(self) -> None:
        """A checkpoint of the step that was done last. Every rank calls it."""
        step = self.progress.step
        if step != self.saved_step:
            self.monitor.enter("settle", step)
            self.rollouts.settle()
            self.monitor.enter("save", step)
            save(self, step)
            self.saved_step = step

    def step(self, step: int) -> dict[str, float]:
        """One PPO step. Returns its metrics; raises InvariantError when something that must hold does not."""
        clock = time.perf_counter()
        self.monitor.enter("rollout", step)
        try:
            sampled = self.rollouts.take(step, self.learner.published)
        except Interrupted:  # no generator is left, a reward cannot be had: the step before is whole
            if self.session.world_size == 1 and self.config.max_staleness == 0:
                self._save_if_new()
            raise
        sound = self.monitor.guards.sound(sampled.collected, self.config.num_generations, step)
        sampled = replace(sampled, collected=sound)
        collected, arrived = sampled.collected, time.perf_counter()
        self.monitor.enter("evaluate", step)
        evaluation = self.learner.evaluate(collected.rollout, step)
        probed = self._check_rollout(sampled, evaluation, step)
        self.monitor.enter("experience", step)
        kl_coef = self.controller.value
        experience, metrics = make_experience(
            collected.rollout, collected.scores, evaluation, self.config, kl_coef, self.moments
        )
        rates = self.learning_rates(step)
        self.monitor.enter("update", step)
        stats = self.learner.update(experience, step, rates, kl_coef, self.monitor.guards)
        updated = time.perf_counter()
        self.monitor.enter("publish", step)
        before = self.learner.published
        after = self.learner.publish()
        if rates["policy"] > 0 and stats.updates and bool(experience.advantages.any()):
            invariants.check_adapter_changed(before.sha256, after.sha256, after.tensors, step)
        moved = self.hand_over()
        self.controller.update(metrics["kl/k1_per_response"], len(experience))
        self.progress.tokens += int(metrics["tokens/generated"])
        metrics |= stats.metrics() | collected.seconds | collected.faults | probed
        metrics |= {f"lr/{name}": rate for name, rate in rates.items()}
        metrics |= {
            "tokens/total": float(self.progress.tokens),
            "sync/bytes": float(moved),
            "time/update": updated - arrived,
            "time/publish": time.perf_counter() - updated,
            "time/step": time.perf_counter() - clock,
        }
        if self.setup.remote_roles is not None:
            metrics |= self.setup.remote_roles.idle(collected.busy, metrics["time/step"], arrived - clock) | peaks(
                collected.done
            )
            self._log_roles(collected, f"step {step}")
        self._warn_if_flat(metrics["reward/std"], step)
        self._log_samples(sampled)
        return metrics

    def evaluate(self, step: int) -> dict[str, float]:
        """Sample and score replies to the held-out prompts, always with the same random numbers."""
        if not self.setup.held_out:
            return {}
        started = time.perf_counter()
        self.monitor.enter("settle", step)
        self.rollouts.settle()  # generators answer in turn: a rollout under way comes first
        budgets = [self.config.response_length] * len(self.setup.held_out)
        self.monitor.enter("heldout", step)
        collected = self.setup.eval_collector.collect(
            self.setup.held_out, budgets, self.active(), self.setup.eval_decoding, "eval", 0
        )
        collected = self.monitor.guards.sound(collected, 1, step, counts=False)
        metrics = HeldOut.of(collected).metrics()
        self._log_roles(collected, f"evaluation at step {step}")
        if self.progress.best.offer(step, metrics["eval/reward"]) and self.config.load_best_model_at_end:
            self.best_policy = self.learner.published.tensors
        return {**metrics, "time/evaluate": time.perf_counter() - started}

    def active(self) -> ActiveAdapter:
        """The policy adapter that is in the model now."""
        name = self.learner.models.bindings["policy"].adapter
        return ActiveAdapter(name, self.learner.published.version, self.learner.published.sha256)

    def hand_over(self) -> int:
        """Let the samplers have the published adapter; its size in bytes. Where they use the learner's model nothing moves."""
        if self.setup.remote_roles is None:
            return self.learner.published.size_bytes
        return self.session.from_main(self.setup.remote_roles.publish(self.learner.published))

    def learning_rates(self, step: int) -> dict[str, float]:
        """Learning rate of each parameter group at `step` (from 1). The policy waits while the value model warms up."""
        config, warmup = self.config, resolve_warmup(self.config.warmup_steps, self.total_steps)
        factor = lr_multiplier(config.lr_scheduler_type, step - 1, self.total_steps, warmup, config.min_lr_ratio)
        peak = {"policy": config.learning_rate, "value": config.value.learning_rate or config.learning_rate}
        rates = {group.name: peak[group.name] * factor for group in self.learner.groups}
        if step <= config.value.warmup_steps:
            rates["policy"] = 0.0
        return rates

    def _check_rollout(self, sampled: Sampled, evaluation: Evaluation, step: int) -> dict[str, float]:
        """The adapter that was asked for sampled this, and did so as the learner would have. Returns what was measured of it."""
        rollout, limit, newest = sampled.collected.rollout, self.setup.tolerance, self.learner.published
        if rollout.adapter_sha256 != sampled.adapter.sha256:
            raise invariants.stale_adapter(rollout, sampled.adapter.sha256, step)
        metrics = {"sampler/staleness": float(newest.version - sampled.adapter.version)}
        if (step - 1) % self.config.probe_steps == 0:
            probed, logprobs = rollout, evaluation.logprobs
            if sampled.adapter.version != newest.version:
                wanted = self.config.per_device_train_batch_size * self.session.world_size
                probed = rollout.rows(probed_rows(len(rollout), self.config.rollout_chunk_size, wanted))
                logprobs = self.learner.logprobs_under(sampled.adapter, probed)
            try:
                metrics["sampler/probe_difference"] = invariants.check_sampler_agrees(probed, logprobs, limit, step)
            except InvariantError as error:
                raise self.collector.explain(error, newest) from error
        if step == 1:
            invariants.check_starts_at_reference(
                evaluation.logprobs, sampled.collected.scores.ref_logprobs, rollout.response_mask, limit
            )
        return metrics

    def _report(self, step: int, metrics: dict[str, float]) -> None:
        """Write the step's metrics (rank 0) and show the few worth a glance."""
        invariants.check_finite(metrics, step)
        finite = {n: v for n, v in metrics.items() if v == v}
        self.progress.last |= finite
        for name, value in finite.items():
            self.progress.first.setdefault(name, value)
        if not self.session.is_main:
            return
        self.setup.writers.metrics.write(step, finite)
        self.session.console.metrics(step, finite)
        shown = ("reward/mean", "kl/k1_per_response", "response/length", "eval/reward")
        known = {n: self.progress.last[n] for n in shown if n in self.progress.last}
        self.session.console.progress("ppo", step, self.total_steps, known)

    def _warn_if_flat(self, std: float, step: int) -> None:
        """Once a run: equal rewards teach nothing, and leave only the KL penalty to follow."""
        if std == 0 and not self._told_flat and self.session.is_main:
            self._told_flat = True
            self.session.console.warn(
                f"reward std 0 at step {step}: all replies earned the same; is the reward at work?"
            )

    def _log_roles(self, collected: Collected, what: str) -> None:
        log, rollout = self.setup.writers.roles, collected.rollout
        if log is not None:
            again = int(collected.faults.get("faults/retries", 0.0))
            log.step(what, rollout.adapter_version, rollout.adapter_sha256, collected.done, again)

    def _log_samples(self, sampled: Sampled) -> None:
        if self.session.is_main and self.config.num_samples_logged:
            collected, prompts = sampled.collected, self.setup.schedule.step(sampled.step)
            shown = collected.rollout.row_id[: self.config.num_samples_logged].tolist()
            rows = [prompts[i].row for i in shown]
            texts = self.setup.to_texts(collected.rollout.rows(slice(0, len(rows))), rows)
            samples = sample_rows(collected, list(texts.prompts), list(texts.completions), len(rows))
            self.setup.writers.samples.write(sampled.step, samples)
