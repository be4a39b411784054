"""What a PPO run keeps on disk: its folder, its checkpoints, its result. The loop does not know files.

A checkpoint is taken at one point only, the end of a step: adapters, head, optimizer state by parameter name, `PPOState`, the
reference if it was reset (ref_model_sync_steps), the rollout that waits for the next step if there is one, the lengths of
metrics.jsonl and samples.jsonl, the configuration, and what bits depend on beside it. Sampling and schedules have no state
(maths/rng.py).
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

from safetensors.torch import load_file

from rlhf_ray.config import PPOConfig, RolloutConfig
from rlhf_ray.config.resolved import to_dict
from rlhf_ray.errors import ArtifactError
from rlhf_ray.models.adapters import HEAD_KEY, save_adapter
from rlhf_ray.ppo.pending_rollout import load_pending, save_pending
from rlhf_ray.ppo.setup import PPOSetup
from rlhf_ray.ppo.state import PPOState
from rlhf_ray.roles.learner import PublishedAdapter
from rlhf_ray.roles.rollouts import Sampled
from rlhf_ray.roles.trained_weights import TrainedWeights
from rlhf_ray.runtime.session import Session
from rlhf_ray.storage.files import save_tensors, write_json
from rlhf_ray.storage.run import Run
from rlhf_ray.storage.run_folder import RunFolder, sha256_tensors, write_checkpoint
from rlhf_ray.training import run_entry
from rlhf_ray.training.environment import environment, warn_of_differences

BEST = "best.safetensors"
REFERENCE = "reference.safetensors"
MAY_CHANGE = (
    *run_entry.MAY_CHANGE,
    *run_entry.LENGTH,
    *("placement", "generator.", "scorer.", "probe_steps"),
    *(f"rollout.{name}" for name in RolloutConfig.model_fields if name != "engine"),
    *("max_kl", "max_clip_fraction", "min_finished", "over_optimisation_patience", "alarm.", "allow_chance_rewards"),
)
"""Fields that may differ between the job that started a run and the one that resumes it."""


def enter_run(config: PPOConfig, session: Session, held: ExitStack) -> RunFolder:
    """Make or find the run folder, locked for as long as `held` lasts; see `run_entry.enter_run`."""
    return run_entry.enter_run(config, session, held, "ppo", MAY_CHANGE)


def save(config: PPOConfig, session: Session, setup: PPOSetup, state: PPOState, pending: Sampled | None) -> None:
    """Write checkpoint `state.step`. Every rank calls it (weights may be sharded); rank 0 writes.

    pending: the rollout that has arrived before its step (max_staleness 1)."""
    optimizer, weights = setup.learner.optimizer_state(), setup.learner.weights()
    if session.is_main:
        values = {
            **state.state_dict(),
            "adapter_version": setup.learner.published.version,
            "adapter_sha256": setup.learner.published.sha256,
            "reference_version": None if state.reference is None else state.reference.version,
            "reference_sha256": None if state.reference is None else state.reference.sha256,
            "rollout_waits": pending is not None,
            "metrics_bytes": setup.writers.metrics.bytes,
            "samples_bytes": setup.writers.samples.bytes,
            "config": to_dict(config),
            "environment": environment(session, setup.backbone),
        }

        def writer(folder: Path) -> None:
            write_weights(setup, weights, folder, flush=False)
            save_tensors(folder / "optimizer.safetensors", optimizer)
            write_json(folder / "state.json", values)
            if pending is not None:
                save_pending(pending, folder)
            if state.best_policy is not None:
                save_tensors(folder / BEST, state.best_policy)
            if state.reference is not None:
                save_tensors(folder / REFERENCE, state.reference.tensors)

        keep = config.save_total_limit
        protect = {state.best.step, *setup.listed_saves}
        write_checkpoint(setup.folder, state.step, writer, keep or 10**9, protect, session.console.warn)
    session.barrier()


def write_weights(setup: PPOSetup, weights: TrainedWeights, folder: Path, flush: bool = True) -> None:
    """The policy as a plain PEFT adapter in `adapter/`, the value model with its head in `value/`. flush: see `save_adapter`."""
    policy = weights.policy, setup.policy_config
    save_adapter(folder / "adapter", *policy, "CAUSAL_LM", None, setup.base_path, flush=flush)
    if weights.value is not None:
        value = weights.value, setup.value_config
        save_adapter(folder / "value", *value, "SEQ_CLS", weights.head, setup.value_base_path, flush=flush)


def read_weights(folder: Path, has_value: bool) -> TrainedWeights:
    """What `write_weights` wrote."""
    policy = load_file(folder / "adapter" / "adapter_model.safetensors")
    if not has_value:
        return TrainedWeights(policy)
    value = load_file(folder / "value" / "adapter_model.safetensors")
    head = value.pop(HEAD_KEY)
    return TrainedWeights(policy, value, head)


def restore(config: PPOConfig, session: Session, setup: PPOSetup, state: PPOState) -> Sampled | None:
    """Resume from the newest valid checkpoint; without one, from the start, with empty logs. Returns the pending rollout, if
    any."""
    checkpoint, warnings = setup.folder.newest_checkpoint()
    for line in warnings if session.is_main else ():
        session.console.warn(line)
    if checkpoint is None:
        _cut_logs(session, setup, 0, 0, 0)
        return None
    values = json.loads((checkpoint.path / "state.json").read_text())
    run_entry.require_same_as_saved(checkpoint.path, values.get("config"), config, MAY_CHANGE)
    state.load_state_dict(values)
    run_entry.require_steps_left(state.step, setup.total_steps)
    if (checkpoint.path / BEST).is_file():
        state.best_policy = load_file(checkpoint.path / BEST)
    if values.get("reference_version") is not None:
        state.reference = _read_reference(checkpoint.path, values["reference_version"], values["reference_sha256"])
    weights = read_weights(checkpoint.path, has_value=bool(setup.value_config))
    optimizer = load_file(checkpoint.path / "optimizer.safetensors")
    setup.learner.restore(weights, optimizer, values["adapter_version"])
    if setup.learner.published.sha256 != values["adapter_sha256"]:
        raise ArtifactError.at(str(checkpoint.path), "the adapter restored is not the one that was saved")
    pending = load_pending(checkpoint.path) if values.get("rollout_waits") else None
    _cut_logs(session, setup, state.step, values["metrics_bytes"], values["samples_bytes"])
    if session.is_main:
        session.console.log(f"ppo: resuming from step {state.step} ({checkpoint.path})")
    warn_of_differences(values, session, setup.backbone)
    return pending


def _read_reference(folder: Path, version: int, sha256: str) -> PublishedAdapter:
    tensors = load_file(folder / REFERENCE)
    if (found := sha256_tensors(tensors)) != sha256:
        raise ArtifactError.at(str(folder / REFERENCE), "is not the reference that was saved", sha256, found)
    return PublishedAdapter(version, sha256, tensors)


def _cut_logs(session: Session, setup: PPOSetup, step: int, metrics_bytes: int, samples_bytes: int) -> None:
    """Forget what was logged of steps after `step`, which will be taken again."""
    if session.is_main:
        for log, length in ((setup.writers.metrics, metrics_bytes), (setup.writers.samples, samples_bytes)):
            if lost := log.resume_at(length, step):
                session.console.warn(lost)


def finish(config: PPOConfig, session: Session, setup: PPOSetup, state: PPOState) -> Run:
    """Write the result: adapter/, summary, report; seal the manifest."""
    folder = setup.folder
    run = Run(
        stage="ppo",
        status="done",
        run_dir=str(folder.path),
        steps=state.step,
        seconds=state.seconds,
        seed=config.seed,
        metrics=state.summary(),
        artifacts={"adapter": str(folder.adapter_dir), "report": str(folder.path / "report.html")},
    )
    weights = setup.learner.weights()
    if session.is_main:
        write_weights(setup, weights, folder.path)
        if state.best_policy is not None:
            save_adapter(folder.adapter_dir, state.best_policy, setup.policy_config, "CAUSAL_LM", None, setup.base_path)
        run_entry.finish_run(folder, run)
        session.console.done()
    session.barrier()
    return run
