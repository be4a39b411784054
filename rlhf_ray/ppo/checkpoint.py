"""What a PPO run keeps on disk: its folder, its checkpoints, its result. The loop does not know files.

A checkpoint is taken at one point only, the end of a step: adapters, head, optimizer state by parameter name, KL controller, reward
statistics, counters, the rollout that waits for the next step if there is one, the lengths of metrics.jsonl and samples.jsonl, the
configuration, and what bits depend on beside it. Sampling and schedules have no state (maths/rng.py).
"""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from rlhf_ray.config import PPOConfig
from rlhf_ray.config.resolved import to_dict
from rlhf_ray.errors import ArtifactError
from rlhf_ray.models.adapters import adapter_tensors, load_adapter_tensors, save_adapter
from rlhf_ray.models.zero3 import gathered
from rlhf_ray.ppo.pending_rollout import load_pending, save_pending
from rlhf_ray.report import write_report
from rlhf_ray.roles.optimizer_state import export_state, restore_state
from rlhf_ray.runtime.session import Session
from rlhf_ray.storage.run import Run
from rlhf_ray.storage.run_folder import (
    Checkpoint,
    RunFolder,
    atomic_save_tensors,
    atomic_write_json,
    write_checkpoint,
)
from rlhf_ray.training import run_entry
from rlhf_ray.training.environment import environment, warn_of_differences

if TYPE_CHECKING:
    from rlhf_ray.ppo.loop import PPOLoop

BEST = "best.safetensors"
MAY_CHANGE = (
    *run_entry.MAY_CHANGE,
    *("placement", "generator.", "scorer.", "probe_steps"),
    *("max_kl", "max_clip_fraction", "min_finished", "over_optimisation_patience"),
)
"""Fields that may differ between the job that started a run and the one that goes on with it."""


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


def enter_run(config: PPOConfig, session: Session, held: ExitStack) -> RunFolder:
    """Make or find the run folder, locked for as long as `held` lasts; see `run_entry.enter_run`."""
    return run_entry.enter_run(config, session, held, "ppo", MAY_CHANGE)


def save(loop: PPOLoop, step: int) -> None:
    """Write checkpoint `step`. Every rank calls it (state may be sharded, a rollout under way); rank 0 writes."""
    waiting = loop.rollouts.settle()
    optimizer, roles = export_state(loop.learner.engine), roles_now(loop)
    if loop.session.is_main:
        state = _state(loop)

        def writer(folder: Path) -> None:
            write_roles(loop, roles, folder)
            atomic_save_tensors(folder / "optimizer.safetensors", optimizer)
            atomic_write_json(folder / "state.json", state)
            if waiting is not None:
                save_pending(waiting, folder)
            if loop.best_policy is not None:
                atomic_save_tensors(folder / BEST, loop.best_policy)

        keep = loop.config.save_total_limit
        protect = {loop.progress.best.step, *loop.setup.listed_saves}
        write_checkpoint(loop.setup.folder, step, writer, keep or 10**9, protect, loop.session.console.warn)
    loop.session.barrier()


@dataclass(frozen=True)
class Roles:
    """What was trained, whole and on the CPU. critic, head: None without a value model."""

    policy: dict[str, Tensor]
    value: dict[str, Tensor] | None
    head: Tensor | None


def roles_now(loop: PPOLoop) -> Roles:
    """The policy as it was published, the value model as it is. A collective under ZeRO-3: every rank calls it."""
    models, policy = loop.learner.models, loop.learner.published.tensors
    if "value" not in models.bindings:
        return Roles(policy, None, None)
    value = adapter_tensors(models.stack_of("value").peft, str(models.bindings["value"].adapter))
    weight = models.head_of("value").weight
    with gathered([weight]):
        return Roles(policy, value, weight.detach().to("cpu", torch.float32, copy=True))


def write_roles(loop: PPOLoop, roles: Roles, folder: Path) -> None:
    """The policy as a plain PEFT adapter in `adapter/`, the value model with its head in `value/`."""
    setup = loop.setup
    save_adapter(folder / "adapter", roles.policy, setup.policy_config, "CAUSAL_LM", None, setup.base_path)
    if roles.value is not None:
        save_adapter(folder / "value", roles.value, setup.value_config, "SEQ_CLS", roles.head, setup.value_base_path)


def restore(loop: PPOLoop) -> None:
    """Go on from the newest valid checkpoint; without one, from the start, with empty logs."""
    checkpoint, warnings = loop.setup.folder.newest_checkpoint()
    for line in warnings if loop.session.is_main else ():
        loop.session.console.warn(line)
    if checkpoint is None:
        _cut_logs(loop, 0, 0, 0)
        return
    state = json.loads((checkpoint.path / "state.json").read_text())
    run_entry.require_same_as_saved(checkpoint.path, state.get("config"), loop.config, MAY_CHANGE)
    _restore_roles(loop, checkpoint)
    restore_state(loop.learner.engine, load_file(checkpoint.path / "optimizer.safetensors"))
    loop.controller.load_state_dict(state["kl_controller"])
    loop.moments.load_state_dict(state["reward_moments"])
    loop.monitor.guards.load_state_dict(state.get("guards", {}))
    progress = loop.progress
    progress.step, progress.tokens, progress.seconds = state["step"], state["tokens"], state["seconds"]
    loop.saved_step = progress.step
    progress.best = Best(state["best"]["step"], float.fromhex(state["best"]["reward"]))
    if (checkpoint.path / BEST).is_file():
        loop.best_policy = load_file(checkpoint.path / BEST)
    progress.first, progress.last = state["first"], state["last"]
    loop.learner.version = state["adapter_version"]
    if loop.learner.publish().sha256 != state["adapter_sha256"]:
        raise ArtifactError.at(str(checkpoint.path), "the adapter restored is not the one that was saved")
    if state.get("rollout_waits"):
        loop.rollouts.pending = load_pending(checkpoint.path)
    _cut_logs(loop, progress.step, state["metrics_bytes"], state["samples_bytes"])
    if loop.session.is_main:
        loop.session.console.log(f"ppo: going on from step {progress.step} ({checkpoint.path})")
    warn_of_differences(state, loop.session, loop.setup.backbone)


def _cut_logs(loop: PPOLoop, step: int, metrics_bytes: int, samples_bytes: int) -> None:
    """Forget what was logged of steps after `step`, which will be taken again."""
    if loop.session.is_main:
        writers = loop.setup.writers
        for log, length in ((writers.metrics, metrics_bytes), (writers.samples, samples_bytes)):
            if lost := log.resume_at(length, step):
                loop.session.console.warn(lost)


def finish(loop: PPOLoop) -> Run:
    """Write the result: adapter/, summary, report; seal the manifest."""
    setup, config, progress = loop.setup, loop.config, loop.progress
    run = Run(
        stage="ppo",
        status="done",
        run_dir=str(setup.folder.path),
        steps=progress.step,
        seconds=progress.seconds,
        seed=config.seed,
        metrics=_summary_metrics(loop),
        artifacts={"adapter": str(setup.folder.adapter_dir), "report": str(setup.folder.path / "report.html")},
    )
    roles = roles_now(loop)
    if loop.session.is_main:
        write_roles(loop, roles, setup.folder.path)
        if loop.best_policy is not None:
            folder, base = setup.folder.adapter_dir, setup.base_path
            save_adapter(folder, loop.best_policy, setup.policy_config, "CAUSAL_LM", None, base)
        run.save()
        setup.folder.seal()
        write_report(setup.folder.path)
        loop.session.console.done()
    loop.session.barrier()
    return run


def _state(loop: PPOLoop) -> dict[str, Any]:
    progress, writers = loop.progress, loop.setup.writers
    return {
        "step": progress.step,
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        "best": {"step": progress.best.step, "reward": progress.best.reward.hex()},
        "first": progress.first,
        "last": progress.last,
        "kl_controller": loop.controller.state_dict(),
        "reward_moments": loop.moments.state_dict(),
        "guards": loop.monitor.guards.state_dict(),
        "adapter_version": loop.learner.published.version,
        "adapter_sha256": loop.learner.published.sha256,
        "rollout_waits": loop.rollouts.pending is not None,
        "metrics_bytes": writers.metrics.bytes,
        "samples_bytes": writers.samples.bytes,
        "config": to_dict(loop.config),
        "environment": environment(loop.session, loop.setup.backbone),
    }


def _restore_roles(loop: PPOLoop, checkpoint: Checkpoint) -> None:
    models = loop.learner.models
    policy = load_file(checkpoint.adapter_dir / "adapter_model.safetensors")
    load_adapter_tensors(models.stack_of("policy").peft, str(models.bindings["policy"].adapter), policy)
    if "value" in models.bindings:
        loop.setup.load_value(models, checkpoint.path / "value")


def _summary_metrics(loop: PPOLoop) -> dict[str, float]:
    """The last value of every metric, and where the telling ones started."""
    progress = loop.progress
    found = dict(progress.last)
    for name, value in progress.first.items():
        if name == "reward/mean" or (name.startswith("eval/reward") and not name.endswith("_se")):
            found[f"{name}_start"] = value
    if progress.best.step or progress.best.reward > -math.inf:
        found["best/step"], found["best/eval_reward"] = float(progress.best.step), progress.best.reward
    return found
