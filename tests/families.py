"""The whole chain on a tiny random model of every causal family of the installed transformers, and the table of what works.

    make families                                        all that are not done; rewrites the table in rlhf_ray/models/README.md
    python tests/families.py --only llama,qwen3_5_text   these, if they are not done

Each family has a process of its own: whatever one of them does, the others are tried. A cell is "yes", or what was said instead.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from byte_tokenizer import write_byte_tokenizer
from readme_tables import put

from rlhf_ray.config import LoraConfig, PPOConfig, RewardConfig, SFTConfig
from rlhf_ray.console import NullConsole
from rlhf_ray.errors import RlhfRayError
from rlhf_ray.launch.model_families import check_model
from rlhf_ray.metrics import read_metrics
from rlhf_ray.models.adapters import adapter_parameters, add_fresh, wrap
from rlhf_ray.models.backbone import trunk
from rlhf_ray.models.loading import quiet
from rlhf_ray.models.merge import merge_run
from rlhf_ray.plan.job_plan import plan
from rlhf_ray.sampler.engine import DecodeRequest, Sampler
from rlhf_ray.sampler.probe import tiny_config, tiny_model
from rlhf_ray.stages.start import ppo, reward, sft

README = Path(__file__).parents[1] / "rlhf_ray" / "models" / "README.md"
ROWS = Path(__file__).parents[1] / "benchmarks" / "results" / "families.jsonl"
COLUMNS = ("greedy", "SFT", "reward", "PPO", "mixed adapters", "merge", "plan")
SECONDS = 600
"""Of one family; most take ten."""
ALSO_SEE = ("internvl", "llava", "mistral3", "qwen3_vl", "qwen3_vl_moe", "smolvlm")
"""Model types whose causal language model is but a part of one that also sees."""
LACKING: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8, "head_dim": 128},
}
"""What default configs of transformers do not say, without which their own model cannot be made."""
VOCABULARY = 260
PROMPTS = ((5, 9, 200), (17,), (44, 45, 46, 47, 48, 49, 50, 51), (5, 9, 200, 100), (90, 91))
REPLY = 8
NEAR = 1e-3
"""Largest difference between the sampler's and the learner's log-probabilities, nats."""
ADAPTER = 0.07
"""Standard deviation of what is added to the weights of adapters that are tried together."""
LOCAL: dict[str, Any] = {"learner": {"num_workers": 0, "num_threads": 1}, "template": "none", "dtype": "float32"}


def families() -> list[str]:
    """The model types that transformers has a causal language model for, and those of ALSO_SEE."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *ALSO_SEE})


def try_family(model_type: str, folder: Path) -> dict[str, str]:
    """Column -> "yes", or what was said.   folder: an empty one.

    A family that is refused before anything is loaded has that line under every column; "" is a column that was not come to."""
    base = folder / "base"
    try:
        model, note = tiny(model_type)
        if model is not None:
            model.save_pretrained(base)
    except Exception as error:
        return {"tiny model": told(error)}
    if model is None:
        return {"tiny model": note}
    write_byte_tokenizer(base)
    found = {"tiny model": note}
    if (refusal := attempt(lambda: check_model(str(base)))) != "yes":
        return found | {"refused": refusal}
    jobs = chain(base, folder)
    steps: dict[str, Callable[[], None]] = {
        "greedy": lambda: check_greedy(model),
        "SFT": lambda: check_trained(sft(jobs["sft"], NullConsole())),
        "reward": lambda: check_trained(reward(jobs["reward"], NullConsole())),
        "PPO": lambda: check_ppo(ppo(jobs["ppo"], NullConsole())),
        "mixed adapters": lambda: check_mixed(model),
        "merge": lambda: check_merge(folder / "sft"),
        "plan": lambda: check_plan(jobs["ppo"]),
    }
    needs = {"reward": "SFT", "PPO": "reward", "merge": "SFT", "plan": "reward"}
    for column, step in steps.items():
        found[column] = (
            attempt(step) if found.get(needs.get(column, "greedy"), "yes") == "yes" or column not in needs else ""
        )
    return found


def tiny(model_type: str) -> tuple[Any, str]:
    """A random model of the family, and how it came to be; None and why not."""
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[model_type](**LACKING.get(model_type, {}))
    text = config.get_text_config(decoder=True)
    if text.model_type != model_type:
        return tiny_wrapper(config)
    if getattr(config, "is_encoder_decoder", False):
        return None, "an encoder and a decoder"
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    if getattr(config, "num_experts_per_tok", 0) is None:  # DeepSeek V2's default
        config.num_experts_per_tok = 2
    model = tiny_model(config, vocabulary=VOCABULARY)
    return model, "" if model is not None else "no tiny model could be made of its default config"


def tiny_wrapper(config: Any) -> tuple[Any, str]:
    """The same of a model that also sees or hears, on a tiny text decoder: all of it, as its checkpoints have it."""
    from transformers import AutoModelForImageTextToText, PreTrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    text = config.get_text_config(decoder=True)
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or getattr(config, "text_config", None) is not text:
        return None, f"as {text.model_type}"
    config.text_config = tiny_config(text, vocabulary=VOCABULARY)
    for name in config.to_dict():
        value = getattr(config, name)
        if isinstance(value, PreTrainedConfig) and name != "text_config":
            for field in ("num_hidden_layers", "depth"):
                if getattr(value, field, None):
                    setattr(value, field, 1)
    try:
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(0)
            model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
            for name, parameter in trunk(model).named_parameters():
                if parameter.ndim > 1 and name.endswith("weight") and "norm" not in name:
                    torch.nn.init.normal_(parameter, std=0.1)
    except Exception as error:
        why = told(error)
        return None, why if why.startswith("needs ") else f"no tiny model could be made of its default config ({why})"
    return model.eval(), ""


def chain(base: Path, folder: Path) -> dict[str, Any]:
    """One step of SFT, one of reward modelling, two of PPO on both."""
    rows = [{"instruction": f"Name the number after {i}.", "output": f"It is {i + 1}."} for i in range(16)]
    pairs = [{"prompt": row["instruction"], "chosen": row["output"], "rejected": "No."} for row in rows]
    for name, lines in (("rows", rows), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = {**LOCAL, "model_name_or_path": str(base), "lora": {"r": 4, "lora_alpha": 8}}
    short = {
        **common,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "max_length": 64,
        "train_batch_size": 8,
        "per_device_train_batch_size": 8,
    }
    data = {"train": str(folder / "rows.jsonl"), "eval_max_rows": 2}
    return {
        "sft": SFTConfig(output_dir=str(folder / "sft"), data=data, **short),
        "reward": RewardConfig(
            output_dir=str(folder / "reward"),
            data={**data, "train": str(folder / "pairs.jsonl")},
            sft=str(folder / "sft"),
            **{k: v for k, v in short.items() if k != "lora"},
        ),
        "ppo": PPOConfig(
            output_dir=str(folder / "ppo"),
            data=data,
            sft=str(folder / "sft"),
            rewards=[{"name": "helpful", "run": str(folder / "reward")}],
            rollout_batch_size=8,
            response_length=REPLY,
            max_steps=2,
            learning_rate=1e-2,
            eval_on_start=False,
            allow_chance_rewards=True,  # of two held-out pairs
            **{k: v for k, v in common.items() if k != "lora"},
        ),
    }


@torch.no_grad()
def check_greedy(model: Any) -> None:
    """The sampler's greedy replies to prompts of unequal length are those of `generate`, each prompt alone."""
    requests = [DecodeRequest(p, 0, REPLY, (), greedy=True) for p in PROMPTS]
    ours = [list(r.token_ids) for r in Sampler(model, 0, max_rows=3).run(requests)]
    how = {
        "do_sample": False,
        "max_new_tokens": REPLY,
        "min_new_tokens": REPLY,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    try:
        theirs = generated(model, how)
    except Exception as cached:
        try:  # a cache of transformers that does not know this config is no reason to compare nothing
            theirs = generated(model, {**how, "use_cache": False})
        except Exception as error:
            what = f"transformers' own generate fails ({told(cached)}; without a cache: {told(error)})"
            raise RuntimeError(f"{what}, so nothing was compared") from error
    assert ours == theirs, f"replies are not those of generate: {ours} and {theirs}"


def generated(model: Any, how: dict[str, Any]) -> list[list[int]]:
    """Replies of transformers' `generate`, each prompt alone."""
    with quiet():
        return [model.generate(torch.tensor([p]), **how)[0, len(p) :].tolist() for p in PROMPTS]


def check_trained(run: Any) -> None:
    assert run.steps == 1, f"{run.steps} steps"
    losses = [
        v for row in read_metrics(Path(run.run_dir) / "metrics.jsonl") for k, v in row.items() if k.endswith("loss")
    ]
    assert losses and all(v == v and abs(v) < 1e4 for v in losses), f"losses {losses}"


def check_ppo(run: Any) -> None:
    """The first ratio is 1, and the sampler's log-probabilities are the learner's."""
    rows = [
        row for row in read_metrics(Path(run.run_dir) / "metrics.jsonl") if "ratio/first_minibatch_max_deviation" in row
    ]
    assert len(rows) == 2, f"{len(rows)} steps"
    for name, limit in (("ratio/first_minibatch_max_deviation", 0.0), ("sampler/logprob_difference", NEAR)):
        worst = max(row[name] for row in rows)
        assert worst <= limit, f"{name} {worst:.2g}"


@torch.no_grad()
def check_mixed(model: Any) -> None:
    """Rows of two adapters and of none in one batch get the replies and log-probabilities that they get alone.

    The adapters change replies, and no more: ones of several times the size make a recursive model (HRM) chaotic, and rounding
    then decides its tokens."""
    lora = LoraConfig(r=4, lora_alpha=8)
    peft = wrap(model, lora, "policy", seed=1)
    add_fresh(peft, "value", lora, seed=2)
    draw = torch.Generator().manual_seed(3)
    for name in ("policy", "value"):
        for parameter in adapter_parameters(peft, name).values():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * ADAPTER)
    requests = [
        DecodeRequest(p, 7 + i, REPLY, (), adapter=("policy", "value", None)[i % 3]) for i, p in enumerate(PROMPTS * 2)
    ]
    sampler = Sampler(peft, 0, max_rows=len(requests))
    batch = sampler.run(requests)
    singly = [sampler.run([r])[0] for r in requests]
    together, alone = [r.token_ids for r in batch], [r.token_ids for r in singly]
    assert together == alone, f"{sum(a != b for a, b in zip(together, alone))} of {len(alone)} replies differ"
    worst = max(abs(a - b) for x, y in zip(batch, singly) for a, b in zip(x.logprobs, y.logprobs))
    assert worst <= NEAR, f"log-probabilities differ by {worst:.2g}"
    plain = [r.token_ids for r in sampler.run([DecodeRequest(r.prompt_ids, r.row_seed, REPLY, ()) for r in requests])]
    assert plain != together, "the adapters change nothing"


def check_merge(run: Path) -> None:
    """`merge` compares the merged model with the unmerged one by itself."""
    shutil.rmtree(merge_run(run, run.with_name("merged")))


def check_plan(job: PPOConfig) -> None:
    planned = plan(job.model_copy(update={"output_dir": job.output_dir + "-planned"}))
    assert all(planned.needed(stage) > 0 for stage in planned.stages), "no memory"


def attempt(step: Callable[[], object]) -> str:
    try:
        step()
    except Exception as error:
        return told(error)
    return "yes"


def told(error: BaseException) -> str:
    """One short line."""
    package = re.search(r"requires the (\S+) library", str(error)) if isinstance(error, ImportError) else None
    if package is not None:
        return f"needs {package[1]}"
    text = str(error.problems[0]) if isinstance(error, RlhfRayError) else f"{type(error).__name__}: {error}"
    return re.sub(r"/\S*/(?=[\w.]+)", "", " ".join(text.split()))[:300]


def apart(model_type: str) -> dict[str, Any]:
    """`try_family` in a process of its own."""
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe(duplex=False)
    started = time.monotonic()
    process = fork.Process(target=_child, args=(model_type, there))
    process.start()
    there.close()
    found: dict[str, Any] = {}
    if here.poll(SECONDS):
        try:
            found = here.recv()
        except EOFError:
            found = {"tiny model": "its process died"}
    else:
        found = {"tiny model": f"not done after {SECONDS} s"}
        process.kill()
    process.join()
    return {"family": model_type, **found, "seconds": round(time.monotonic() - started, 1)}


def _child(model_type: str, to: Connection) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        to.send(try_family(model_type, Path(folder)))
    to.close()


def table(rows: list[dict[str, Any]]) -> str:
    """Families that pass whole in one line, those that are refused in another, a row for each of the rest."""
    import transformers

    tried = [row for row in rows if any(column in row for column in COLUMNS)]
    whole = [row["family"] for row in tried if all(row.get(column) == "yes" for column in COLUMNS)]
    refused = [row for row in rows if "refused" in row]
    others = [row for row in tried if row["family"] not in whole]
    untried = [row for row in rows if row not in tried and row not in refused]
    lines = [
        f"transformers {transformers.__version__}: {len(rows)} of its {len(families())} model types with a causal language model,",
        "alone or in a model that also sees. A tiny random model of each: greedy replies against `generate`, one step of SFT",
        "and of reward modelling, two of PPO (first ratio 1, log-probabilities of sampler and learner within",
        f"{NEAR:g}), two adapters and the base in one batch against each row alone, `merge`, `plan`.",
        "",
        f"**Pass whole ({len(whole)}):** {', '.join(whole)}.",
        "",
    ]
    if others:
        lines += ["| family | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
        notes: list[str] = []
        for row in others:
            cells = []
            for column in COLUMNS:
                cell = row.get(column, "")
                if cell not in ("yes", ""):
                    notes.append(f"{row['family']}, {column}: {cell.replace('|', '/')}")
                    cell = f"no ({len(notes)})"
                cells.append(cell or "-")
            lines.append(f"| {row['family']} | " + " | ".join(cells) + " |")
        lines += ["", *(f"{number}. {note}" for number, note in enumerate(notes, 1)), ""]
    if refused:
        lines += ["**Refused before anything is loaded:** " + ", ".join(row["family"] for row in refused) + ".", ""]
    groups: dict[str, list[str]] = {}
    for row in untried:
        groups.setdefault(row["tiny model"], []).append(row["family"])
    lines += (
        ["**Not tried:**", "", *(f"- {why}: {', '.join(names)}" for why, names in sorted(groups.items()))]
        if groups
        else []
    )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="model types, comma separated; default: all")
    parser.add_argument("--output", type=Path, default=ROWS, help="rows, one a line; done ones are kept")
    options = parser.parse_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    lines = options.output.read_text().splitlines() if options.output.exists() else []
    rows = {row["family"]: row for row in map(json.loads, lines)}
    for name in options.only.split(",") if options.only else families():
        if name not in rows:
            rows[name] = apart(name)
            with options.output.open("a") as file:
                file.write(json.dumps(rows[name]) + "\n")
            print(json.dumps(rows[name]), flush=True)
            README.write_text(put(README.read_text(), "families", table([rows[key] for key in sorted(rows)])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
