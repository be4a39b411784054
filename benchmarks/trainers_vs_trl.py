"""A critic-free PPO step, SFT with packing, DPO and reward training here and by TRL's trainers, on the same rows and model.

    python benchmarks/trainers_vs_trl.py --trl-python PATH [--trl-path FOLDER] [--works grpo,sft] [--size 260k] --output

PATH: the interpreter of an environment with TRL; FOLDER: a newer TRL that takes precedence in it. Both sides train LoRA r 8 on q
and v of a random Llama in float32 on the CPU, with as many rows in a forward pass, by the same rows: prompts as long as Alpaca's
instructions in its template, replies as long as its outputs (at most 128 tokens). Each run is a process of its own; runs alternate.

    grpo     8 prompts of 8 replies a step, group advantages, KL in the loss, one epoch of one minibatch; replies end as in
             ppo_step_real_lengths.py; a reward model of the same size. Episodes a second.
    sft      packed: TRL's rows of max_length tokens, one a pass; ours the rows of a pass as one. Tokens a second.
    dpo      16 pairs a step, 8 a pass, the reference with adapters off. Tokens a second, prompts counted with each reply.
    reward   16 pairs a step, 8 a pass. Tokens a second.

Steps after the first are counted. Memory is the peak of the process.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from _common import data_folder, emit, parser, report, spread
from ppo_step_real_lengths import NEW_TOKENS, SIZES, VOCABULARY, alpaca_lengths, make_models, run_side

HERE = Path(__file__).parent
GENERATIONS, GRPO_ROWS, SFT_BATCH, PAIRS, AT_ONCE = 8, 64, 32, 16, 8
WORKS = ("grpo", "sft", "dpo", "reward")


def reply_lengths() -> list[int]:
    """Words and punctuation marks of every reply of Alpaca, at most NEW_TOKENS - 1: the end token comes behind."""
    with gzip.open(data_folder() / "sft_alpaca_2000.jsonl.gz", "rt") as file:
        outputs = [json.loads(line)["output"] for line in file]
    return [max(min(len(re.findall(r"\w+|[^\w\s]", text)), NEW_TOKENS - 1), 1) for text in outputs]


def write_rows(folder: Path, steps: int) -> dict[str, float]:
    """sft.jsonl and pairs.jsonl: one epoch of `steps` steps. Tokens of a step of each work, in the mean."""
    draw, prompts, replies = random.Random(0), alpaca_lengths(), reply_lengths()
    order = draw.sample(range(len(prompts)), len(prompts))

    def words(count: int) -> str:
        return " ".join(f"w{draw.randrange(VOCABULARY - 4)}" for _ in range(count))

    examples = [(prompts[i] - 1, replies[i]) for i in order[: SFT_BATCH * steps]]
    pairs = [(prompts[i] - 1, replies[i], replies[j]) for i, j in pairwise(order)][: PAIRS * steps]
    sft = [{"prompt": words(p), "completion": " " + words(r)} for p, r in examples]
    ranked = [{"prompt": words(p), "chosen": " " + words(a), "rejected": " " + words(b)} for p, a, b in pairs]
    for name, rows in (("sft", sft), ("pairs", ranked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    of_pairs = sum(2 * (p + 2) + a + b for p, a, b in pairs) / steps
    return {"sft": sum(p + r + 2 for p, r in examples) / steps, "dpo": of_pairs, "reward": of_pairs}


def shapes(tokens: dict[str, float]) -> dict[str, Any]:
    """What both sides read of each work."""
    passes = SFT_BATCH // AT_ONCE
    pairs = {"rows": "pairs.jsonl", "batch": PAIRS, "at_once": AT_ONCE}
    sft = {"rows": "sft.jsonl", "batch": SFT_BATCH, "at_once": AT_ONCE, "passes": passes}
    return {
        "sft": {**sft, "pass_tokens": round(tokens["sft"] / passes)},
        "dpo": pairs,
        "reward": pairs,
        "grpo": {
            **{"rows": "prompts.jsonl", "batch": GRPO_ROWS, "at_once": 2 * AT_ONCE},
            **{"num_generations": GENERATIONS, "new_tokens": NEW_TOKENS},
        },
    }


def commands(args: Any, folder: Path, work: str) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Side -> its command and what is added to its environment."""
    where, own = [str(folder), str(args.steps), str(args.threads)], os.environ.get("PYTHONPATH", "")

    def path(*first: str) -> dict[str, str]:
        return {"PYTHONPATH": os.pathsep.join(p for p in (*first, own) if p)}

    newer = (str(Path(args.trl_path).absolute()),) if args.trl_path else ()
    trl = [args.trl_python, str(HERE / "_trainer_trl.py"), work, *where], path(*newer)
    if work != "grpo":
        return {
            "ours": ([sys.executable, str(HERE / "_trainer_ours.py"), work, *where], path(str(HERE.parent))),
            "trl": trl,
        }
    fields = {
        **{"advantage_estimator": "grpo", "num_generations": GENERATIONS, "use_kl_loss": True, "kl_penalty": "k3"},
        **{"num_ppo_epochs": 1, "response_length": NEW_TOKENS, "max_prompt_length": None},
    }
    ours = [sys.executable, str(HERE / "_ppo_step_ours.py"), *where, "none", json.dumps(fields)]
    return {"ours": (ours, path(str(HERE.parent))), "trl": trl}


def figures(found: dict[str, Any], per_step: float) -> dict[str, float]:
    """Of one run, without its first step. per_step: episodes or tokens."""
    seconds, cpu = found["seconds"][1:], found["cpu_seconds"][1:]
    return {
        "per_second": per_step * len(seconds) / sum(seconds),
        "per_cpu_second": per_step * len(cpu) / sum(cpu),
        "peak_mib": found["peak_bytes"] / 2**20,
        "peak_above_start_mib": (found["peak_bytes"] - found["before_bytes"]) / 2**20,
    }


def main() -> None:
    options = parser(__doc__, repeats=3, threads=1)
    options.add_argument("--trl-python", required=True, help="interpreter of an environment with TRL")
    options.add_argument("--trl-path", help="folder of a newer TRL, put before that environment's own")
    options.add_argument("--works", default=",".join(WORKS), help="only these, with commas between them")
    options.add_argument("--size", choices=SIZES, default="5.8m", help="of the models (default 5.8m)")
    options.add_argument("--steps", type=int, default=4, help="steps a run; the first is not counted (default 4)")
    args = options.parse_args()
    measured: dict[str, Any] = {}
    release = ""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_models(folder, args.size)
        tokens = write_rows(folder, args.steps)
        (folder / "shape.json").write_text(json.dumps(shapes(tokens)))
        for work in args.works.split(","):
            runs: dict[str, list[dict[str, float]]] = {}
            for repeat in range(args.repeats):
                for side, (command, more) in commands(args, folder, work).items():
                    found = run_side(command, more, folder)
                    release = found.get("trl", release)
                    counted = (
                        found["tokens"] / args.steps if side == "trl" and work in tokens else None
                    )  # packs are not full
                    per_step = tokens.get(work, GRPO_ROWS) if counted is None else counted
                    runs.setdefault(side, []).append(figures(found, per_step))
                    told = {k: round(v, 3) for k, v in runs[side][-1].items()}
                    print(
                        repeat,
                        work,
                        side,
                        told,
                        found.get("tokens"),
                        found.get("reply_tokens"),
                        file=sys.stderr,
                        flush=True,
                    )
            for side, found_all in runs.items():
                for name in found_all[0]:
                    measured[f"{work}/{side}/{name}"] = spread([run[name] for run in found_all])
            for name in runs["ours"][0]:
                ratios = [a[name] / b[name] for a, b in zip(runs["ours"], runs["trl"], strict=True)]
                measured[f"{work}/ours_over_trl/{name}"] = spread(ratios)
    settings = {
        "model": f"random Llama, {args.size}, float32, CPU",
        "lora": "r 8 on q_proj and v_proj",
        "works": args.works.split(","),
        "steps_counted": args.steps - 1,
        "tokens_a_step": {k: round(v) for k, v in tokens.items()},
        "replies_a_step": GRPO_ROWS,
        "trl": release,
    }
    emit(report("trainers_vs_trl", settings, measured, args.repeats, args.threads), args.output)


if __name__ == "__main__":
    main()
