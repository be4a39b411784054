"""What a checkpoint of an SFT, DPO or reward run holds, and how the run goes on from it.

Adapter with head, optimizer state by parameter name, Trainer's own account of step and epoch, first and last values of metrics, the
best evaluation (with its weights, where the job ends with them), what was summed up since the last logged step, the task's own
counts, updates left out, the length of metrics.jsonl, the configuration, and what bits depend on beside it. Row order and dropout
are functions of the step, the schedule of the updates made; the data's hashes are in the run's manifest.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers.trainer import TRAINER_STATE_NAME

from rlhf_ray.config.resolved import to_dict
from rlhf_ray.metrics import MetricsWriter
from rlhf_ray.models.adapters import HEAD_KEY, read_adapter
from rlhf_ray.roles.guards import Guards
from rlhf_ray.storage.checkpoints import delete_checkpoint
from rlhf_ray.storage.files import save_tensors, write_json
from rlhf_ray.storage.run_folder import write_checkpoint
from rlhf_ray.supervised.state import SupervisedState
from rlhf_ray.supervised.task import Job, Task
from rlhf_ray.supervised.trainer import OPTIMIZER_FILE, SupervisedTrainer
from rlhf_ray.training import run_entry
from rlhf_ray.training.environment import environment, warn_of_differences

STATE, BEST = "state.json", "best.safetensors"
KEEP_ALL = 10**9
MAY_CHANGE = (*run_entry.MAY_CHANGE, *run_entry.LENGTH, "logging_steps", "per_device_eval_batch_size")
"""Fields that may differ between the job that started a run and the one that goes on with it."""


def save(
    job: Job,
    trainer: SupervisedTrainer,
    state: SupervisedState,
    seconds: float,
    guards: Guards,
    writer: MetricsWriter | None,
) -> None:
    """Write a checkpoint of the step that was done last. Every rank calls it; rank 0, which has the writer, writes.

    seconds: of this run, all its starts together."""
    session, task = job.session, job.task
    windows = session.gather(trainer.window())
    if session.is_main:
        values = {
            **state.state_dict(),
            "seconds": seconds,
            "task": task.state_dict(),
            "windows": list(windows),
            "guards": guards.state_dict(),
            "skipped_updates": trainer.skipped,
            "metrics_bytes": writer.bytes if writer is not None else 0,
            "config": to_dict(job.config),
            "environment": environment(session, task.model.backbone),
        }

        def write(folder: Path) -> None:
            task.save(folder / "adapter", is_trained=state.step > trainer.skipped)
            save_tensors(folder / OPTIMIZER_FILE, trainer.optimizer_state())
            trainer.state.save_to_json(str(folder / TRAINER_STATE_NAME))
            if state.best is not None and state.best_step != state.step:
                tensors, head = state.best
                save_tensors(folder / BEST, tensors if head is None else {**tensors, HEAD_KEY: head})
            write_json(folder / STATE, values)

        keep = job.config.save_total_limit or KEEP_ALL
        write_checkpoint(job.folder, state.step, write, keep, {state.best_step}, session.console.warn)
    session.barrier()


def restore(
    job: Job, trainer: SupervisedTrainer, state: SupervisedState, guards: Guards, writer: MetricsWriter | None
) -> Path | None:
    """Resume from the newest valid checkpoint, and return its folder; without one, from the start, with an empty log."""
    session, task = job.session, job.task
    checkpoint, warnings = job.folder.newest_checkpoint()
    for line in warnings if session.is_main else ():
        session.console.warn(line)
    if checkpoint is not None and not (checkpoint.path / STATE).exists():
        session.barrier()
        _forget(job, checkpoint.path)
        checkpoint = None
    if checkpoint is None:
        if writer is not None:
            writer.resume_at(0, 0)
        return None
    values = json.loads((checkpoint.path / STATE).read_text())
    run_entry.require_same_as_saved(checkpoint.path, values.get("config"), job.config, MAY_CHANGE)
    files = read_adapter(checkpoint.adapter_dir)
    task.restore(files.tensors, files.head)
    task.load_state_dict(values["task"])
    guards.load_state_dict(values.get("guards", {}))
    trainer.skipped = values.get("skipped_updates", 0)
    state.load_state_dict(values)
    run_entry.require_steps_left(state.step, job.steps)
    if job.config.load_best_model_at_end and state.best_loss < math.inf:
        state.best = _best(task, checkpoint.path)
    state.window = _share(values["windows"], session.rank, session.world_size)
    if writer is not None and (lost := writer.resume_at(values["metrics_bytes"], state.step)):
        session.console.warn(lost)
    if session.is_main:
        session.console.log(f"{job.stage}: resuming from step {state.step} ({checkpoint.path})")
    warn_of_differences(values, session, task.model.backbone)
    return checkpoint.path


def _best(task: Task, checkpoint: Path) -> Any:
    if not (checkpoint / BEST).exists():  # this very step is the best one
        return task.tensors(), task.head()
    tensors = load_file(checkpoint / BEST)
    head = tensors.pop(HEAD_KEY, None)
    return tensors, head


def _share(windows: Sequence[Mapping[str, Any]], rank: int, world_size: int) -> dict[str, Any]:
    """This rank's sums since the last logged step. Among another number of ranks they are dealt out anew: the loss is logged as
    the mean over ranks, the rest as a sum."""
    if len(windows) == world_size:
        return dict(windows[rank])
    names = {name for window in windows for name in window["sums"]}
    total = {name: math.fsum(window["sums"].get(name, 0.0) for window in windows) for name in names}
    return {
        **windows[0],
        "loss": math.fsum(window["loss"] for window in windows) / len(windows),
        "sums": total if rank == 0 else dict.fromkeys(total, 0.0),
    }


def _forget(job: Job, checkpoint: Path) -> None:
    """Checkpoints of an older version hold the adapter alone."""
    if job.session.is_main:
        job.session.console.warn(
            f"{checkpoint} was written by a version whose checkpoints contain only the adapter; the run starts again from"
            " the beginning"
        )
        for found in job.folder.checkpoints():
            delete_checkpoint(found)
        shutil.rmtree(checkpoint.parent, ignore_errors=True)
    job.session.barrier()
