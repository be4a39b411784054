"""This machine: Python and packages, GPUs, memory and disk, the optional kernels, the token's file."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_ray.doctor.checks import CheckResult, gib, room
from rlhf_ray.errors import ResourceError
from rlhf_ray.launch.ray_cluster import check_socket_paths
from rlhf_ray.plan.memory import GIB
from rlhf_ray.submit import probe
from rlhf_ray.submit.client import TOKEN_FILE

HERE = "this machine"
PYTHONS = ((3, 11), (3, 12))


def machine() -> Iterator[CheckResult]:
    yield from _python()
    yield from _gpus()
    yield from _room()
    yield _ray_folder()
    yield _flash_attention()
    yield bitsandbytes()
    yield from _token()


def _python() -> Iterator[CheckResult]:
    fits = sys.version_info[:2] in PYTHONS
    yield CheckResult(HERE, "python", "ok" if fits else "fail", platform.python_version(), "use Python 3.11 or 3.12")
    wrong, right = [], []
    for name, wanted in _required():
        have = _version(name)
        if have is None or not wanted.contains(have, prereleases=True):
            wrong.append(f"{name} {have or 'is missing'} (needs {wanted or 'any'})")
        else:
            right.append(f"{name} {have}")
    if wrong:
        yield CheckResult(HERE, "packages", "fail", ", ".join(wrong), "pip install -c constraints.txt -e .")
    else:
        yield CheckResult(HERE, "packages", "ok", ", ".join(right) or "unknown: rlhf_ray is not installed")


def _required() -> list[tuple[str, Any]]:
    """Name and versions of what this package needs, extras aside."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires("rlhf_ray") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    parsed = [Requirement(line) for line in lines]
    return [(r.name, r.specifier) for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> Iterator[CheckResult]:
    import torch

    cards = probe.gpus()
    build = f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    if not torch.cuda.is_available():
        if cards:
            names = ", ".join(card["name"] for card in cards)
            fix = "install torch from PyTorch's CUDA index, with a driver that is new enough"
            yield CheckResult(HERE, "GPU", "fail", f"{names} is there, and {build} cannot use it", fix)
        else:
            yield CheckResult(HERE, "GPU", "ok", f"none; {build}")
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        told = f"{name}, {gib(free)} of {gib(total)} free; {build}"
        fix = "another process holds its memory: nvidia-smi"
        yield CheckResult(HERE, f"GPU {index}", "ok" if free > 0.8 * total else "warn", told, fix)


def _room() -> Iterator[CheckResult]:
    yield room(
        HERE, "memory", probe.memory()[1], 1.5 * GIB, 4 * GIB, "end other programs; the libraries alone take 0.6 GiB"
    )
    disk = shutil.disk_usage(os.getcwd()).free
    yield room(HERE, "disk", disk, 0.5 * GIB, 5 * GIB, "free some space, or work on another disk")
    if os.path.isdir("/dev/shm"):
        shared = shutil.disk_usage("/dev/shm").free
        fix = "Ray keeps objects there; in a container: --shm-size=2g"
        yield room(HERE, "shared memory", shared, 0.05 * GIB, 1 * GIB, fix)


def _ray_folder() -> CheckResult:
    try:
        check_socket_paths()
    except ResourceError as error:
        problem = error.problems[0]
        return CheckResult(HERE, problem.where, "fail", f"{problem.what} ({problem.expected})", problem.fix)
    return CheckResult(HERE, "Ray's folder", "ok", os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")


def _flash_attention() -> CheckResult:
    name = "flash-attn"
    if importlib.util.find_spec("flash_attn") is None:
        return CheckResult(HERE, name, "ok", "not installed; sdpa is used instead")
    import torch

    if not torch.cuda.is_available():
        return CheckResult(HERE, name, "ok", "installed, but there is no GPU to use it on")
    try:
        from flash_attn import flash_attn_func

        q = torch.randn(1, 8, 2, 64, device="cuda", dtype=torch.bfloat16)
        told = flash_attn_func(q, q, q, causal=True)
        usable = bool(torch.isfinite(told).all())
    except Exception as error:
        told, usable = f"{type(error).__name__}: {error}", False
    if usable:
        return CheckResult(HERE, name, "ok", f"{_version('flash-attn')} works")
    return CheckResult(
        HERE, name, "warn", f"does not work: {told}", "reinstall it for this torch, or attn_implementation: sdpa"
    )


def bitsandbytes() -> CheckResult:
    """Whether 4-bit weights can be made and read back."""
    name = "bitsandbytes"
    if importlib.util.find_spec(name) is None:
        return CheckResult(HERE, name, "ok", "not installed; load_in_4bit and load_in_8bit need it")
    logging.getLogger(name).setLevel(logging.ERROR)  # optional kernels that it did not find
    try:
        import torch
        from bitsandbytes import functional

        device = "cuda" if torch.cuda.is_available() else "cpu"
        weights = torch.linspace(-1, 1, 64 * 64, device=device).reshape(64, 64)
        packed, state = functional.quantize_4bit(weights, quant_type="nf4")
        error = float((functional.dequantize_4bit(packed, state) - weights).abs().max())
        if error > 0.2:
            raise RuntimeError(f"4-bit weights come back {error:.2f} off")
    except Exception as error:
        told = f"does not work: {type(error).__name__}: {error}"
        return CheckResult(HERE, name, "warn", told[:300], "reinstall it for this torch and GPU")
    return CheckResult(HERE, name, "ok", f"{_version(name)} works on the {device}")


def _token() -> Iterator[CheckResult]:
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or TOKEN_FILE).expanduser()
    if not path.is_file():
        return
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        yield CheckResult(
            HERE, "token file", "warn", f"{path} can be read by others (mode {mode:o})", f"chmod 600 {path}"
        )
    else:
        yield CheckResult(HERE, "token file", "ok", f"{path}, for its owner alone")
