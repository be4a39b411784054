"""One PPO step on rows as long as real ones: prompts as long as Alpaca's, replies that end anywhere up to 128 tokens.

    python benchmarks/ppo_step_real_lengths.py [--trl-python PATH] [--before CHECKOUT] [--size 260k] --output

ppo_step_vs_trl.py has rows of one length, where there is nothing to gain from how they are laid out. Here prompts have as many
tokens as Alpaca's instructions in its own template have words and punctuation marks (2,000 of them, from RLHF_RAY_DATA: 50 in the
mean, 78 at the 95th percentile), and a random Llama says its end token with a probability of 1 in 55 (as with Alpaca's replies half
of them end within 38 tokens, and 8 to 10 in 100 are cut off at 128). Both sides train LoRA r 8 on q and v for policy and value
model, with a reward model apart, on 64 prompts a step, 4 PPO epochs of one minibatch, microbatches of 16 rows, float32.

Sides: `ours`; `ours_budget`, with tokens_per_microbatch at 8 of the longest rows; `contiguous` and `padded`, our code with the row
layouts of defaults_version 3 and 2; `ours_before`, the code of another checkout; `trl`, TRL 1.12.0, which pads prompts of a batch
and replies alike. Each run is a process of its own; runs alternate. CPU seconds (user and system) of the process are reported
beside wall time, since other work on a machine disturbs them less.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _common import data_folder, emit, parser, report, spread

HERE = Path(__file__).parent
PROMPTS, NEW_TOKENS, VOCABULARY, EPOCHS, ROWS, TEMPERATURE = 64, 128, 2048, 4, 16, 0.7
SIZES: dict[str, dict[str, Any]] = {
    "5.8m": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 8},
    "260k": {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5, "num_attention_heads": 8},
    "135m": {
        **{"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
        **{"num_key_value_heads": 3, "vocab_size": 49152},
    },
}
"""135m: SmolLM2-135M's layers and vocabulary; its head is not tied to the embeddings, so that replies can be made to end."""
TOLD = ("episodes_per_second", "episodes_per_cpu_second", "peak_mib", "peak_above_start_mib", "reply_tokens")


def alpaca_lengths() -> list[int]:
    """Words and punctuation marks of every instruction, in Alpaca's template."""
    found = []
    with gzip.open(data_folder() / "sft_alpaca_2000.jsonl.gz", "rt") as file:
        for line in file:
            row = json.loads(line)
            more = ", paired with an input that provides further context" if row.get("input") else ""
            text = f"Below is an instruction that describes a task{more}. Write a response that appropriately completes the"
            text += f" request. ### Instruction: {row['instruction']}"
            text += f" ### Input: {row['input']} ### Response:" if more else " ### Response:"
            found.append(len(re.findall(r"\w+|[^\w\s]", text)))
    return found


def make_models(folder: Path, size: str) -> None:
    """policy/, reward/ and prompts.jsonl in `folder`: what both sides read."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = SIZES[size].get("vocab_size", VOCABULARY)
    words = special + [f"w{i}" for i in range(vocabulary - len(special))]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "num_labels": 1}
    config = LlamaConfig(**{"vocab_size": VOCABULARY, "max_position_embeddings": 512, **SIZES[size], **ids})
    torch.manual_seed(0)
    for name, kind in (("policy", LlamaForCausalLM), ("reward", LlamaForSequenceClassification)):
        model = kind(config)
        if name == "policy":
            end_now_and_then(model)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    lengths = alpaca_lengths()
    order = torch.randperm(len(lengths))[: 8 * PROMPTS].tolist()
    drawn = [torch.randint(0, VOCABULARY - len(special), (lengths[i] - 1,)).tolist() for i in order]
    rows = [{"prompt": " ".join(f"w{i}" for i in row)} for row in drawn]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def end_now_and_then(model: Any) -> None:
    """Make the end token's probability about 1 in 55 after any text, at TEMPERATURE: all embeddings share their first entry, which
    no layer reads or writes, and which the end token's logit alone reads. How large it is behind the last norm is measured."""
    import torch

    with torch.no_grad():
        embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        embeddings[:, 0] = 0.5
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight[0] = 0.0
            elif "_proj.weight" in name:
                weight[:, 0] = 0.0
        text = torch.randint(4, len(head), (8, 96), generator=torch.Generator().manual_seed(1))
        constant = float(model.model(input_ids=text, use_cache=False).last_hidden_state[..., 0].mean())
        head[:, 0], head[2] = 0.0, 0.0
        head[2, 0] = TEMPERATURE * math.log((len(head) - 1) / 54) / constant


def commands(args: Any, folder: Path) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Side -> its command and what is added to its environment."""
    longest = max(alpaca_lengths()) + NEW_TOKENS
    batch = {"rollout_batch_size": args.prompts, "rollout_chunk_size": args.prompts, "num_ppo_epochs": args.epochs}
    ours, here = str(HERE / "_ppo_step_ours.py"), str(HERE.parent)
    where = [str(folder), str(args.steps), str(args.threads)]

    def side(checkout: str, **fields: Any) -> tuple[list[str], dict[str, str]]:
        given = json.dumps({"response_length": NEW_TOKENS, "max_prompt_length": None, **batch, **fields})
        path = os.pathsep.join(p for p in (checkout, os.environ.get("PYTHONPATH", "")) if p)
        return [sys.executable, ours, *where, "own", given], {"PYTHONPATH": path}

    found = {"ours": side(here), "ours_budget": side(here, tokens_per_microbatch=ROWS * longest // 2)}
    found["contiguous"] = side(here, defaults_version=3)
    found["padded"] = side(here, defaults_version=2)
    if args.before:
        found["ours_before"] = side(str(Path(args.before).absolute()))
    if args.trl_python:
        settings = {"new_tokens": NEW_TOKENS, "prompts": args.prompts, "epochs": args.epochs, "at_once": ROWS}
        found["trl"] = [args.trl_python, str(HERE / "_ppo_step_trl.py"), *where, json.dumps(settings)], {}
    return {name: found[name] for name in found if not args.sides or name in args.sides.split(",")}


def run_side(command: list[str], more: dict[str, str], folder: Path) -> dict[str, Any]:
    """What the side's process prints last."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env={**os.environ, **more})
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def figures(found: dict[str, Any], prompts: int) -> dict[str, float]:
    """Of one run, without its first step."""
    seconds, cpu = found["seconds"][1:], found["cpu_seconds"][1:]
    told = {
        "episodes_per_second": prompts * len(seconds) / sum(seconds),
        "episodes_per_cpu_second": prompts * len(cpu) / sum(cpu),
        "peak_mib": found["peak_bytes"] / 2**20,
        "peak_above_start_mib": (found["peak_bytes"] - found["before_bytes"]) / 2**20,
    }
    if "reply_tokens" in found:
        told["reply_tokens"] = sum(found["reply_tokens"][1:]) / len(seconds) / prompts
    if "phases" in found:
        told |= {f"{name}_share": sum(times[1:]) / sum(seconds) for name, times in found["phases"].items()}
    if (found.get("real_token_share") or [None])[0] is not None:
        told["real_token_share"] = sum(found["real_token_share"][1:]) / len(seconds)
    return told


def main() -> None:
    options = parser(__doc__, repeats=3, threads=1)
    options.add_argument("--trl-python", help="interpreter of an environment with trl==1.12.0")
    options.add_argument("--before", help="another checkout of this project, to be measured as well")
    options.add_argument("--size", choices=SIZES, default="5.8m", help="of the models (default 5.8m)")
    options.add_argument("--prompts", type=int, default=PROMPTS, help=f"of a step (default {PROMPTS})")
    options.add_argument("--epochs", type=int, default=EPOCHS, help=f"of PPO (default {EPOCHS})")
    options.add_argument("--sides", help="only these, with commas between them")
    options.add_argument("--steps", type=int, default=3, help="steps a run; the first is not counted (default 3)")
    args = options.parse_args()
    runs: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_models(folder, args.size)
        sides = commands(args, folder)
        for repeat in range(args.repeats):
            for side, (command, more) in sides.items():
                runs.setdefault(side, []).append(figures(run_side(command, more, folder), args.prompts))
                print(repeat, side, {k: round(v, 3) for k, v in runs[side][-1].items()}, file=sys.stderr, flush=True)
    measured: dict[str, Any] = {}
    for side, found in runs.items():
        for name in found[0]:
            measured[f"{side}/{name}"] = spread([run[name] for run in found])
    for name in TOLD[:-1]:
        for base in (side for side in ("ours_before", "padded", "trl") if side in runs):
            for side in (side for side in ("ours", "ours_budget") if side in runs):
                ratios = [a[name] / b[name] for a, b in zip(runs[side], runs[base], strict=True)]
                measured[f"{side}_over_{base}/{name}"] = spread(ratios)
    settings = {
        "model": f"random Llama, {args.size}, float32, CPU",
        "prompts": args.prompts,
        "prompt_tokens": f"as Alpaca's: mean {statistics.mean(alpaca_lengths()):.1f}",
        "new_tokens": f"at most {NEW_TOKENS}, ending with probability 1 in 55",
        "ppo_epochs": args.epochs,
        "microbatch": ROWS,
        "lora": "r 8 on q_proj and v_proj, policy and critic",
        "steps_counted": args.steps - 1,
        "trl": "1.12.0" if args.trl_python else None,
    }
    emit(
        report(
            "ppo_step_real_lengths" + ("" if args.size == "5.8m" else f"_{args.size}"),
            settings,
            measured,
            args.repeats,
            args.threads,
        ),
        args.output,
    )


if __name__ == "__main__":
    main()
