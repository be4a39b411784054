"""Tokens per second of the sampler and of transformers' `generate` on replies of uneven length, on the CPU.

Both make the same useful tokens: the same 256 prompts, and for each the same number of new tokens, drawn evenly from 8 to 128. The
model is a random Llama of 5.8 million parameters, which has no favourite end token, so lengths are set, not sampled.

generate: four batches of 64 in the order of the prompts, left padded, `do_sample` at temperature 1 with no top-k or top-p, a
stopping criterion that marks each row as done at its own length; as always with generate, a batch goes on until its last row is
done. It returns no log-probabilities, and none are computed for it.
sampler: the same requests to one engine of 64 rows. sampler_in_chunks: the schedule of rollouts, four chunks of 64, each in an
engine that starts empty, so that no waiting row takes a free slot. Both return every token's log-probability.

Run it alone on the machine: with more busy threads than cores, wall times measure the other programs.

    python benchmarks/sampler_vs_generate.py --threads 2 --output
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList

sys.path.insert(0, str(Path(__file__).parent))

import _common

from rlhf_ray.sampler.engine import DecodeRequest, Sampler

PAD, BATCH = 0, 64


class RowLengths(StoppingCriteria):
    """Row i is done after lengths[i] new tokens."""

    def __init__(self, lengths: Tensor, prompt_width: int) -> None:
        self._widths = lengths + prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return input_ids.shape[1] >= self._widths


def build_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    return model


def build_requests(count: int, prompt: tuple[int, int], reply: tuple[int, int]) -> list[DecodeRequest]:
    generator = torch.Generator().manual_seed(1)

    def draw(low: int, high: int, size: tuple[int, ...]) -> list[int]:
        return torch.randint(low, high + 1, size, generator=generator).tolist()

    widths, lengths = draw(*prompt, (count,)), draw(*reply, (count,))
    return [DecodeRequest(tuple(draw(3, 2047, (w,))), i, n, ()) for i, (w, n) in enumerate(zip(widths, lengths))]


def run_generate(model: LlamaForCausalLM, requests: list[DecodeRequest]) -> None:
    for start in range(0, len(requests), BATCH):
        chunk = requests[start : start + BATCH]
        width = max(len(r.prompt_ids) for r in chunk)
        ids = torch.tensor([(PAD,) * (width - len(r.prompt_ids)) + r.prompt_ids for r in chunk])
        real = torch.tensor([[0] * (width - len(r.prompt_ids)) + [1] * len(r.prompt_ids) for r in chunk])
        lengths = torch.tensor([r.max_new_tokens for r in chunk])
        out = model.generate(
            input_ids=ids,
            attention_mask=real,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=int(lengths.max()),
            pad_token_id=PAD,
            stopping_criteria=StoppingCriteriaList([RowLengths(lengths, width)]),
        )
        if out.shape[1] != width + int(lengths.max()):
            raise RuntimeError("generate stopped early: it did less than the same work")


def run_sampler(sampler: Sampler, requests: list[DecodeRequest], chunk: int) -> None:
    for start in range(0, len(requests), chunk):
        part = requests[start : start + chunk]
        if [len(r.token_ids) for r in sampler.run(part)] != [r.max_new_tokens for r in part]:
            raise RuntimeError("the sampler stopped early: it did less than the same work")


def main() -> None:
    options = _common.parser(__doc__, repeats=5, threads=2)
    options.add_argument("--requests", type=int, default=256)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    model = build_model()
    prompt, reply = (8, 32), (8, 128)
    requests = build_requests(args.requests, prompt, reply)
    tokens = sum(r.max_new_tokens for r in requests)
    sampler = Sampler(model, PAD, max_rows=BATCH)
    timings = _common.interleaved(
        {
            "generate": lambda: run_generate(model, requests),
            "sampler": lambda: run_sampler(sampler, requests, len(requests)),
            "sampler_in_chunks": lambda: run_sampler(sampler, requests, BATCH),
        },
        args.repeats,
    )
    measured: dict[str, Any] = {
        f"{name}/{unit}": _common.spread([tokens / getattr(t, clock) for t in times])
        for name, times in timings.items()
        for unit, clock in (("tokens_per_second", "wall"), ("tokens_per_cpu_second", "cpu"))
    }
    for name in ("sampler", "sampler_in_chunks"):
        for clock in ("wall", "cpu"):
            ratios = [getattr(g, clock) / getattr(s, clock) for g, s in zip(timings["generate"], timings[name])]
            measured[f"{name}/times_generate_{clock}"] = _common.spread(ratios)
    settings = {
        "model": f"random Llama, {sum(p.numel() for p in model.parameters()):,} parameters, float32",
        "requests": args.requests,
        "batch": BATCH,
        "prompt_tokens": prompt,
        "new_tokens": reply,
        "useful_tokens": tokens,
        "ratios": "of the two runs of one repeat, which follow each other",
    }
    _common.emit(_common.report("sampler_vs_generate", settings, measured, args.repeats, args.threads), args.output)
    median = statistics.median(measured["sampler/times_generate_wall"]["values"])
    print(f"sampler: {median:.2f} times generate", file=sys.stderr)


if __name__ == "__main__":
    main()
