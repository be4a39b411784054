"""The device that this process computes on, what CUDA needs before it is used, and giving memory back.

A process that Ray started has the GPUs that Ray gave it, and no others: a role that asked for none stays on the CPU, also where it
could see a GPU (Ray 2.60 hides none from a process that asked for none). Any other process, which runs a job without Ray, takes the
first GPU there is.
"""

from __future__ import annotations

import gc
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rlhf_ray.errors import RlhfRayError

if TYPE_CHECKING:
    import torch

ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
"""Torch's settings of its CUDA allocator, read when CUDA is first used. Newer versions also know it as PYTORCH_ALLOC_CONF."""


def free_memory() -> int:
    """Bytes of the host's memory that are free; in a container no more than its limit leaves, by Ray's own figures."""
    import psutil
    from ray._private.utils import estimate_available_memory  # psutil knows of the whole machine alone

    return min(int(psutil.virtual_memory().available), int(estimate_available_memory()))


def own_device() -> torch.device:
    """Where this process computes: the first of the GPUs that Ray gave it; the first GPU there is in a process that Ray did not
    start; else the CPU. Ray may declare GPUs that torch does not see, so torch is asked too. CUDA is prepared for use."""
    import torch

    given = assigned_gpus()
    if given == () or not torch.cuda.is_available():
        device = torch.device("cpu")
    else:
        device = torch.device("cuda", 0 if given is None else _place(given[0], torch.cuda.device_count()))
    prepare(device)
    return device


def assigned_gpus() -> tuple[str, ...] | None:
    """The GPUs that Ray gave this process, perhaps none; None where Ray did not start it. Imports nothing."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    if context.get_actor_id() is None and context.get_task_id() is None:  # a driver
        return None
    return tuple(str(gpu) for gpu in context.get_accelerator_ids().get("GPU", ()))


def _place(gpu: str, count: int) -> int:
    """torch's number of Ray's GPU `gpu`: Ray Train shows every worker the GPUs of all workers of its node."""
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    place = visible.index(gpu) if gpu in visible else int(gpu) if gpu.isdigit() else 0
    return place if place < count else 0


def prepare(device: torch.device) -> None:
    """What every process sets before it uses CUDA; harmless on the CPU.

    cuDNN's attention is off: it plans anew for every length of keys, which in decoding grows with every token, and its backward
    pass has given NaN under a mask (pytorch/pytorch#196678). Segments of the allocator grow, so that buffers of many lengths do
    not leave it in pieces; whoever sets PYTORCH_CUDA_ALLOC_CONF chooses for himself."""
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)
    if device.type != "cuda":
        return
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault(ALLOCATOR, "expandable_segments:True")
    torch.cuda.set_device(device)


def group_backend(device: torch.device) -> str:
    """Of the process group of a process alone: NCCL for tensors on a GPU, which gloo would copy through the host's memory."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def free_cached_memory(device: torch.device) -> None:
    """Give memory that torch keeps for later back to a GPU that other processes share."""
    import torch

    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def memory_released() -> Iterator[None]:
    """What a stage loads and leaves inside this is freed when it ends, also with an error: models are parts of cycles (DeepSpeed's
    engine and its hooks) that only the garbage collector ends, torch keeps what they held on a GPU, and the traceback of an error
    holds the local variables of every function that it came through."""
    import torch

    try:
        yield
    except BaseException as error:
        _forget_locals(error)
        raise
    finally:
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def _forget_locals(error: BaseException | None) -> None:
    """Clear the local variables of the functions that have ended with `error`, or with what it came from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


LESS_GPU_MEMORY = (
    "see what takes it: rlhf-ray plan; lower per_device_train_batch_size (updates) or sampler_rows (sampling), set"
    " gradient_checkpointing, or load the base in 4 bits"
)
OUT_OF_MEMORY = ("CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""How torch and CUDA's libraries say that a GPU's memory ran out."""


def gpu_memory_ran_out(error: BaseException) -> bool:
    """Whether `error` says that the memory of a GPU ran out."""
    import torch

    if isinstance(error, RlhfRayError):
        return False
    said = isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)
    return isinstance(error, torch.OutOfMemoryError) or said


def first_sentence(error: BaseException) -> str:
    """Of an error of CUDA's: how much was asked for, without the advice that follows."""
    lines: Sequence[str] = str(error).strip().splitlines() or [type(error).__name__]
    return ". ".join(lines[0].split(". ")[:2]).rstrip(".")
