"""Does the form of the KL penalty change the gold reward at equal KL and equal budget, or only where training stops?

    nice python benchmarks/kl_study.py --seeds 0,1,2        does what is missing of these seeds; results/kl_study_gold.jsonl grows
    python benchmarks/kl_study.py --analyse                 from the rows alone: results/kl_study_gold.json and kl_study_gold.svg
    python benchmarks/kl_study.py --pilot 900               prints one seed's runs, step by step; keeps nothing

Pre-registered: what follows, and every number below, was committed before the first run that counts; rows name that commit. Seeds
from 900 on belong to the pilot, which fixed the numbers; they are never analysed.

Task       stories260K continues a first sentence with 48 tokens. Gold reward: VADER's compound, which no run optimises or stops
           by. Proxy: our reward model on 200 pairs that VADER tells apart by GAP or more, NOISE of them with their labels swapped.
           A seed is a block: it draws the pairs, the swaps, the reward model's start, the prompts' order, and all sampling.
Forms      Five penalties in the reward; the adaptive controller sets the KL (k1) to 1, 2.5 and 6 nats per reply. STEPS steps of
           64 replies each, whatever the form; the coefficient starts near where the pilot's ended. `none` is read at the first
           crossing of each target: the first policy whose rollouts in training exceed it; it spends fewer steps, which is told.
           Best of n, n = 2 to 64 by the proxy, from 64 replies of the model before PPO; KL at most ln n - (n - 1)/n.
Measured   One reply to each held-out prompt (40 % of all, never trained on by anything), the same random numbers for all forms:
           mean gold reward and mean k1. A run whose last policy is within a factor of 2 of its target is held, and counts at the k1
           that it has. One that ran away (in the pilot bregman and jensen_shannon do, the faster the larger the coefficient gets)
           is told, and read at its first crossing, as `none` is. Where that is not within a factor of 2 either, it is left out.
Model      gold = form + block + block x form + b1 s + b2 s^2 + noise, s = sqrt(KL), block and block x form random (a split plot).
           b by least squares within block x form; then the gold reward of each block x form, the mean over its runs, each moved
           along the curve to the three targets' mean of (s, s^2); of the forms that have a run in every block a two-way table
           forms x blocks. What it leaves, (forms - 1)(blocks - 1) degrees of freedom, is the error of a difference of two forms,
           which is never taken for less than the error by that difference's own values in the blocks.
Questions  1  Each form against `kl`, two-sided, Holm over the forms, 5 %: does it differ?
           2  Each form against `kl`, two one-sided tests within MARGIN = 0.03, Holm, 5 %: is it equivalent?
           A form may be both (it differs by little), or neither: then nothing is claimed. "The form does not matter" is claimed
           only if all five are equivalent.
           3  Described, not tested: each form against best of n at 1 and 2.5 nats; gold at each target; last coefficients.
Stopping   BLOCKS = 8 blocks, seeds 0 to 7, in as many sittings as it takes. Questions 1 and 2 are answered once, when all are
           there: before, differences and intervals are shown as interim, and nothing is claimed. Incomplete blocks do not count.

A run is not resumed in its middle: each finished one is a row, with commit, processor and versions; what is missing is done anew.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import sys
import tempfile
import time
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from _common import RESULTS, data_folder, emit, machine, report
from _kl_analysis import BEST_OF, BLOCKS, TARGETS, analyse, best_of, is_near
from _kl_figure import draw
from stories_sentiment import REWARD
from vader_reward import score

from rlhf_ray.config import EvaluateConfig, PPOConfig, RewardConfig
from rlhf_ray.console import NullConsole
from rlhf_ray.data.load import load_rows
from rlhf_ray.data.prompts import Prompt
from rlhf_ray.data.splits import is_held_out, prompt_hash
from rlhf_ray.errors import Interrupted
from rlhf_ray.maths.standard_errors import standard_error
from rlhf_ray.metrics import read_metrics
from rlhf_ray.runtime.session import process_session
from rlhf_ray.stages.evaluation_models import EvaluationModels, load_evaluation_models
from rlhf_ray.stages.start import ppo, reward
from rlhf_ray.storage.files import atomic_write_text
from rlhf_ray.storage.run_folder import git_commit, versions

ROWS = RESULTS / "kl_study_gold.jsonl"
FIGURE = Path(__file__).with_name("kl_study_gold.svg")
PILOT_FROM = 900

HELD_OUT = 0.4
PAIRS, NOISE, GAP = 200, 0.1, 0.8
STEPS = 16
POOL_PROMPTS, POOL = 128, 64
START = {
    "kl": {1.0: 0.6, 2.5: 0.4, 6.0: 0.2},
    "clamped_kl": {1.0: 0.6, 2.5: 0.35, 6.0: 0.2},
    "bregman": {1.0: 1.0, 2.5: 0.5, 6.0: 0.25},
    "jensen_shannon": {1.0: 2.5, 2.5: 1.2, 6.0: 0.6},
    "squared_error": {1.0: 0.6, 2.5: 0.3, 6.0: 0.15},
}
"""Coefficient at the first step, by target."""

# Every figure that could change a number is written out: the study must not move with the defaults.
OPTIMIZER: dict[str, Any] = {
    "optim": "adamw_torch",
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-5,
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "constant",
    "min_lr_ratio": 1.0,
}
LORA = {"r": 8, "lora_alpha": 16.0, "lora_dropout": 0.0, "target_modules": "all-linear", "use_rslora": False}
PROXY: dict[str, Any] = {
    **OPTIMIZER,
    "init_from": "base",
    "lora": LORA,
    "learning_rate": 2e-3,
    "warmup_steps": 2,
    "num_train_epochs": 4.0,
    "train_batch_size": 32,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "eval_steps": 1000,
    "max_length": 128,
    "center_rewards_coefficient": 0.0,
    "add_eos_token": False,  # the pairs were cut after a fixed number of tokens: no reply is complete
    "load_best_model_at_end": False,
}
POLICY: dict[str, Any] = {
    **OPTIMIZER,
    "lora": LORA,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "stop_token_ids": [1],
    "rollout_batch_size": 64,
    "rollout_chunk_size": 64,
    "num_ppo_epochs": 2,
    "num_mini_batches": 2,
    "per_device_train_batch_size": 32,
    "response_length": 48,
    "temperature": 1.0,
    "advantage_estimator": "gae",
    "num_generations": 1,
    "value": {"init_from": "policy", "adapter": "shared", "learning_rate": 1e-3, "warmup_steps": 0},
    "gamma": 1.0,
    "lam": 0.95,
    "cliprange": 0.2,
    "cliprange_value": None,
    "vf_coef": 0.1,
    "whiten_rewards": False,
    "whiten_advantages": True,
    "missing_eos_penalty": None,
    "reward_baseline": 0.0,
    "normalize_rewards": False,
    "reward_clip": None,
    "use_kl_loss": False,
    "target_kl": None,
    "loss_aggregation": "token_mean",
    "ratio_level": "token",
    "entropy_coef": 0.0,
    "load_best_model_at_end": False,
    "eval_on_start": False,
    "max_steps": STEPS,
}
CONTROLLER = {"kl_controller": "adaptive", "kl_step_size": 0.5}
SETTINGS = {
    "model": "stories260K, 260,032 parameters, float32, CPU",
    "held_out_fraction": HELD_OUT,
    "pairs": {"count": PAIRS, "noise": NOISE, "gap": GAP},
    "pool": {"prompts": POOL_PROMPTS, "replies": POOL},
    "start": {form: {f"{target:g}": value for target, value in by.items()} for form, by in START.items()},
    "proxy": PROXY,
    "policy": POLICY | CONTROLLER,
}


class Block:
    """All runs of one seed, in a scratch folder."""

    def __init__(self, data: Path, folder: Path, seed: int) -> None:
        self.data, self.folder, self.seed = data, folder, seed
        self.shared: dict[str, Any] = {
            "model_name_or_path": str(data / "models" / "stories260K"),
            "template": "none",
            "dtype": "float32",
            "defaults_version": 1,
            "seed": seed,
            "learner": {"num_workers": 0, "num_threads": 1},
            "report_to": [],
        }

    def pairs(self) -> Path:
        """The noisy pairs, which train, and the held-out ones, as they are, by which the proxy's accuracy is told."""
        with gzip.open(self.data / "pref_stories_sentiment.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        held_out, told_apart = [], []
        for row in rows:
            if is_held_out(prompt_hash(Prompt(row["user_input"])), HELD_OUT):
                held_out.append(row)
            else:
                better, worse = score([], [row["completion_a"], row["completion_b"]])
                told_apart += [row] if better - worse >= GAP else []
        draw_from = random.Random(self.seed)
        chosen = draw_from.sample(told_apart, PAIRS)
        for i in draw_from.sample(range(PAIRS), round(NOISE * PAIRS)):
            row = chosen[i]
            chosen[i] = {**row, "completion_a": row["completion_b"], "completion_b": row["completion_a"]}
        path = self.folder / "pairs.jsonl"
        atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in chosen + held_out))
        return path

    @cached_property
    def proxy(self) -> str:
        """The reward run; of one seed always the same."""
        data = {"train": str(self.pairs()), "format": "comparison", "held_out_fraction": HELD_OUT}
        config = RewardConfig(output_dir=str(self.folder / "proxy"), data=data, **PROXY, **self.shared)
        metrics = reward(config, NullConsole()).metrics
        print(f"seed {self.seed}: proxy right on {metrics['eval/accuracy']:.3f} of held-out pairs", file=sys.stderr)
        return config.output_dir

    @property
    def prompts(self) -> dict[str, Any]:
        rows = str(self.data / "prompts_tinystories.jsonl.gz")
        return {"train": rows, "format": "prompt", "held_out_fraction": HELD_OUT}

    @property
    def rewards(self) -> list[dict[str, Any]]:
        """The proxy in units of its own spread; gold watches."""
        return [
            {"name": "proxy", "run": self.proxy, "weight": 1.0, "normalize": True},
            {"name": "gold", "function": REWARD, "weight": 0.0},
        ]

    def train(self, penalty: str, target: float | None) -> tuple[Path, list[dict[str, float]]]:
        """The run and its metrics, step by step. Without a target: no penalty, until the KL exceeds the largest target."""
        path = self.folder / f"{penalty}-{target or 0:g}"
        how: dict[str, Any] = {"kl_penalty": penalty, "save_steps": 1, "save_total_limit": None, "eval_steps": STEPS}
        if target is None:
            how |= {"kl_coef": 0.0, "kl_controller": "fixed", "max_kl": max(TARGETS)}
        else:
            how |= {**CONTROLLER, "kl_target": target, "kl_coef": START[penalty][target]}
        config = PPOConfig(
            output_dir=str(path),
            data={**self.prompts, "eval_max_rows": 8},  # gold is measured by `measure`, on all of them
            rewards=self.rewards,
            **POLICY,
            **how,
            **self.shared,
        )
        try:
            ppo(config, NullConsole())
        except Interrupted:
            if target is not None:  # else by max_kl, as it should be
                raise
        return path, [row for row in read_metrics(path / "metrics.jsonl") if "kl/k1_per_response" in row]

    def models(self, policies: dict[str, str], reference: str | None) -> EvaluationModels:
        """Ready to answer held-out prompts."""
        config = EvaluateConfig(
            output_dir=str(self.folder),
            data=self.prompts,
            policies=[{"name": name, "policy": where} for name, where in policies.items()],
            rewards=self.rewards,
            response_length=POLICY["response_length"],
            stop_token_ids=POLICY["stop_token_ids"],
            rollout_chunk_size=64,
            per_device_eval_batch_size=64,
            sampling={"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0},
            **self.shared,
        )
        return load_evaluation_models(config, process_session(NullConsole(), 1), reference)

    def measure(self, policy: str) -> dict[str, float]:
        """Gold, proxy and KL of a run, RUN@STEP or `base` on the held-out prompts."""
        models = self.models({"base": "base", "policy": policy}, "base")
        prompts = models.tokenise(load_rows(models.config.data, "prompt").held_out, "drop").examples
        found = models.answer("policy", prompts).figures
        figures = {"kl": found.k1, "gold": found.parts["gold"], "proxy": found.parts["proxy"]}
        told = {name: float(values.mean()) for name, values in figures.items()}
        errors = {f"{name}_se": standard_error(values) for name, values in figures.items()}
        rest = {"length": float(found.length.mean()), "replies": float(len(prompts))}
        return {name: round(value, 6) for name, value in {**told, **errors, **rest}.items()}

    def controlled(self, penalty: str, target: float) -> list[dict[str, Any]]:
        """The last policy, or, if it ran away, the one at the first crossing: `ended` says then where the run went."""
        path, steps = self.train(penalty, target)
        row = {"penalty": penalty, "target": target, "coefficient": steps[-1]["kl/coef"], "steps": STEPS}
        row |= self.measure(str(path))
        if not is_near(row) and row["kl"] > target:
            at, ended = first_crossing(steps, target), {name: row[name] for name in ("kl", "gold", "proxy")}
            row |= {"steps": at, "ended": ended, **self.measure(f"{path}@{at}")}
        return [row]

    def uncontrolled(self) -> list[dict[str, Any]]:
        """`none` at the first crossings."""
        path, steps = self.train("none", None)
        rows = []
        for target in TARGETS:
            at = first_crossing(steps, target)
            found = {"penalty": "none", "target": target, "coefficient": 0.0, "steps": at}
            rows.append({**found, **self.measure(f"{path}@{at}")})
        return rows

    def sampled(self) -> list[dict[str, Any]]:
        """Best of n by the proxy, and the model before PPO."""
        models = self.models({"base": "base"}, None)
        asked = load_rows(models.config.data, "prompt").held_out[:POOL_PROMPTS]
        prompts = models.tokenise(asked, "drop").examples
        parts = models.answer("base", [prompt for prompt in prompts for _ in range(POOL)]).figures.parts
        gold, proxy = (parts[name].double().view(len(prompts), POOL).tolist() for name in ("gold", "proxy"))
        rows = [{"penalty": "best_of_n", "target": float(n), **best_of(n, gold, proxy)} for n in BEST_OF]
        return [*rows, {"penalty": "base", "target": 0.0, **self.measure("base")}]

    def parts(self) -> dict[tuple[str, float], Any]:
        """(penalty, target) of a part's first row -> what makes its rows."""
        found: dict[tuple[str, float], Any] = {("best_of_n", float(BEST_OF[0])): self.sampled}
        found["none", TARGETS[0]] = self.uncontrolled
        for target in TARGETS:
            for penalty in START:
                found[penalty, target] = lambda p=penalty, t=target: self.controlled(p, t)
        return found


def first_crossing(steps: list[dict[str, float]], target: float) -> int:
    """The step that left the first policy whose rollouts exceed the target; the last one if none does. The rollouts of step n are
    of the policy that step n - 1 left."""
    crossed = [row["step"] - 1 for row in steps if row["kl/k1_per_response"] > target]
    return int(crossed[0] if crossed else steps[-1]["step"])


def read_rows() -> list[dict[str, Any]]:
    """Ends the program where rows were made by other settings: they are of another study."""
    if not ROWS.exists():
        return []
    first, *rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    if first["settings"] != json.loads(json.dumps(SETTINGS)):
        sys.exit(f"{ROWS}: rows of other settings than this script's; move the file away, or restore the settings")
    return rows


def keep(rows: list[dict[str, Any]]) -> None:
    """Append whole lines: other processes may write as well."""
    with suppress(FileExistsError), ROWS.open("x", encoding="utf-8") as file:
        file.write(json.dumps({"settings": SETTINGS}) + "\n")
    with ROWS.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def run(seed: int, backwards: bool, data: Path) -> None:
    """What is missing of one seed."""
    about = {"cpu": machine(1)["cpu"], "commit": git_commit(), "versions": versions()}
    with tempfile.TemporaryDirectory() as scratch:
        parts = [*Block(data, Path(scratch), seed).parts().items()]
        for name, part in reversed(parts) if backwards else parts:
            if is_done(seed, name):
                continue
            wall, cpu = time.perf_counter(), time.process_time()
            rows = part()
            spent = {
                "seconds": round(time.perf_counter() - wall, 1),
                "cpu_seconds": round(time.process_time() - cpu, 1),
            }
            if not is_done(seed, name):
                keep([{"seed": seed, **row, **spent, **about} for row in rows])
            print(f"seed {seed}, {name[0]} {name[1]:g}: {spent}", file=sys.stderr, flush=True)


def is_done(seed: int, name: tuple[str, float]) -> bool:
    return any((row["seed"], row["penalty"], row["target"]) == (seed, *name) for row in read_rows())


def pilot(seed: int, only: str, data: Path) -> None:
    """What the controller does, step by step. only: form:target, ...; all of them if empty."""
    if seed < PILOT_FROM:
        sys.exit(f"--pilot {seed}: seeds below {PILOT_FROM} are of the study; expected {PILOT_FROM} or more")
    with tempfile.TemporaryDirectory() as scratch:
        block = Block(data, Path(scratch), seed)
        for penalty, target in [(p, t) for p in START for t in TARGETS]:
            if only and f"{penalty}:{target:g}" not in only.split(","):
                continue
            started = time.process_time()
            path, steps = block.train(penalty, target)
            trained = time.process_time()
            found = block.measure(str(path))
            spent = [round(trained - started), round(time.process_time() - trained)]
            shown = " ".join(f"{row['kl/k1_per_response']:.2f}" for row in steps)
            coefficients = " ".join(f"{row['kl/coef']:.3g}" for row in steps)
            print(f"{penalty} {target:g}: KL {shown}; coefficient {coefficients}; CPU s {spent}; {found}", flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seeds", default="", help="blocks to do what is missing of, e.g. 0,1,2")
    options.add_argument(
        "--backwards", action="store_true", help="begin with the last run, beside a process that does not"
    )
    options.add_argument("--pilot", type=int, help="print one seed's runs instead, 900 or more")
    options.add_argument("--only", default="", help="runs of the pilot, e.g. kl:1,bregman:2.5; default: all")
    options.add_argument("--analyse", action="store_true", help="only analyse the rows that there are")
    arguments = options.parse_args()
    if arguments.pilot is not None:
        pilot(arguments.pilot, arguments.only, data_folder())
    for seed in map(int, filter(None, arguments.seeds.split(","))):
        if seed >= BLOCKS:
            sys.exit(f"--seeds {seed}: the study has seeds 0 to {BLOCKS - 1}")
        run(seed, arguments.backwards, data_folder())
    if arguments.analyse:
        rows = read_rows()
        measured = analyse(rows)
        emit(report("kl_study_gold", SETTINGS, measured, measured["blocks"], 1), "")
        atomic_write_text(FIGURE, draw(measured))


if __name__ == "__main__":
    main()
