"""Decode engines side by side: tokens a second of the builtin one, of vLLM and of transformers' `generate`, on the same requests.

    .venv-vllm/bin/python benchmarks/engines.py --output
    .venv-vllm/bin/python benchmarks/engines.py --model runs/smollm2/base --requests 32 --output

Greedy replies of 64 tokens to prompts of 16, 32 rows at a time, without an adapter, under one, and under 8 and 32 in one batch
(`generate`: one adapter after the other, by PEFT's `set_adapter`). All engines hold the same weights; replies are compared, token
by token, with those of the builtin engine. The load of the machine is in the report: on a busy one compare shares, not speeds.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _common import emit, parser, report, spread
from mixed_adapters import NEW, PROMPT, ROWS, build, ours, requests, switching, with_adapters

from rlhf_ray.models.adapters import adapter_config, adapter_tensors
from rlhf_ray.runtime.devices import own_device
from rlhf_ray.sampler.requests import DecodeRequest
from rlhf_ray.sampler.vllm_engine import VLLMEngine, VLLMOptions

COUNTS = (0, 1, 8, 32)
"""Adapters in one batch; 0 is the base."""


def engine(peft: Any, folder: Path, names: Sequence[str], cache_gb: float) -> VLLMEngine:
    """vLLM with the adapters of `peft` on the base in `folder`."""
    found = VLLMEngine(
        VLLMOptions(
            str(folder),
            str(peft.dtype).removeprefix("torch."),
            own_device(),
            PROMPT + NEW,
            ROWS,
            max_rank=8,
            adapters=len(names),
            kv_cache_bytes=int(cache_gb * 2**30),
        )
    )
    for name in names:
        found.load_adapter(name, adapter_config(peft, name), adapter_tensors(peft, name))
    return found


def vllm(found: VLLMEngine, asked: list[DecodeRequest]) -> tuple[float, list[tuple[int, ...]]]:
    started = time.perf_counter()
    replies = found.run(asked)
    return len(asked) * NEW / (time.perf_counter() - started), [r.token_ids for r in replies]


def plain(peft: Any, asked: list[DecodeRequest]) -> tuple[float, list[tuple[int, ...]]]:
    if asked[0].adapter is not None:
        return switching(peft, asked)
    with peft.disable_adapter():
        named = [DecodeRequest(**{**vars(r), "adapter": next(iter(peft.peft_config))}) for r in asked]
        return switching(_NoSwitch(peft), named)


class _NoSwitch:
    """A PEFT model whose adapters are off, and stay so."""

    def __init__(self, peft: Any) -> None:
        self.generate = peft.generate

    def set_adapter(self, name: str) -> None:
        pass


def main() -> None:
    options = parser(__doc__, repeats=3, threads=1)
    options.add_argument("--model", default="5.8m", help="5.8m (random weights), or the folder of a model")
    options.add_argument("--requests", type=int, default=64)
    options.add_argument("--most", type=int, default=max(COUNTS), help="adapters at most")
    options.add_argument("--most-by-generate", type=int, default=max(COUNTS), help="of them, where `generate` is tried")
    options.add_argument("--kv-cache-gb", type=float, default=0.5)
    args = options.parse_args()
    counts = [count for count in COUNTS if count <= args.most]
    torch.set_num_threads(args.threads)
    model, folder = _base(args.model)
    peft = with_adapters(model, max(counts))
    names = sorted(peft.peft_config)
    found = engine(peft, folder, names, args.kv_cache_gb)
    torch.set_num_threads(args.threads)
    vocabulary = int(peft.get_base_model().config.vocab_size)
    cases = {"builtin": lambda a: ours(peft, a), "vllm": lambda a: vllm(found, a), "generate": lambda a: plain(peft, a)}
    speeds: dict[tuple[str, int], list[float]] = {(name, count): [] for name in cases for count in counts}
    differ: dict[tuple[str, int], int] = {}
    for repeat in range(args.repeats + 1):
        for count in counts:  # engines in turn, so that whatever else the machine does meets all of them alike
            asked = requests(vocabulary, names[:count] or [None])[: args.requests]  # type: ignore[list-item]
            said = {}
            for name, case in cases.items():
                if name == "generate" and count > args.most_by_generate:
                    continue
                speed, said[name] = case(asked)
                if repeat:  # the first one warms up
                    speeds[name, count].append(speed)
                print(f"{name}, {count} adapters: {speed:.0f} tokens/s", file=sys.stderr, flush=True)
            for name in said:
                differ[name, count] = sum(a != b for a, b in zip(said[name], said["builtin"]))
    measured: dict[str, Any] = {}
    for count in counts:
        for name in cases:
            if not speeds[name, count]:
                continue
            measured[f"tokens_per_second/{name}/{count}"] = spread(speeds[name, count])
            if name != "builtin":
                times = [a / b for a, b in zip(speeds[name, count], speeds["builtin", count])]
                measured[f"times_builtin/{name}/{count}"] = spread(times)
                measured[f"replies_that_differ/{name}/{count}"] = spread([differ[name, count]])
    parameters = sum(p.numel() for n, p in peft.named_parameters() if "lora_" not in n)
    settings = {
        "model": f"{Path(args.model).name}, {parameters:,} parameters, {str(peft.dtype).removeprefix('torch.')}",
        "lora": "r 8 on all linear layers",
        "requests": args.requests,
        "rows": ROWS,
        "prompt_tokens": PROMPT,
        "new_tokens": NEW,
    }
    name = "engines_5_8m" if args.model == "5.8m" else f"engines_{Path(args.model).name}"
    emit(report(name, settings, measured, args.repeats, args.threads), args.output)


def _base(name: str) -> tuple[Any, Path]:
    """The model, and a folder that vLLM can load it from."""
    from transformers import AutoModelForCausalLM

    if name != "5.8m":
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval(), Path(name)
    model, folder = build(name), Path(tempfile.mkdtemp())
    model.save_pretrained(folder)
    return model, folder


if __name__ == "__main__":
    main()
