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
from rlhf_ray.models.context import context_length
from rlhf_ray.plan.advice import option
from rlhf_ray.plan.engine import BESIDES, bytes_per_token, engine_note, with_engine
from rlhf_ray.plan.estimate import Estimator
from rlhf_ray.plan.job_plan import Plan, StagePlan, room_here
from rlhf_ray.plan.memory import GIB, Parts, Phases, Process
from rlhf_ray.plan.meta_tracker import Device
from rlhf_ray.plan.skeleton import precision, read_config
from rlhf_ray.sampler.vllm_engine import CPU_CACHE_GB
from rlhf_ray.sampler.vllm_lora import largest_rank
from rlhf_ray.serve.vllm import gpu_share

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
    rows, copies = limits.max_batch_rows, config.replicas.max_replicas or config.replicas.min_replicas
    prompt, reply = _longest_row(config, prompt_tokens)
    estimator = Estimator(chosen, prompt=prompt)
    evaluation = EvaluateConfig(
        **_base_fields(config),
        policies=[{"name": "base", "policy": "base"}],  # type: ignore[arg-type]
        response_length=reply,
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
    notes = _notes(config, adapter, (prompt, reply), prompt_tokens is None)
    if config.engine == "vllm":
        engine = _vllm_parts(config, evaluation, phases["load"], adapter, rows * (prompt + reply), chosen)
        own = phases["load"] if config.vllm.scoring_base else {"other": phases["load"].get("other", 0)}
        phases = with_engine({"sampling": own}, engine, frozenset())
        if chosen == "cuda":
            notes.append(engine_note(engine, gpu_share(config), "vllm.gpu_memory_utilization"))
    share = 0.0 if chosen == "cpu" else 1.0 if num_gpus is None else num_gpus
    process = Process("replica", copies, share, phases, found.bases)
    gib, here = room_here(chosen) if gpu_gib is None else (gpu_gib, f"GPUs of {gpu_gib:g} GiB")
    written = option("as written", "", [process])
    advice = f"{process.total / GIB:.1f} GiB for each copy"
    if chosen == "cuda" and written.card is not None:
        advice += f": GPUs of {written.card} GB"
    about = estimator.about(evaluation)
    stage = StagePlan("serve", about, [process], written, [], advice, notes)
    placed, where = _placement(config, copies, share)
    return Plan(chosen, [stage], where, placed, None if gib is None else int(gib * GIB), here)


def _longest_row(config: ServeConfig, prompt_tokens: int | None) -> tuple[int, int]:
    """Tokens of a prompt and its reply, together no more than the context: replies of limits.max_tokens, or what the context leaves
    behind a prompt of `prompt_tokens`, default one; prompts that fill what the cache has for a row."""
    limits = config.limits
    own = context_length(read_config(config.model_name_or_path, config.revision).get_text_config())
    context = max(min(limits.max_context or own, own), 2)
    prompt = min(prompt_tokens or 1, context - 1)
    reply = min(limits.max_tokens, context - prompt)
    if prompt_tokens is None:
        prompt = max(min(limits.cached_tokens // limits.max_batch_rows, context) - reply, 1)
    return prompt, reply


def _notes(config: ServeConfig, adapter: int, row: tuple[int, int], prompt_is_assumed: bool) -> list[str]:
    """What had to be assumed.   adapter: bytes of one.   row: tokens of a prompt and its reply."""
    limits, (prompt, reply) = config.limits, row
    notes = [
        f"{limits.max_loaded_adapters} adapters (limits.max_loaded_adapters) of rank {ASSUMED.r} on all linear layers are"
        f" assumed, {adapter / 2**20:.0f} MiB each"
    ]
    replies = f"{limits.max_batch_rows} replies of {reply} tokens to prompts of {prompt}"
    if config.engine == "vllm":
        second = "and a second base to score on" if config.vllm.scoring_base else "and no base to score on"
        notes.append(f"vLLM has slots for as many, of rank {config.vllm.max_lora_rank} (vllm.max_lora_rank), {second}")
        if prompt_is_assumed:
            notes.append(f"its keys and values are counted for {replies}")
    elif prompt_is_assumed:
        notes.append(
            f"the key-value cache is kept to {min(limits.cached_tokens, limits.max_batch_rows * sum(row)):,} tokens"
            f" (limits.max_cached_tokens, and the context): {replies}, or fewer and longer ones"
        )
    return notes


def _vllm_parts(
    config: ServeConfig, base: EvaluateConfig, load: Parts, adapter: int, tokens: int, device: Device
) -> Parts:
    """What vLLM holds in a replica.   base: a job with the same one.   load: of the builtin engine.   adapter: bytes of one of the
    assumed size, in float32.   tokens: in the cache."""
    described = read_config(config.model_name_or_path, config.revision)
    width = precision(base, described, device).itemsize
    given = config.vllm.kv_cache_gb or (CPU_CACHE_GB if device == "cpu" else None)
    slot = adapter * largest_rank(config.vllm.max_lora_rank) // ASSUMED.r * width // 4
    return {
        "bases": load["bases"],
        "adapters": slot * config.limits.max_loaded_adapters,
        "kv cache": int(given * GIB) if given else tokens * bytes_per_token(described.get_text_config(), width),
        "other": 0 if device == "cpu" else BESIDES,
    }


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
