"""vLLM beside the builtin engine on a real model and real prompts: greedy replies, token by token, and how near a tie was where
they part.

    .venv-vllm/bin/python benchmarks/engine_agreement.py runs/smollm2/base --output

Prompts are instructions of the shared Alpaca file under the model's own chat template; the adapter (rank 16, all linear layers) is
random, large enough to change the replies. At the first token in which two replies differ both engines had read the same tokens,
so the gap between the log-probabilities of these two tokens is what kernels' rounding had to bridge.
"""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from typing import Any

import torch
from _common import data_folder, emit, parser, report, spread

from rlhf_ray.config import LoraConfig
from rlhf_ray.data.encode import encode_prompts
from rlhf_ray.data.prompts import Prompt
from rlhf_ray.data.templates import load_template
from rlhf_ray.models.adapters import adapter_config, adapter_tensors, load_adapter_tensors, wrap
from rlhf_ray.models.backbone import load_backbone
from rlhf_ray.runtime.devices import own_device
from rlhf_ray.sampler.engine import Sampler
from rlhf_ray.sampler.requests import DecodeEvent, DecodeRequest
from rlhf_ray.sampler.vllm_engine import VLLMEngine, VLLMOptions

ROWS, LONGEST_PROMPT = 32, 192


def prompts(tokenizer: Any, count: int) -> list[tuple[int, ...]]:
    """The first ones of the file that are short enough."""
    template = load_template("chat" if tokenizer.chat_template is not None else "alpaca", tokenizer)
    with gzip.open(data_folder() / "sft_alpaca_2000.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    encoded = encode_prompts(tokenizer, template, [Prompt(row["instruction"], row.get("input") or "") for row in rows])
    return [tuple(ids) for ids in encoded if len(ids) <= LONGEST_PROMPT][:count]


def replies(engine: Any, asked: list[DecodeRequest]) -> tuple[list[list[DecodeEvent]], float]:
    """Every token with the likeliest others, by request; tokens a second."""
    started = time.perf_counter()
    numbers = [engine.submit(request) for request in asked]
    told: dict[int, list[DecodeEvent]] = {number: [] for number in numbers}
    with engine.session():
        while engine.busy:
            for event in engine.step():
                told[event.request_id].append(event)
    speed = sum(map(len, told.values())) / (time.perf_counter() - started)
    return [told[number] for number in numbers], speed


def gap(ours: list[DecodeEvent], theirs: list[DecodeEvent]) -> tuple[int, float] | None:
    """(place, nats) where two replies part, None if they do not; inf if one token is not among the other engine's likeliest."""
    for place, (one, other) in enumerate(zip(ours, theirs)):
        if one.token_id != other.token_id:
            found = dict(one.top)
            return place, abs(found[one.token_id] - found.get(other.token_id, -torch.inf))
    return None


def main() -> None:
    options = parser(__doc__, repeats=1, threads=1)
    options.add_argument("model", type=Path)
    options.add_argument("--prompts", type=int, default=200)
    options.add_argument("--new-tokens", type=int, default=64)
    options.add_argument("--scale", type=float, default=0.01, help="standard deviation of the adapter's B")
    options.add_argument("--kv-cache-gb", type=float, default=0.5)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    device = own_device()
    how = {"load_in_8bit": False, "load_in_4bit": False, "cpu_offload": False, "attn_implementation": "auto"}
    backbone = load_backbone(path=str(args.model), revision=None, dtype="float32", device=device, **how)  # type: ignore[arg-type]
    model = wrap(backbone.model, LoraConfig(r=16, lora_alpha=32), "policy", seed=0).eval()
    draw = torch.Generator().manual_seed(0)
    tensors = {
        key: torch.randn(t.shape, generator=draw) * args.scale if "lora_B" in key else t.cpu()
        for key, t in adapter_tensors(model, "policy").items()
    }
    load_adapter_tensors(model, "policy", tensors)
    longest, cache = LONGEST_PROMPT + args.new_tokens, int(args.kv_cache_gb * 2**30)
    vllm = VLLMEngine(VLLMOptions(str(args.model), "float32", device, longest, ROWS, max_rank=16, kv_cache_bytes=cache))
    vllm.load_adapter("policy", adapter_config(model, "policy"), tensors)
    torch.set_num_threads(args.threads)
    ids = prompts(backbone.tokenizer, args.prompts)
    measured: dict[str, Any] = {}
    said: dict[str | None, list[Any]] = {}
    for name, adapter in (("base", None), ("adapter", "policy")):
        fields: dict[str, Any] = {"greedy": True, "adapter": adapter, "top_logprobs": 5}
        asked = [DecodeRequest(p, 0, args.new_tokens, backbone.eos_ids, **fields) for p in ids]
        builtin = Sampler(model, backbone.pad_id, max_rows=ROWS)
        ours, speed = replies(builtin, asked)
        theirs, other_speed = replies(vllm, asked)
        parted = [found for pair in zip(ours, theirs) if (found := gap(*pair)) is not None]
        same = [(a.logprob, b.logprob) for pair in zip(ours, theirs) if gap(*pair) is None for a, b in zip(*pair)]
        said[adapter] = [[event.token_id for event in reply] for reply in ours]
        measured |= {
            f"{name}/tokens_per_second/builtin": spread([speed]),
            f"{name}/tokens_per_second/vllm": spread([other_speed]),
            f"{name}/tokens": spread([sum(map(len, ours))]),
            f"{name}/replies_that_differ": spread([len(parted)]),
            f"{name}/logprob_difference": spread([max(abs(a - b) for a, b in same)]),
        }
        if parted:
            measured[f"{name}/gap_where_they_part"] = spread([nats for _, nats in parted])
            measured[f"{name}/place_where_they_part"] = spread([place for place, _ in parted])
    changed = sum(a != b for a, b in zip(said[None], said["policy"]))
    measured["replies_that_the_adapter_changes"] = spread([changed])
    settings = {
        "model": f"{args.model.parent.name}/{args.model.name}",
        "prompts": len(ids),
        "new_tokens": args.new_tokens,
        "rows": ROWS,
        "lora": f"r 16 on all linear layers, B of {args.scale:g}",
    }
    emit(report("engine_agreement", settings, measured, 1, args.threads), args.output)


if __name__ == "__main__":
    main()
