"""Evaluation and update of a PPO step on rows as long as Alpaca's, by the row layout of now and by those of before.

    python benchmarks/update_real_lengths.py --output

The learner's part of ppo_step_real_lengths.py in one process: 64 prompts and replies (Alpaca's own lengths, replies cut off at
128), one PPO epoch of one minibatch, microbatches of 16 rows, policy and value model with LoRA r 8 on q and v, a random Llama of
5.8 million parameters, float32. `packed` is the layout of now, `contiguous` that of defaults_version 3, `padded` that of 2, which
is the code of then, bit for bit (tests/integration/test_old_files.py); `budget` is `packed` with tokens_per_microbatch at 16 rows
of 150 tokens; `compiled` is `packed` with the decoder layers under torch.compile (dynamic shapes), whose first update includes the
compiler. Ways take turns; CPU seconds (user and system) of the process come first, since other work disturbs them less.

`floor` is what the matrix products of the update take by themselves: those that no layout can do without (of real tokens; of the
last layer, but for keys and values, and of the language-model head those whose states are read; forward, and backward to the
adapters), each timed here with tensors of its shape. `share of` says what one more packed update spends its time on, as torch's
profiler sees it.
"""

from __future__ import annotations

import gzip
import json
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from _common import data_folder, emit, interleaved, parser, report, spread
from ppo_step_real_lengths import NEW_TOKENS, PROMPTS, ROWS, SIZES, VOCABULARY, alpaca_lengths, make_models
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from rlhf_ray.batches import Experience, Rollout
from rlhf_ray.config import PPOConfig
from rlhf_ray.console import NullConsole
from rlhf_ray.models.assembly import Assembly
from rlhf_ray.roles.guards import Guards
from rlhf_ray.roles.learner import Learner
from rlhf_ray.runtime.session import process_session

RANK = 8
WAYS: dict[str, dict[str, Any]] = {
    "padded": {"defaults_version": 2},
    "contiguous": {"defaults_version": 3},
    "packed": {},
    "budget": {"tokens_per_microbatch": ROWS * 150},
    "compiled": {},
}
KINDS = {"matrix products": r"aten::(add)?b?mm", "attention": r"aten::_scaled_dot_product"}


def reply_lengths() -> list[int]:
    """Words and punctuation marks of every reply and its end, at most NEW_TOKENS."""
    with gzip.open(data_folder() / "sft_alpaca_2000.jsonl.gz", "rt") as file:
        outputs = [json.loads(line)["output"] for line in file]
    return [min(len(re.findall(r"\w+|[^\w\s]", text)) + 1, NEW_TOKENS) for text in outputs]


def rollout() -> Rollout:
    """64 rows of the data, drawn once."""
    noise = torch.Generator().manual_seed(0)
    rows = torch.randperm(2000, generator=noise)[:PROMPTS]
    before, after = (torch.tensor(lengths)[rows] for lengths in (alpaca_lengths(), reply_lengths()))
    wide, long = int(before.max()), int(after.max())
    prompts = torch.arange(wide)[None] >= wide - before[:, None]
    replies = torch.arange(long)[None] < after[:, None]
    tokens = torch.randint(4, VOCABULARY, (PROMPTS, wide + long), generator=noise)
    said = torch.zeros(replies.shape)
    return Rollout(tokens, prompts, replies, said, torch.ones(PROMPTS, dtype=torch.bool), torch.arange(PROMPTS))


def learner(folder: Path, threads: int, **fields: Any) -> Learner:
    common: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "model_name_or_path": str(folder / "policy"),
        "template": "none",
        "data": {"train": "unused.jsonl"},
        "rewards": [{"name": "r", "function": "unused.py:f"}],
        "lora": {"r": RANK, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
        "learner": {"num_workers": 0, "num_threads": threads},
        "rollout_batch_size": PROMPTS,
        "num_mini_batches": 1,
        "num_ppo_epochs": 1,
        "per_device_train_batch_size": ROWS,
        "max_steps": 1,
    }
    config = PPOConfig(**{**common, **fields})
    assembly = Assembly(config, torch.device("cpu"), config.seed, None)
    assembly.add_trained_policy(None, config.lora, with_reference=False)
    assembly.add_value("policy", "own", None)
    return Learner(assembly.finish(), config, process_session(NullConsole(), threads))


def products(prompt: int, reply: int, first: bool, last: bool) -> Iterator[tuple[int, int, int]]:
    """Of one layer over rows of `prompt` and `reply` tokens in all: (rows, in, out) of every product, forward and backward."""
    width, inner = SIZES["5.8m"]["hidden_size"], SIZES["5.8m"]["intermediate_size"]
    every, read = prompt + reply, reply if last else prompt + reply
    goes_on = not first  # before q, k and v of the first layer are embeddings, which are frozen
    parts = [
        (read, width, width, True, goes_on),
        (every, width, width, False, goes_on),
        (every, width, width, True, goes_on),
    ]
    parts += [
        (read, width, width, False, True),
        *[(read, width, inner, False, True)] * 2,
        (read, inner, width, False, True),
    ]
    for tokens, n_in, n_out, adapted, backward in parts:
        yield tokens, n_in, n_out
        if backward:
            yield tokens, n_out, n_in
        if adapted:
            yield from ((tokens, n_in, RANK), (tokens, RANK, n_out), (RANK, tokens, n_out), (tokens, n_out, RANK))
            yield RANK, tokens, n_in
            if backward:
                yield tokens, RANK, n_in


def floor(sampled: Rollout, batches: Sequence[Tensor]) -> float:
    """Seconds of the matrix products of one update in these passes, policy and value model, each as fast as it is alone."""
    before, after = sampled.prompt_mask.sum(dim=1), sampled.response_mask.sum(dim=1)
    layers, width, total = SIZES["5.8m"]["num_hidden_layers"], SIZES["5.8m"]["hidden_size"], 0.0
    for rows in batches:
        prompt, reply = int(before[rows].sum()), int(after[rows].sum())
        of_model: Counter[tuple[int, int, int]] = Counter()
        for layer in range(layers):
            of_model.update(products(prompt, reply, layer == 0, layer == layers - 1))
        for length in (before + after)[
            rows
        ].tolist():  # scores and values: forward once, backward twice, half of each is causal
            of_model[length, width, length] += 3 * layers
        head = Counter({(reply, width, VOCABULARY): 1, (reply, VOCABULARY, width): 1})
        of_step = Counter({shape: 2 * count for shape, count in of_model.items()}) + head
        total += sum(count * seconds_of(*shape) for shape, count in of_step.items())
    return total


@cache
def seconds_of(rows: int, n_in: int, n_out: int, repeats: int = 7) -> float:
    """The median of some products [rows, n_in] x [n_in, n_out]."""
    left, right, times = torch.randn(rows, n_in), torch.randn(n_out, n_in).t(), []
    for _ in range(repeats):
        started = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def compile_layers(one: Learner) -> None:
    for part in one.models.modules():
        if type(part).__name__.endswith("DecoderLayer"):
            part.compile(dynamic=True)


def kinds(work: Callable[[], None]) -> dict[str, float]:
    """Shares of the operations' own time."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        work()
    spent: Counter[str] = Counter()
    for event in seen.key_averages():
        kind = next((kind for kind, pattern in KINDS.items() if re.match(pattern, event.key)), "all else")
        spent[kind] += event.self_cpu_time_total
    return {kind: time / sum(spent.values()) for kind, time in spent.items()}


def main() -> None:
    args = parser(__doc__, repeats=3, threads=1).parse_args()
    torch.set_num_threads(args.threads)
    sampled, noise = rollout(), torch.Generator().manual_seed(1)
    width = sampled.response_width
    numbers = [torch.where(sampled.response_mask, torch.randn(PROMPTS, width, generator=noise), 0.0) for _ in range(3)]
    masks = sampled.tokens, sampled.prompt_mask, sampled.response_mask
    shares: dict[str, float] = {}
    updates: dict[str, list[float]] = {way: [] for way in WAYS}

    def step(way: str, one: Learner) -> Callable[[], None]:
        def run() -> None:
            found = one.evaluate(sampled, 1)
            assert found.values is not None
            experience = Experience(*masks, found.logprobs, numbers[0], found.values, *numbers[1:])
            rates = {"policy": 1e-5, "value": 1e-5}
            started = time.perf_counter()
            stats = one.update(experience, 1, rates, 0.0, Guards())
            updates[way].append(time.perf_counter() - started)
            shares[way] = stats.metrics().get("update/real_token_share", 0.0)

        return run

    with tempfile.TemporaryDirectory() as scratch:
        make_models(Path(scratch), "5.8m")
        learners = {way: learner(Path(scratch), args.threads, **fields) for way, fields in WAYS.items()}
        compile_layers(learners["compiled"])
        timings = interleaved({way: step(way, one) for way, one in learners.items()}, args.repeats)
        spent = kinds(step("packed", learners["packed"]))
        updates["packed"].pop()
    lengths, one = sampled.attention_mask.sum(dim=1), learners["packed"]
    (minibatch,) = one._minibatches(1, 0, PROMPTS)
    least = floor(sampled, [micro.index for micro in one._microbatches(minibatch, lengths[minibatch])])
    real, padded = int(sampled.attention_mask.sum()), learners["padded"]
    passes = [padded._sequences(sampled, micro) for micro in padded._microbatches(minibatch, lengths)]
    shares["padded"] = real / sum(seq.computed_tokens for seq in passes)
    measured: dict[str, Any] = {"floor/wall_seconds": spread([least])}
    measured |= {f"share of {kind}": spread([share]) for kind, share in spent.items()}
    measured["compiled/first_update_seconds"] = spread(updates["compiled"][:1])
    for way in WAYS:
        measured[f"{way}/cpu_seconds"] = spread([t.cpu for t in timings[way]])
        measured[f"{way}/wall_seconds"] = spread([t.wall for t in timings[way]])
        measured[f"{way}/update_seconds"] = spread(updates[way][1:])
        measured[f"{way}/update_over_floor"] = spread([seconds / least for seconds in updates[way][1:]])
        measured[f"{way}/real_token_share"] = spread([shares[way]])
        if way != "padded":
            pairs = zip(timings["padded"], timings[way], strict=True)
            measured[f"{way}/times_faster_cpu"] = spread([a.cpu / b.cpu for a, b in pairs])
    settings = {
        "model": "random Llama, 5.8 M parameters, float32, CPU",
        "rows": PROMPTS,
        "real_tokens": real,
        "microbatch": ROWS,
        "ppo_epochs": 1,
        "lora": "r 8 on q_proj and v_proj, policy and critic",
    }
    emit(report("update_real_lengths", settings, measured, args.repeats, args.threads), args.output)


if __name__ == "__main__":
    sys.exit(main())
