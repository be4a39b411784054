"""What a checkpoint of an SFT or reward run holds, and how the run goes on from it.

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
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file
from transformers.trainer import TRAINER_STATE_NAME

from rlhf_ray.config.resolved import to_dict
from rlhf_ray.models.adapters import HEAD_KEY, read_adapter
from rlhf_ray.storage.checkpoints import delete_checkpoint
from rlhf_ray.storage.run_folder import atomic_save_tensors, atomic_write_json, write_checkpoint
from rlhf_ray.supervised.trainer import OPTIMIZER_FILE
from rlhf_ray.training import run_entry
from rlhf_ray.training.environment import environment, warn_of_differences

if TYPE_CHECKING:
    from rlhf_ray.supervised.callback import RunCallback

STATE, BEST = "state.json", "best.safetensors"
KEEP_ALL = 10**9
MAY_CHANGE = (*run_entry.MAY_CHANGE, "logging_steps", "per_device_eval_batch_size")
"""Fields that may differ between the job that started a run and the one that goes on with it."""


def save(callback: RunCallback) -> None:
    """Write a checkpoint of the step that was done last. Every rank calls it; rank 0 writes."""
    windows = callback.session.gather(callback.trainer.window())
    if callback.session.is_main:
        progress = callback.progress

        def writer(folder: Path) -> None:
            callback.task.save(folder / "adapter", is_trained=progress.step > callback.trainer.skipped)
            atomic_save_tensors(folder / OPTIMIZER_FILE, callback.trainer.optimizer_state())
            callback.trainer.state.save_to_json(str(folder / TRAINER_STATE_NAME))
            if progress.best is not None and progress.best_step != progress.step:
                tensors, head = progress.best
                atomic_save_tensors(folder / BEST, tensors if head is None else {**tensors, HEAD_KEY: head})
            atomic_write_json(folder / STATE, _state(callback, windows))

        keep = callback.config.save_total_limit or KEEP_ALL
        warn = callback.session.console.warn
        write_checkpoint(callback.job.folder, progress.step, writer, keep, {progress.best_step}, warn)
    callback.session.barrier()


def _state(callback: RunCallback, windows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    progress = callback.progress
    return {
        "step": progress.step,
        "seconds": callback.seconds,
        "first": progress.first,
        "last": progress.last,
        "best": {"step": progress.best_step, "loss": progress.best_loss.hex()},
        "task": callback.task.state_dict(),
        "windows": list(windows),
        "guards": callback.monitor.guards.state_dict(),
        "skipped_updates": callback.trainer.skipped,
        "metrics_bytes": callback.writer.bytes if callback.writer is not None else 0,
        "config": to_dict(callback.config),
        "environment": environment(callback.session, callback.task.model.backbone),
    }


def restore(callback: RunCallback) -> Path | None:
    """Go on from the newest valid checkpoint, and return its folder; without one, from the start, with an empty log."""
    session, folder = callback.session, callback.job.folder
    checkpoint, warnings = folder.newest_checkpoint()
    for line in warnings if session.is_main else ():
        session.console.warn(line)
    if checkpoint is not None and not (checkpoint.path / STATE).exists():
        session.barrier()
        _forget(callback, checkpoint.path)
        checkpoint = None
    if checkpoint is None:
        if callback.writer is not None:
            callback.writer.resume_at(0, 0)
        return None
    state = json.loads((checkpoint.path / STATE).read_text())
    run_entry.require_same_as_saved(checkpoint.path, state.get("config"), callback.config, MAY_CHANGE)
    files = read_adapter(checkpoint.adapter_dir)
    callback.task.restore(files.tensors, files.head)
    callback.task.load_state_dict(state["task"])
    callback.monitor.guards.load_state_dict(state.get("guards", {}))
    callback.trainer.skipped = state.get("skipped_updates", 0)
    progress = callback.progress
    progress.step, progress.seconds = state["step"], state["seconds"]
    progress.first, progress.last = state["first"], state["last"]
    progress.best_step, progress.best_loss = state["best"]["step"], float.fromhex(state["best"]["loss"])
    if callback.config.load_best_model_at_end and progress.best_loss < math.inf:
        progress.best = _best(callback, checkpoint.path)
    callback.window = _share(state["windows"], session.rank, session.world_size)
    if callback.writer is not None and (lost := callback.writer.resume_at(state["metrics_bytes"], progress.step)):
        session.console.warn(lost)
    if session.is_main:
        session.console.log(f"{callback.job.stage}: resuming from step {progress.step} ({checkpoint.path})")
    warn_of_differences(state, session, callback.task.model.backbone)
    return checkpoint.path


def _best(callback: RunCallback, checkpoint: Path) -> Any:
    if not (checkpoint / BEST).exists():  # this very step is the best one
        return callback.task.tensors(), callback.task.head()
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


def _forget(callback: RunCallback, checkpoint: Path) -> None:
    """Checkpoints of an older version hold the adapter alone."""
    if callback.session.is_main:
        callback.session.console.warn(
            f"{checkpoint} was written by a version whose checkpoints contain only the adapter; the run starts again from"
            " the beginning"
        )
        for found in callback.job.folder.checkpoints():
            delete_checkpoint(found)
        shutil.rmtree(checkpoint.parent, ignore_errors=True)
    callback.session.barrier()
