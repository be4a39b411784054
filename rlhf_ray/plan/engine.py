"""What a vLLM engine holds: a base of its own, room for one adapter, keys and values.

Counted is what it cannot do without; on a GPU it takes the share that it is given, whatever it needs."""

from __future__ import annotations

from typing import Any

from rlhf_ray.config import PPOConfig
from rlhf_ray.plan.memory import CARDS, GIB, Device, Parts, Phases
from rlhf_ray.plan.passes import Cast, Shapes
from rlhf_ray.sampler.vllm_engine import CPU_CACHE_GB
from rlhf_ray.sampler.vllm_lora import largest_rank

BESIDES = int(0.5 * GIB)
"""Of an engine on a GPU: activations of its widest pass, buffers, CUDA graphs. An allowance, not a measurement."""


def engine_parts(job: PPOConfig, cast: Cast, shapes: Shapes, device: Device) -> Parts:
    """Bytes of the engine while it is awake.   cast: of a process with the policy on its base."""
    base = cast.assembly.base
    width = base.dtype.itemsize
    tokens = shapes.chunk * (shapes.prompt + shapes.response)
    needed = tokens * bytes_per_token(base.model.config.get_text_config(), width)
    given = job.rollout.kv_cache_gb or (CPU_CACHE_GB if device == "cpu" else None)
    return {
        "bases": sum(p.numel() * width for name, p in base.model.named_parameters() if ".lora_" not in name),
        "adapters": _slots(cast, width),
        "kv cache": needed if given is None else int(given * GIB),
        "other": 0 if device == "cpu" else BESIDES,
    }


def bytes_per_token(text: Any, width: int) -> int:
    """Of keys and values.   text: config of a language model.   width: bytes of a number."""

    def numbers(layer: Any) -> int:
        heads = int(getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads)
        return heads * int(getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads)

    return 2 * width * sum(map(numbers, text.per_layer_config))


def with_engine(phases: Phases, engine: Parts, asleep: frozenset[str]) -> Phases:
    """`phases` of a learner, with the engine beside it in all but those in which it sleeps."""

    def both(name: str, parts: Parts) -> Parts:
        if name in asleep:
            return parts
        return {part: parts.get(part, 0) + engine.get(part, 0) for part in parts.keys() | engine.keys()}

    return {name: both(name, parts) for name, parts in phases.items()}


def engine_note(engine: Parts, share: float, field: str) -> str:
    """What share of which card is enough.   share: of its GPU, that the engine takes.   field: that sets it."""
    needed = sum(engine.values()) / GIB
    enough = [f"{needed / room:.2f} of {card} GB" for card, room in CARDS.items() if needed < 0.9 * room]
    return (
        f"vLLM takes {share:g} of its GPU ({field}), whatever it needs; counted is what it cannot do"
        f" without, {needed:.1f} GiB: {', '.join(enough) or 'more than any card has'}"
    )


def _slots(cast: Cast, width: int) -> int:
    """Of one adapter at the rank that vLLM is started with."""
    peft: Any = cast.assembly.stacks["base"].peft
    rank = peft.peft_config["policy"].r
    numel = sum(p.numel() for name, p in peft.named_parameters() if ".lora_" in name and ".policy." in name)
    return numel * largest_rank(rank) // rank * width
