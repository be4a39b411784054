"""One PPO step here and in TRL 1.12.0, the last release of TRL with a PPO trainer, on the same work.

    python benchmarks/ppo_step_vs_trl.py --trl-python PATH --output

PATH is the interpreter of a virtual environment of its own with `trl==1.12.0` (`make bench` makes one). Both sides train a
random Llama of 5.8 million parameters: LoRA r 8 on q and v for policy and value model alike, a reward model and a value model on a
trunk apart from the policy's, 64 prompts of 64 tokens, 64 new tokens, 4 PPO epochs of one minibatch in microbatches of 16, float32,
the same threads. Each run is a process of its own; runs alternate. Reported: episodes per second of the steps after the first,
and the peak memory of the process, in all and above what it held before its first step.

`ours_shared_trunk` is our `value.adapter: shared`, a value model head on the policy's own adapter: less work; TRL has no switch for
it.

A difference in the work of the other two: a reply of ours that samples the end token stops there (about 3 in 100 do); TRL's go on.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _common import emit, parser, report, spread

HERE = Path(__file__).parent
SIDES = {
    "ours": ("_ppo_step_ours.py", "own"),
    "trl": ("_ppo_step_trl.py",),
    "ours_shared_trunk": ("_ppo_step_ours.py", "shared"),
}
PROMPTS, PROMPT_TOKENS, NEW_TOKENS, VOCABULARY = 64, 64, 64, 2048


def make_models(folder: Path) -> None:
    """policy/, reward/ and prompts.jsonl in `folder`: what both sides read."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = special + [f"w{i}" for i in range(VOCABULARY - len(special))]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        num_labels=1,
    )
    torch.manual_seed(0)
    for name, kind in (("policy", LlamaForCausalLM), ("reward", LlamaForSequenceClassification)):
        kind(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    drawn = torch.randint(0, VOCABULARY - len(special), (8 * PROMPTS, PROMPT_TOKENS - 1)).tolist()
    rows = [{"prompt": " ".join(f"w{i}" for i in row)} for row in drawn]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_side(python: str, side: str, folder: Path, steps: int, threads: int) -> dict[str, Any]:
    """What the side's process prints last: {"seconds": [per step], "peak_bytes", "before_bytes"}."""
    script, *more = SIDES[side]
    command = [python, str(HERE / script), str(folder), str(steps), str(threads), *more]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        sys.exit(f"{script} failed:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    options = parser(__doc__, repeats=3, threads=2)
    options.add_argument("--trl-python", required=True, help="interpreter of an environment with trl==1.12.0")
    options.add_argument("--sides", default=",".join(SIDES), help="only these, with commas between them")
    options.add_argument("--steps", type=int, default=4, help="steps a run; the first is not counted (default 4)")
    args = options.parse_args()
    sides = args.sides.split(",")
    rates: dict[str, list[float]] = {side: [] for side in sides}
    peaks: dict[str, list[float]] = {side: [] for side in sides}
    grown: dict[str, list[float]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_models(folder)
        for repeat in range(args.repeats):
            for side in sides:
                python = args.trl_python if side == "trl" else sys.executable
                found = run_side(python, side, folder, args.steps, args.threads)
                seconds = found["seconds"][1:]
                rates[side].append(PROMPTS * len(seconds) / sum(seconds))
                peaks[side].append(found["peak_bytes"] / 2**20)
                grown[side].append((found["peak_bytes"] - found["before_bytes"]) / 2**20)
                print(
                    f"{repeat} {side}: {rates[side][-1]:.2f} episodes/s, peak {peaks[side][-1]:.0f} MiB",
                    file=sys.stderr,
                )
    measured: dict[str, Any] = {}
    for side in sides:
        measured[f"{side}/episodes_per_second"] = spread(rates[side])
        measured[f"{side}/peak_mib"] = spread(peaks[side])
        measured[f"{side}/peak_above_start_mib"] = spread(grown[side])
    for name, values in (("episodes_per_second", rates), ("peak", peaks), ("peak_above_start", grown)):
        for side in (side for side in sides if side != "trl"):
            ratios = [a / b for a, b in zip(values[side], values["trl"], strict=True)]
            measured[f"{side}_over_trl/{name}"] = spread(ratios)
    settings = {
        "model": "random Llama, 5.8 M parameters, float32, CPU",
        "prompts": PROMPTS,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "ppo_epochs": 4,
        "microbatch": 16,
        "lora": "r 8 on q_proj and v_proj, policy and critic",
        "steps_counted": args.steps - 1,
        "trl": "1.12.0",
    }
    emit(report("ppo_step_vs_trl", settings, measured, args.repeats, args.threads), args.output)


if __name__ == "__main__":
    main()
