"""Short replies beside a long one: seconds until 128 of them are written, with rows in groups by length and with one cache for all.

    python benchmarks/long_reply.py --output

The engine of the service, prompts read in pieces of 512 tokens, 32 rows at most: one reply goes on from 2,000 tokens, and 128 of 60
tokens to prompts of 40 are asked for. In the same run, with a budget of 16,000 tokens for the cache and with room for everything:
groups as they are, and one cache for all (FILLED 0, MOST_GROUPS 1); and the short replies without a long one.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from _common import emit, parser, report, spread

from rlhf_ray.sampler import row_group
from rlhf_ray.sampler.engine import Sampler
from rlhf_ray.sampler.requests import DecodeRequest

ROWS, SHORT, PROMPT, NEW, LONG, CHUNK = 32, 128, 40, 60, 2000, 512
BUDGETS = {"a cache of 16,000 tokens": 16_000, "room for all": 200_000}
CASES = {"groups": (row_group.FILLED, row_group.MOST_GROUPS), "one cache": (0.0, 1)}


def build() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=4096, num_key_value_heads=4, head_dim=32, max_position_embeddings=4096, **shape)  # type: ignore[arg-type]
    return LlamaForCausalLM(config).eval()


def request(seed: int, prompt: int, new: int) -> DecodeRequest:
    ids = torch.randint(3, 4096, (prompt,), generator=torch.Generator().manual_seed(seed)).tolist()
    return DecodeRequest(tuple(ids), seed, new, (), greedy=True)


def written(model: Any, budget: int, beside_long: bool) -> tuple[float, list[list[int]]]:
    """Seconds until all short replies are there, and their tokens."""
    sampler = Sampler(model, pad_id=0, max_rows=ROWS, chunk=CHUNK, max_cached=budget)
    with sampler.session():
        if beside_long:
            sampler.submit(request(SHORT, LONG, 4096 - LONG))
            while not sampler.step():
                pass
        started = time.perf_counter()
        replies: dict[int, list[int]] = {sampler.submit(request(i, PROMPT, NEW)): [] for i in range(SHORT)}
        left = SHORT
        while left:
            for event in sampler.step():
                if event.request_id in replies:
                    replies[event.request_id].append(event.token_id)
                    left -= event.end is not None
        return time.perf_counter() - started, list(replies.values())


def main() -> None:
    args = parser(__doc__, repeats=3, threads=2).parse_args()
    torch.set_num_threads(args.threads)
    model = build()
    written(model, 16_000, False)  # warm up
    seconds: dict[str, list[float]] = {}
    said: dict[str, list[list[int]]] = {}
    for _ in range(args.repeats):
        for case, (filled, most) in CASES.items():
            row_group.FILLED, row_group.MOST_GROUPS = filled, most
            for name, budget in BUDGETS.items():
                for beside in (False, True):
                    key = f"{case}/{name}/{'beside a long one' if beside else 'alone'}"
                    took, said[key] = written(model, budget, beside)
                    seconds.setdefault(key, []).append(took)
                    print(f"{key}: {took:.2f} s", file=sys.stderr, flush=True)
    measured: dict[str, Any] = {f"seconds/{key}": spread(values) for key, values in seconds.items()}
    for name in BUDGETS:
        ours, other = (seconds[f"{case}/{name}/beside a long one"] for case in CASES)
        measured[f"times_one_cache/{name}"] = spread([b / a for a, b in zip(ours, other)])
    first, *others = said.values()
    measured["replies_that_differ"] = spread([sum(a != b for other in others for a, b in zip(first, other))])
    settings = {
        "model": "random Llama of 5.8 M parameters, float32, CPU",
        "rows": ROWS,
        "short": f"{SHORT} replies of {NEW} tokens to {PROMPT}",
        "long": f"one reply from {LONG} tokens on",
    }
    emit(report("long_reply", settings, measured, args.repeats, args.threads), args.output)


if __name__ == "__main__":
    main()
