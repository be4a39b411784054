"""Make fixtures.tar.xz: folders as the version of commit 995aa37 left them, which every later version must read.

It was run once, at that commit, in a checkout of it:

    python tests/old_files/make.py /tmp/old

A later version must not make them anew: files of its own would prove nothing about old ones. A format that is added later gets an
archive of its own. All is said in commands and job files, whose paths are relative to the folder of making; where a run recorded an
absolute path all the same, tests/integration/test_old_files.py puts its own in. Takes about ten minutes on two busy cores.

base/            a random Llama of 29 thousand parameters with a tokenizer of bytes, which all runs share
runs/            finished: sft, reward, ppo, split (max_staleness 1, on Ray), pipeline, sweep; sft-adapter-merged
half/            the same jobs, cut off on the way by kill -9 (split: by its reward function; sweep: by SIGTERM)
registry/        helper v1 (runs/sft) and v2 (runs/ppo), judge v1 (runs/reward)
answers.json     where and on what it was made, and what `generate` and `score` said
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import yaml

ARCHIVE = Path(__file__).with_name("fixtures.tar.xz")
ANIMALS = ("wren", "toad", "carp", "moth", "crab", "lark", "newt", "hare", "mole", "swan")
ASKED = [f"{verb} the {animal}." for animal in ANIMALS for verb in ("Name", "Draw", "Feed", "Find", "Greet")]
REWARD = '''
"""The share of ASCII characters. Files beside it make it fail at a call of its process, or slow, in seconds."""
import time
from pathlib import Path

CALLS = 0
HERE = Path(__file__).parent


def score(prompts, completions, **columns):
    global CALLS
    CALLS += 1
    if (HERE / "fail_at").is_file() and CALLS >= int((HERE / "fail_at").read_text()):
        raise RuntimeError("the reward service is gone")
    if (HERE / "slow").is_file():
        time.sleep(float((HERE / "slow").read_text()))
    return [sum(c.isascii() for c in text) / max(len(text), 1) for text in completions]
'''
# The registry notes who promoted, and on which machine.
START = "import socket, sys; socket.gethostname = lambda: 'somewhere'; from rlhf_ray.cli import main; sys.exit(main())"
COMMAND = [sys.executable, "-m", "rlhf_ray.cli"]

SHARED: dict[str, Any] = {
    "model_name_or_path": "base",
    "template": "alpaca_short",
    "learner": {"num_workers": 0, "num_threads": 1},
    "report_to": [],
}
LORA = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
SUPERVISED: dict[str, Any] = {
    "train_batch_size": 8,
    "per_device_train_batch_size": 8,
    "max_length": 96,
    "learning_rate": 1e-2,
    "save_steps": 1,
    "save_total_limit": 1,
    "eval_steps": 2,
}
SFT = {"data": {"train": "data/sft.jsonl"}, "lora": LORA, **SUPERVISED, "max_steps": 4, "logging_steps": 2}
SFT |= {"load_best_model_at_end": True}
PAIRS = {"data": {"train": "data/pairs.jsonl"}, **SUPERVISED, "max_steps": 3, "logging_steps": 1}
ROLLOUTS: dict[str, Any] = {
    "data": {"train": "data/prompts.jsonl", "eval_max_rows": 4},
    "rollout_batch_size": 16,
    "rollout_chunk_size": 8,
    "num_mini_batches": 2,
    "num_ppo_epochs": 1,
    "per_device_train_batch_size": 8,
    "response_length": 8,
    "learning_rate": 1e-2,
    "save_steps": 1,
    "save_total_limit": 1,
    "eval_steps": 1,
}
FUNCTION = {"name": "ascii", "function": "ascii_reward.py:score"}
PPO: dict[str, Any] = {
    **ROLLOUTS,
    "sft": "runs/sft",
    "rewards": [{"name": "helpful", "run": "runs/reward"}, {**FUNCTION, "weight": 0.5}],
    "max_steps": 3,
    "kl_controller": "adaptive",
    "normalize_rewards": True,
    "load_best_model_at_end": True,
    "over_optimisation_patience": 5,
}
ON_CPU = {"num_threads": 1, "num_gpus": 0.0}
SPLIT: dict[str, Any] = {
    **ROLLOUTS,
    "lora": LORA,
    "rewards": [FUNCTION],
    "placement": "split",
    "max_staleness": 1,
    "learner": {"num_workers": 1, **ON_CPU},
    "generator": {"num_actors": 1, "num_cpus": 0.25, **ON_CPU},
    "scorer": {"num_actors": 1, "num_cpus": 0.25, **ON_CPU},
    "max_steps": 4,
    "eval_on_start": False,
    "eval_steps": 4,
}
PIPELINE: dict[str, Any] = {
    "sft": {**SFT, "max_steps": 2, "save_steps": 2},
    "reward": {**PAIRS, "max_steps": 2},
    "ppo": {**ROLLOUTS, "max_steps": 1},
    "evaluate": {"data": {"train": "data/prompts.jsonl"}, "response_length": 8, "rollout_chunk_size": 8},
}
SWEEP: dict[str, Any] = {
    "learner": {"num_threads": 1},
    "ppo": {**ROLLOUTS, "lora": LORA, "rewards": [FUNCTION], "rollout_batch_size": 8, "max_steps": 2},
    "space": {"kl_coef": [0.01, 0.1, 1.0]},
    "max_concurrent_trials": 1,
    "kl_cap": 50.0,
}
JOBS = {"sft": SFT, "reward": {**PAIRS, "sft": "runs/sft"}, "ppo": PPO, "split": SPLIT}
JOBS |= {"pipeline": PIPELINE, "sweep": SWEEP}
STAGES = {"split": "ppo"}


def main(place: Path) -> None:
    place.mkdir()
    os.chdir(place)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "LOGNAME": "somebody"}
    make_base(Path("base"))
    make_data()
    for name in JOBS:
        command(STAGES.get(name, name), job(name, "runs"))
    command("merge", "runs/sft")
    for name, fault in (
        ("sft", "learner:step_end:step=3:kill"),
        ("reward", "learner:step_end:step=2:kill"),
        ("ppo", "learner:rollout:step=3:kill"),
        ("pipeline", "learner:step_end:call=3:kill"),  # once in sft; the second one in reward
    ):
        command(name, job(name, "half"), code=-signal.SIGKILL, RLHF_RAY_FAULT=fault)
    Path("fail_at").write_text("7")  # two calls a step: rollout 4, while step 3 learns from rollout 3
    command("ppo", job("split", "half"), code=75)
    Path("fail_at").unlink()
    half_a_sweep()
    promote = [sys.executable, "-c", START, "promote"]
    for run, alias in (("sft", "helper"), ("ppo", "helper"), ("reward", "judge")):
        words = [f"runs/{run}", "--alias", alias, "--force", "--reason", "three steps of training"]
        subprocess.run([*promote, *words], check=True)
    Path("answers.json").write_text(json.dumps(answers(place), indent=1))
    pack(place)


def job(name: str, folder: str) -> str:
    """The job file of run folder/name."""
    path = Path(f"{folder}-{name}.yaml")
    path.write_text(yaml.safe_dump({**SHARED, "output_dir": f"{folder}/{name}", **JOBS[name]}))
    return str(path)


def command(*words: str, code: int = 0, **environment: str) -> str:
    """A command, which must end with `code`; what it printed."""
    done = subprocess.run([*COMMAND, *words], env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True)
    assert done.returncode == code, f"{' '.join(words)} ended with {done.returncode}, not {code}"
    return done.stdout


def half_a_sweep() -> None:
    """Two trials done, the third one at step 1."""
    Path("slow").write_text("3")
    process = subprocess.Popen([*COMMAND, "sweep", job("sweep", "half")])
    trials = Path("half/sweep/trials")
    while len(list(trials.glob("*/summary.json"))) < 2 or len(list(trials.glob("*/checkpoints/step_000001"))) < 1:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert len(list(trials.glob("*/summary.json"))) == 2
    Path("slow").unlink()


def answers(place: Path) -> dict[str, Any]:
    import torch
    from transformers import __version__ as transformers

    asked = ("--instruction", "Name the toad.", "--greedy", "--max-new-tokens", "8", "--json")
    policies = ("runs/sft", "runs/ppo", "runs/sft-adapter-merged", "registry:helper@v1", "registry:helper")
    said = {p: json.loads(command("generate", "--policy", p, "--model", "base", *asked)) for p in policies}
    reply = ("--prompt", "Name the toad.", "--completion", "yesyes")
    scored = json.loads(command("score", "--run", "runs/reward", *reply, "--json"))
    cpu = re.search("model name\\s*: (.*)", Path("/proc/cpuinfo").read_text())
    made_on = {"torch": torch.__version__, "transformers": transformers, "cpu": cpu[1] if cpu else ""}
    made_on |= {"instructions": torch.backends.cpu.get_cpu_capability()}
    return {"place": str(place), "made_on": made_on, "generate": said, "score": scored}


def make_base(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    letters = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(letters)}, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def make_data() -> None:
    Path("data").mkdir()
    Path("ascii_reward.py").write_text(REWARD)
    pairs = [("yes" * (1 + i % 3), "no") for i in range(len(ASKED))]
    rows: dict[str, list[dict[str, Any]]] = {
        "prompts": [{"instruction": text, "input": ""} for text in ASKED],
        "sft": [{"instruction": text, "input": "", "output": "yes"} for text in ASKED],
        "pairs": [{"user_input": t, "completion_a": a, "completion_b": b} for t, (a, b) in zip(ASKED, pairs)],
    }
    for name, found in rows.items():
        Path(f"data/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))


def pack(place: Path) -> None:
    """All but job files, reports and hidden files (locks), in the order of their names, without owner and time."""
    inner = ((path, path.relative_to(place).parts) for path in sorted(place.rglob("*")))
    shown = [p for p, parts in inner if not any(part.startswith(".") for part in parts)]
    kept = [p for p in shown if p.name != "report.html" and (p.parent != place or p.suffix != ".yaml")]
    with tarfile.open(ARCHIVE, "w:xz", preset=9) as archive:
        for path in kept:
            member = archive.gettarinfo(str(path), str(path.relative_to(place)))
            member.uid = member.gid = member.mtime = 0
            member.uname = member.gname = ""
            archive.addfile(member, io.BytesIO(path.read_bytes()) if path.is_file() else None)
    print(f"{ARCHIVE}: {ARCHIVE.stat().st_size:,} bytes, {len(kept)} entries")


if __name__ == "__main__":
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    main(Path(sys.argv[1]).absolute())
