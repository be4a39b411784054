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
from rlhf_ray.models.artifact import atomic_save_tensors, atomic_write_json, write_checkpoint
from rlhf_ray.models.checkpoints import delete_checkpoint
from rlhf_ray.stages import entering
from rlhf_ray.stages.exactness import environment, tell_differences
from rlhf_ray.stages.trainer import OPTIMIZER_FILE

if TYPE_CHECKING:
    from rlhf_ray.stages.keeper import Keeper

STATE, BEST = "state.json", "best.safetensors"
KEEP_ALL = 10**9
MAY_CHANGE = (*entering.MAY_CHANGE, "logging_steps", "per_device_eval_batch_size")
"""Fields that may differ between the job that started a run and the one that goes on with it."""


def save(keeper: Keeper) -> None:
    """Write a checkpoint of the step that was done last. Every rank calls it; rank 0 writes."""
    windows = keeper.session.gather(keeper.trainer.window())
    if keeper.session.is_main:
        progress = keeper.progress

        def writer(folder: Path) -> None:
            keeper.task.save(folder / "adapter", is_trained=progress.step > keeper.trainer.skipped)
            atomic_save_tensors(folder / OPTIMIZER_FILE, keeper.trainer.optimizer_state())
            keeper.trainer.state.save_to_json(str(folder / TRAINER_STATE_NAME))
            if progress.best is not None and progress.best_step != progress.step:
                tensors, head = progress.best
                atomic_save_tensors(folder / BEST, tensors if head is None else {**tensors, HEAD_KEY: head})
            atomic_write_json(folder / STATE, _state(keeper, windows))

        keep = keeper.config.save_total_limit or KEEP_ALL
        warn = keeper.session.console.warn
        write_checkpoint(keeper.job.folder, progress.step, writer, keep, {progress.best_step}, warn)
    keeper.session.barrier()


def _state(keeper: Keeper, windows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    progress = keeper.progress
    return {
        "step": progress.step,
        "seconds": keeper.seconds,
        "first": progress.first,
        "last": progress.last,
        "best": {"step": progress.best_step, "loss": progress.best_loss.hex()},
        "task": keeper.task.state_dict(),
        "windows": list(windows),
        "guards": keeper.oversight.guards.state_dict(),
        "skipped_updates": keeper.trainer.skipped,
        "metrics_bytes": keeper.writer.bytes if keeper.writer is not None else 0,
        "config": to_dict(keeper.config),
        "environment": environment(keeper.session, keeper.task.model.backbone),
    }


def restore(keeper: Keeper) -> Path | None:
    """Go on from the newest valid checkpoint, and return its folder; without one, from the start, with an empty log."""
    session, folder = keeper.session, keeper.job.folder
    checkpoint, warnings = folder.newest_checkpoint()
    for line in warnings if session.is_main else ():
        session.console.warn(line)
    if checkpoint is not None and not (checkpoint.path / STATE).exists():
        session.barrier()
        _forget(keeper, checkpoint.path)
        checkpoint = None
    if checkpoint is None:
        if keeper.writer is not None:
            keeper.writer.resume_at(0, 0)
        return None
    state = json.loads((checkpoint.path / STATE).read_text())
    entering.require_same_as_saved(checkpoint.path, state.get("config"), keeper.config, MAY_CHANGE)
    files = read_adapter(checkpoint.adapter_dir)
    keeper.task.restore(files.tensors, files.head)
    keeper.task.load_state_dict(state["task"])
    keeper.oversight.guards.load_state_dict(state.get("guards", {}))
    keeper.trainer.skipped = state.get("skipped_updates", 0)
    progress = keeper.progress
    progress.step, progress.seconds = state["step"], state["seconds"]
    progress.first, progress.last = state["first"], state["last"]
    progress.best_step, progress.best_loss = state["best"]["step"], float.fromhex(state["best"]["loss"])
    if keeper.config.load_best_model_at_end and progress.best_loss < math.inf:
        progress.best = _best(keeper, checkpoint.path)
    keeper.window = _share(state["windows"], session.rank, session.world_size)
    if keeper.writer is not None and (lost := keeper.writer.resume_at(state["metrics_bytes"], progress.step)):
        session.console.warn(lost)
    if session.is_main:
        session.console.log(f"{keeper.job.stage}: going on from step {progress.step} ({checkpoint.path})")
    tell_differences(state, session, keeper.task.model.backbone)
    return checkpoint.path


def _best(keeper: Keeper, checkpoint: Path) -> Any:
    if not (checkpoint / BEST).exists():  # this very step is the best one
        return keeper.task.tensors(), keeper.task.head()
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


def _forget(keeper: Keeper, checkpoint: Path) -> None:
    """Checkpoints of an older version hold the adapter alone."""
    if keeper.session.is_main:
        keeper.session.console.warn(
            f"{checkpoint} is of a version whose checkpoints hold the adapter alone; the run starts again from the beginning"
        )
        for found in keeper.job.folder.checkpoints():
            delete_checkpoint(found)
        shutil.rmtree(checkpoint.parent, ignore_errors=True)
    keeper.session.barrier()
