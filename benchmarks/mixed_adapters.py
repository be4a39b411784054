"""Adapters in one batch: tokens a second over 1 to 128 adapters against one adapter, and against switching between them.

    python benchmarks/mixed_adapters.py --model 5.8m --output

Same engine, same requests: `requests` greedy replies of `new_tokens` tokens, 32 rows at a time. Baselines in the same run: all
requests under one adapter; PEFT's `set_adapter` with transformers' `generate`, one adapter after the other, each with its share
of the requests; and the mixed batch in the other two forms of sampler/stacked_lora.py (for two adapters masked stacks are the
sampler's own choice). Replies of the mixed batch are compared with those of the baselines, token by token.
"""

from __future__ import annotations

import sys
import time
import unittest.mock
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from _common import data_folder, emit, parser, report, spread

from rlhf_ray.config import LoraConfig
from rlhf_ray.models.adapters import adapter_parameters, add_fresh, wrap
from rlhf_ray.sampler import stacked_lora
from rlhf_ray.sampler.engine import Sampler
from rlhf_ray.sampler.requests import DecodeRequest

ROWS, REQUESTS, PROMPT, NEW = 32, 64, 16, 64
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128)
SWITCHED = (1, 8, 32)
FORMS_AT = (2, 8, 32, 128)
FORMS = {"masked stacks": stacked_lora._SharedFactors, "copies by row": stacked_lora._RowFactors}


def build(name: str) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if name == "stories260k":
        return AutoModelForCausalLM.from_pretrained(
            data_folder() / "models" / "stories260K", dtype=torch.float32
        ).eval()
    shape = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=4096, num_key_value_heads=4, head_dim=32, max_position_embeddings=256, **shape)  # type: ignore[arg-type]
    return LlamaForCausalLM(config).eval()


def with_adapters(model: Any, count: int) -> Any:
    """Adapters of rank 8 on all linear layers, which do say different things."""
    lora = LoraConfig(r=8, lora_alpha=16)
    model.generation_config.eos_token_id = None  # every reply has all its tokens, here as there
    peft = wrap(model, lora, "ad_0000", seed=0)
    for i in range(1, count):
        add_fresh(peft, f"ad_{i:04d}", lora, seed=i, trainable=False)
    with torch.no_grad():
        for i in range(count):
            draw = torch.Generator().manual_seed(i)
            for key, parameter in adapter_parameters(peft, f"ad_{i:04d}").items():
                if "lora_B" in key:
                    parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.02)
    return peft.eval()


def requests(vocabulary: int, names: Sequence[str]) -> list[DecodeRequest]:
    draw = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, vocabulary, (REQUESTS, PROMPT), generator=draw).tolist()
    return [
        DecodeRequest(tuple(p), i, NEW, (), greedy=True, adapter=names[i % len(names)]) for i, p in enumerate(prompts)
    ]


def ours(peft: Any, asked: list[DecodeRequest]) -> tuple[float, list[tuple[int, ...]]]:
    sampler = Sampler(peft, pad_id=0, max_rows=ROWS)
    started = time.perf_counter()
    found = sampler.run(asked)
    return len(asked) * NEW / (time.perf_counter() - started), [r.token_ids for r in found]


def ours_in(form: type, peft: Any, asked: list[DecodeRequest]) -> tuple[float, list[tuple[int, ...]]]:
    with unittest.mock.patch.object(stacked_lora, "form_of", lambda *_: form):
        return ours(peft, asked)


@torch.no_grad()
def switching(peft: Any, asked: list[DecodeRequest]) -> tuple[float, list[tuple[int, ...]]]:
    """`set_adapter`, then `generate` for that adapter's requests, and so on."""
    said: dict[int, tuple[int, ...]] = {}
    started = time.perf_counter()
    for name in dict.fromkeys(r.adapter for r in asked):
        peft.set_adapter(name)
        mine = [i for i, r in enumerate(asked) if r.adapter == name]
        for start in range(0, len(mine), ROWS):
            part = mine[start : start + ROWS]
            ids = torch.tensor([asked[i].prompt_ids for i in part])
            how = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
            out = peft.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)
            said.update({i: tuple(row[PROMPT:].tolist()) for i, row in zip(part, out)})
    return len(asked) * NEW / (time.perf_counter() - started), [said[i] for i in range(len(asked))]


def main() -> None:
    options = parser(__doc__, repeats=3, threads=2)
    options.add_argument("--model", choices=("stories260k", "5.8m"), default="5.8m")
    options.add_argument("--most", type=int, default=max(COUNTS), help="adapters at most")
    args = options.parse_args()
    counts = [count for count in COUNTS if count <= args.most]
    torch.set_num_threads(args.threads)
    peft = with_adapters(build(args.model), max(counts))
    names = sorted(peft.peft_config)
    vocabulary = int(peft.get_base_model().config.vocab_size)
    ours(peft, requests(vocabulary, names[:2]))  # warm up
    mixed: dict[int, list[float]] = {count: [] for count in counts}
    switched: dict[int, list[float]] = {count: [] for count in SWITCHED if count <= args.most}
    in_form: dict[str, list[float]] = defaultdict(list)
    differ: dict[int, int] = defaultdict(int)
    for _ in range(args.repeats):
        for count in counts:  # in turn, so that whatever else the machine does meets all of them alike
            asked = requests(vocabulary, names[:count])
            speed, said = ours(peft, asked)
            mixed[count].append(speed)
            if count in switched:
                speed, other = switching(peft, asked)
                switched[count].append(speed)
                differ[count] += sum(a != b for a, b in zip(said, other))
            for name, form in FORMS.items() if count in FORMS_AT else ():
                speed, other = ours_in(form, peft, asked)
                in_form[f"{name}/{count}"].append(speed)
                differ[count] += sum(a != b for a, b in zip(said, other))
            print(f"{count} adapters: {mixed[count][-1]:.0f} tokens/s", file=sys.stderr, flush=True)
    measured: dict[str, Any] = {}
    for count in counts:
        measured[f"tokens_per_second/{count}"] = spread(mixed[count])
        measured[f"share_of_one_adapter/{count}"] = spread([a / b for a, b in zip(mixed[count], mixed[1])])
    for count in switched:
        measured[f"tokens_per_second_switching/{count}"] = spread(switched[count])
        measured[f"times_switching/{count}"] = spread([a / b for a, b in zip(mixed[count], switched[count])])
    for count, replies in differ.items():
        measured[f"replies_that_differ/{count}"] = spread([replies])
    for name, speeds in in_form.items():
        measured[f"tokens_per_second_in_{name}"] = spread(speeds)
        ours_then = mixed[int(name.rpartition("/")[2])]
        measured[f"times_{name}"] = spread([a / b for a, b in zip(ours_then, speeds)])
    parameters = sum(p.numel() for n, p in peft.named_parameters() if "lora_" not in n)
    settings = {
        "model": f"{args.model}, {parameters:,} parameters, float32, CPU",
        "lora": "r 8 on all linear layers",
        "requests": REQUESTS,
        "rows": ROWS,
        "prompt_tokens": PROMPT,
        "new_tokens": NEW,
    }
    emit(
        report(f"mixed_adapters_{args.model.replace('.', '_')}", settings, measured, args.repeats, args.threads),
        args.output,
    )


if __name__ == "__main__":
    main()
