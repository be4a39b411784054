"""`plan` of a service: the memory of one replica at its limits: `max_batch_rows` responses, `max_loaded_adapters` adapters."""

from __future__ import annotations

import sys
from typing import Any, Literal

from rlhf_ray.config import EvaluateConfig, LoraConfig, PPOConfig
from rlhf_ray.config.serve import ServeConfig
from rlhf_ray.errors import ResourceError
from rlhf_ray.launch.preflight import check
from rlhf_ray.launch.ray_cluster import at_hand
from rlhf_ray.launch.resources import ResourceRequest
from rlhf_ray.plan.advice import option
from rlhf_ray.plan.estimate import Estimator
from rlhf_ray.plan.job_plan import Plan, StagePlan, room_here
from rlhf_ray.plan.memory import GIB, Phases, Process
from rlhf_ray.plan.meta_tracker import Device

ASSUMED = LoraConfig()
"""The size that adapters are assumed to have: rank 16 on all linear layers."""


def plan_service(
    config: ServeConfig,
    device: Literal["auto", "cuda", "cpu"] = "auto",
    gpu_gib: float | None = None,
    prompt_tokens: int | None = None,
) -> Plan:
    """See `plan.job_plan.plan`."""
    import torch

    num_gpus = config.replicas.num_gpus
    on_gpu = torch.cuda.is_available() if num_gpus is None else num_gpus > 0
    chosen: Device = ("cuda" if on_gpu else "cpu") if device == "auto" else device
    limits = config.limits
    prompt = prompt_tokens or max(limits.cached_tokens // limits.max_batch_rows - limits.max_tokens, 1)
    estimator = Estimator(chosen, prompt=prompt)
    rows, copies = config.limits.max_batch_rows, config.replicas.max_replicas or config.replicas.min_replicas
    evaluation = EvaluateConfig(
        **_base_fields(config),
        policies=[{"name": "base", "policy": "base"}],  # type: ignore[arg-type]
        response_length=config.limits.max_tokens,
        rollout_chunk_size=rows,
        sampler_rows=rows,
        per_device_eval_batch_size=1,
    )
    (found,) = estimator.processes(evaluation)
    adapter = _adapter_bytes(config, estimator)
    adapters = min(adapter * limits.max_loaded_adapters, limits.max_adapter_bytes or sys.maxsize)
    phases: Phases = {name: dict(found.phases[name]) for name in ("load", "sampling")}
    for parts in phases.values():
        parts["adapters"] = parts.get("adapters", 0) + adapters
    share = 0.0 if chosen == "cpu" else 1.0 if num_gpus is None else num_gpus
    process = Process("replica", copies, share, phases, found.bases)
    gib, here = room_here(chosen) if gpu_gib is None else (gpu_gib, f"GPUs of {gpu_gib:g} GiB")
    notes = [
        f"{config.limits.max_loaded_adapters} adapters (limits.max_loaded_adapters) of rank {ASSUMED.r} on all linear layers are"
        f" assumed, {adapter / 2**20:.0f} MiB each"
    ]
    if prompt_tokens is None:
        notes.append(
            f"the key-value cache is kept to {limits.cached_tokens:,} tokens (limits.max_cached_tokens): {rows} replies of"
            f" {limits.max_tokens} tokens to prompts of {prompt}, or fewer and longer ones"
        )
    written = option("as written", "", [process])
    advice = f"{process.total / GIB:.1f} GiB for each copy"
    if chosen == "cuda" and written.card is not None:
        advice += f": GPUs of {written.card} GB"
    about = estimator.about(evaluation)
    stage = StagePlan("serve", about, [process], written, [], advice, notes)
    placed, where = _placement(config, copies, share)
    return Plan(chosen, [stage], where, placed, None if gib is None else int(gib * GIB), here)


def _base_fields(config: ServeConfig) -> dict[str, Any]:
    """The fields that jobs of a stage and services have in common."""
    names = (
        "model_name_or_path",
        "revision",
        "dtype",
        "attn_implementation",
        "load_in_8bit",
        "load_in_4bit",
        "cpu_offload",
    )
    return {"output_dir": config.output_dir, "data": {"train": "none"}} | {
        name: getattr(config, name) for name in names
    }


def _adapter_bytes(config: ServeConfig, estimator: Estimator) -> int:
    """Of one adapter of the assumed size, as a fresh policy has it."""
    fresh = PPOConfig(
        **_base_fields(config),
        rewards=[{"function": "none.py:none"}],  # type: ignore[arg-type]
        lora=ASSUMED,
        advantage_estimator="rloo",
        num_generations=2,
    )
    (process, *_) = estimator.processes(fresh)
    return process.phases["load"].get("adapters", 0)


def _placement(config: ServeConfig, copies: int, share: float) -> tuple[bool, str]:
    each = {"CPU": config.replicas.num_cpus if config.replicas.num_cpus is not None else 0.1}
    requests = [ResourceRequest("replica", copies, each | ({"GPU": share} if share else {}))]
    try:
        with at_hand() as (_, nodes, _):
            found = check(requests, nodes)
    except ResourceError as error:
        return False, "; ".join(f"{p.where}: {p.what}" for p in error.problems)
    return True, f"{copies} copies on {', '.join(dict.fromkeys(found['replica']))}"
