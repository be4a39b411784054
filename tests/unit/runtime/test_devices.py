"""Which device a process computes on, what CUDA is told before it is used, what ran out of memory, what is left of a stage."""

from __future__ import annotations

import errno
import gc
import os
import sys
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.exceptions import RayError, RayTaskError

from rlhf_ray.errors import Interrupted, ResourceError
from rlhf_ray.roles.actor_pool import ActorHandles, ActorPool
from rlhf_ray.runtime import devices

SAID = (
    "CUDA out of memory. Tried to allocate 1.96 GiB. GPU 0 has a total capacity of 79.25 GiB of which 1.12 GiB is free. Process 7"
    " has 78.12 GiB memory in use. See documentation for Memory Management (https://pytorch.org/docs)"
)


def on_ray(monkeypatch: pytest.MonkeyPatch, gpus: list[str] | None, driver: bool = False) -> None:
    """In a process of Ray's that has these GPUs; None: where Ray has not been imported."""
    if gpus is None:
        monkeypatch.setitem(sys.modules, "ray", None)
        return
    context = SimpleNamespace(
        get_actor_id=lambda: None if driver else "ab",
        get_task_id=lambda: None,
        get_accelerator_ids=lambda: {"GPU": gpus},
    )
    module = SimpleNamespace(is_initialized=lambda: True, get_runtime_context=lambda: context)
    monkeypatch.setitem(sys.modules, "ray", module)


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """torch sees four GPUs; the devices that were made the current one."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in ("CUDA_VISIBLE_DEVICES", devices.ALLOCATOR, "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    return chosen


@pytest.mark.parametrize(
    ("gpus", "driver", "visible", "expected"),
    [
        ([], False, None, "cpu"),  # Ray 2.60 hides no GPU from a process that asked for none
        (["2"], False, None, "cuda:2"),
        (["2"], False, "2", "cuda:0"),
        (["2", "3"], False, "0,1,2,3", "cuda:2"),  # of two whole GPUs each, as Ray Train shows them to rank 1
        (["GPU-b"], False, "GPU-a,GPU-b", "cuda:1"),
        (["0"], True, None, "cuda:0"),  # a driver has what there is
        (None, False, None, "cuda:0"),  # without Ray
    ],
)
def test_cuda_only_where_ray_gave_it(
    monkeypatch: pytest.MonkeyPatch,
    four_gpus: list[torch.device],
    gpus: list[str] | None,
    driver: bool,
    visible: str | None,
    expected: str,
) -> None:
    on_ray(monkeypatch, gpus, driver)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert str(devices.own_device()) == expected
    assert four_gpus == ([] if expected == "cpu" else [torch.device(expected)])


def test_a_gpu_that_is_only_declared_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_ray(monkeypatch, ["0"])
    assert devices.own_device() == torch.device("cpu")


def test_what_every_process_sets(monkeypatch: pytest.MonkeyPatch, four_gpus: list[torch.device]) -> None:
    """cuDNN's attention is off; the allocator's segments grow, unless the user has chosen otherwise."""
    on_ray(monkeypatch, None)
    torch.backends.cuda.enable_cudnn_sdp(True)
    devices.own_device()
    assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()
    assert os.environ[devices.ALLOCATOR] == "expandable_segments:True"
    for name in (devices.ALLOCATOR, "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(devices.ALLOCATOR, raising=False)
        monkeypatch.setenv(name, "max_split_size_mb:64")
        devices.own_device()
        assert os.environ.get(devices.ALLOCATOR, "max_split_size_mb:64") == "max_split_size_mb:64"


def test_a_process_alone_has_nccl_for_its_gpu_and_gloo_for_the_rest() -> None:
    assert devices.group_backend(torch.device("cuda", 1)) == "cpu:gloo,cuda:nccl"
    assert devices.group_backend(torch.device("cpu")) == "gloo"


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError(SAID), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ResourceError.at("base", "does not fit into GPU memory: CUDA out of memory"), False),  # told already
    ],
)
def test_what_says_that_memory_ran_out(error: Exception, is_memory: bool) -> None:
    assert devices.gpu_memory_ran_out(error) is is_memory


def test_an_actor_whose_gpu_is_full_is_no_bug() -> None:
    """Ray wraps what a role raised: the cause counts. Exit 75 with advice, since the run goes on with smaller settings."""
    handles = ActorHandles({"generator": (None,)}, None, {"generator": 1.0}, "rlhf-ray resume runs/x")
    pool = ActorPool("generator", handles, print, print)
    error = pool.raised(
        0, RayTaskError("call", "Traceback", torch.OutOfMemoryError(SAID)), "sampling chunk 3 of step 7"
    )
    assert isinstance(error, Interrupted) and error.exit_code == 75
    (line,) = error.lines()
    assert line.startswith(
        "error: generator 0: CUDA out of memory. Tried to allocate 1.96 GiB, while sampling chunk 3 of step 7; fix: see what"
    )
    assert "sampler_rows" in line and line.endswith("rlhf-ray resume runs/x")


def test_what_a_role_raised_comes_as_it_was_raised() -> None:
    """Ray's own class of it hid the errno of a full disk, and looked like a process that is gone."""
    pool = ActorPool("scorer", ActorHandles({"scorer": (None,)}, None, {"scorer": 1.0}, ""), print, print)
    for cause in (KeyError("x"), OSError(errno.ENOSPC, "No space left on device")):
        error = pool.raised(0, RayTaskError("call", "Traceback", cause).as_instanceof_cause(), "scoring chunk 1")
        assert type(error) is type(cause) and error.args == cause.args
        assert error.__notes__ == ["in scorer 0, while scoring chunk 1"]
    other = RayTaskError("call", "Traceback", RayError("cannot be sent"))
    assert pool.raised(0, other, "scoring") is other


class Model:
    """In a cycle, as DeepSpeed's engines are."""

    def __init__(self) -> None:
        self.me = self


def test_a_stage_leaves_nothing_behind() -> None:
    def stage() -> weakref.ref[Any]:
        return weakref.ref(Model())

    gc.disable()
    try:
        with devices.memory_released():
            seen = stage()
            assert seen() is not None
        assert seen() is None
    finally:
        gc.enable()


def test_nor_does_a_stage_that_failed_while_its_error_is_on_its_way() -> None:
    seen: list[weakref.ref[Any]] = []

    def load() -> None:
        model = Model()
        seen.append(weakref.ref(model))
        try:
            raise KeyError(model.me is model)
        except KeyError as error:
            raise ValueError("in a stage") from error

    with pytest.raises(ValueError, match="in a stage") as caught, devices.memory_released():
        load()
    assert caught.value.__traceback__ is not None and seen[0]() is None
