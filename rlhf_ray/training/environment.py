"""What bits depend on beside the job: with all of it equal a run goes on exactly, otherwise it says what is not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from rlhf_ray.models.backbone import Backbone
from rlhf_ray.runtime.session import Session
from rlhf_ray.storage.run_folder import versions


def environment(session: Session, backbone: Backbone) -> dict[str, Any]:
    """Of this rank, as a checkpoint stores it: flat, of plain JSON types."""
    return {
        "world size": session.world_size,
        "threads": session.num_threads,
        "device": device_name(session.device),
        "dtype": backbone.identity.precision,
        "attention": backbone.attn_implementation,
        **versions(),
    }


def device_name(device: torch.device) -> str:
    """The GPU's model; of a CPU the instructions that torch's kernels use, which its sums depend on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type


def not_exact(device: torch.device) -> str:
    """Why a run on this device does not repeat bit for bit; empty on the CPU, where it does."""
    if device.type != "cuda":
        return ""
    return "the backward pass of attention adds in no fixed order on a GPU"


def warn_of_differences(state: Mapping[str, Any], session: Session, backbone: Backbone) -> None:
    """One warning, of rank 0, if a run goes on elsewhere than where its checkpoint was written.

    state: of the checkpoint. An older one knows the number of ranks and threads alone."""
    saved = state.get("environment") or {
        "world size": state.get("world_size"),
        "threads": state.get("num_threads"),
    }
    now = environment(session, backbone)
    differ = [
        f"{name} {saved[name]} -> {now.get(name, 'none')}"
        for name in saved
        if saved[name] is not None and saved[name] != now.get(name)
    ] + [f"{name} none -> {now[name]}" for name in now if "environment" in state and name not in saved]
    if why := not_exact(session.device):
        differ.append(why)
    if differ and session.is_main:
        session.console.warn(f"resumes, not bit-exact: {', '.join(differ)}")
