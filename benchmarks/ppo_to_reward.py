"""How long PPO takes to the same reward here and in TRL 1.12.0, each in the best of its configurations tried.

    python benchmarks/ppo_to_reward.py --trl-python PATH --output

The other comparisons hold the algorithm fixed; here each side has what it offers. The bundled task: its base after SFT, merged,
is the policy of both sides, its reward model, merged, their reward; both read the same prompts, sample at temperature 1, adapt all
linear layers with r 16 and pay 0.05 for a nat of k1. A run has EPISODES episodes on one thread, and its time is what its steps take
of the CPU (no start, no imports; other work on the machine disturbs that less than wall time) until the mean score of the last
WINDOW replies has risen by RISE over the SFT model's; a run that never gets there counts as endless. Runs of the sides alternate.

Configurations: ours the demo's own, with a value model apart or a head on the policy's adapter, and the critic-free estimators, in
steps of 128 replies or fewer; TRL's epochs, batch sizes and learning rates (its optimizer takes one step an epoch, whatever
num_mini_batches says, since gradient accumulation spans the batch). Each is tried with the seeds of --pick; the quickest in the
median runs against the other side's with --seeds, which it was not picked by. KL at the goal is told: it can buy a reward.

It takes about an hour and may take several sittings: each finished run is a row of results/ppo_to_reward.jsonl, and is not done
again; delete the file to begin anew.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import statistics
import sys
import tempfile
from itertools import accumulate
from pathlib import Path
from typing import Any

from _common import RESULTS, emit, parser, report, spread
from ppo_step_real_lengths import run_side

from rlhf_ray.config import RewardConfig, SFTConfig
from rlhf_ray.console import LocalConsole
from rlhf_ray.data.tinyworld import build_base, write_world
from rlhf_ray.models.lineage import MERGED
from rlhf_ray.models.merge import merge_run
from rlhf_ray.stages.demo import demo_config
from rlhf_ray.stages.start import reward, sft

HERE = Path(__file__).parent
ROWS = RESULTS / "ppo_to_reward.jsonl"
EPISODES, WINDOW, NEW_TOKENS = 5120, 256, 32
LORA = {"r": 16, "lora_alpha": 32}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RISE = 1.0
"""Of the mean score; the scores of the SFT model's replies have a standard deviation of 1.06."""
BATCH = {"rollout_batch_size": 128, "num_mini_batches": 4, "num_ppo_epochs": 2, "per_device_train_batch_size": 32}
GROUPS = {"num_generations": 4}


def of(replies: int) -> dict[str, int]:
    """A step of fewer replies, minibatches as large as before."""
    return {"rollout_batch_size": replies, "num_mini_batches": replies // 32}


OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "value model, lr 1e-3": ("own", {**BATCH, "learning_rate": 1e-3}),
    "value model, lr 3e-3": ("own", {**BATCH, "learning_rate": 3e-3}),
    "value head on the policy, lr 1e-3": ("shared", {**BATCH, "learning_rate": 1e-3}),
    "value head on the policy, lr 3e-3": ("shared", {**BATCH, "learning_rate": 3e-3}),
    "rloo, lr 1e-3": ("none", {**BATCH, **GROUPS, "advantage_estimator": "rloo", "learning_rate": 1e-3}),
    "rloo, lr 3e-3": ("none", {**BATCH, **GROUPS, "advantage_estimator": "rloo", "learning_rate": 3e-3}),
    "grpo, lr 3e-3": ("none", {**BATCH, **GROUPS, "advantage_estimator": "grpo", "learning_rate": 3e-3}),
    "rloo of 64, lr 3e-3": (
        "none",
        {**BATCH, **GROUPS, **of(64), "advantage_estimator": "rloo", "learning_rate": 3e-3},
    ),
    "rloo of 32, lr 3e-3": (
        "none",
        {**BATCH, **GROUPS, **of(32), "advantage_estimator": "rloo", "learning_rate": 3e-3},
    ),
    "grpo of 32, lr 3e-3": (
        "none",
        {**BATCH, **GROUPS, **of(32), "advantage_estimator": "grpo", "learning_rate": 3e-3},
    ),
    "value head on the policy, of 32, lr 3e-3": ("shared", {**BATCH, **of(32), "learning_rate": 3e-3}),
}
TRL: dict[str, dict[str, Any]] = {
    f"{epochs} epochs of {prompts}, lr {rate:g}": {"epochs": epochs, "prompts": prompts, "learning_rate": rate}
    for epochs, prompts, rate in (
        (4, 128, 1e-3),
        (4, 128, 3e-3),
        (4, 64, 1e-3),
        (4, 64, 3e-3),
        (4, 32, 1e-3),
        (2, 32, 1e-3),
        (2, 32, 3e-3),
        (1, 32, 3e-3),
    )
}


def make_models(folder: Path) -> None:
    """policy/, reward/ and prompts.jsonl in `folder`: what both sides read."""
    write_world(folder / "world", 0)
    build_base(folder / "base", 0, num_threads=1)
    config = demo_config(folder)
    shared: dict[str, Any] = {
        "model_name_or_path": config.model_name_or_path,
        "template": config.template,
        "learner": {"num_workers": 0, "num_threads": 1},
        "report_to": [],
    }
    console = LocalConsole(quiet=True)
    start = sft(SFTConfig(**{**config.sft, **shared, "output_dir": str(folder / "sft")}), console)
    judge = {**config.reward, **shared, "output_dir": str(folder / "judge"), "sft": start.run_dir}
    judged = reward(RewardConfig(**judge), console)
    merge_run(start.run_dir, folder / "policy")
    merge_run(judged.run_dir, folder / "reward")
    (
        folder / "reward" / MERGED
    ).unlink()  # prompts are written in the template below, so that both sides read plain text
    rows = [json.loads(line) for line in (folder / "world" / "prompts.jsonl").read_text().splitlines()]
    prompts = [{"prompt": in_template(row["instruction"], row["input"])} for row in rows]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))


def in_template(instruction: str, more: str) -> str:
    """As alpaca_short writes it, which TRL's side does not have."""
    given = f"### Input:\n{more}\n\n" if more else ""
    return f"### Instruction:\n{instruction}\n\n{given}### Response:\n"


def command(side: str, name: str, seed: int, args: Any, folder: Path) -> tuple[list[str], dict[str, str], int]:
    """Of one run; what is added to its environment; and the replies of a step."""
    if side == "ours":
        critic, fields = OURS[name]
        given = {
            **fields,
            **{"response_length": NEW_TOKENS, "max_prompt_length": None, "temperature": 1.0, "seed": seed},
            "lora": {**LORA, "target_modules": LINEAR},
        }
        if critic != "none":
            given["value"] = {"adapter": critic, "learning_rate": fields["learning_rate"], "warmup_steps": 0}
        steps = EPISODES // fields["rollout_batch_size"]
        where = [str(folder), str(steps), str(args.threads), critic, json.dumps(given)]
        script = [sys.executable, str(HERE / "_ppo_step_ours.py"), *where]
        return script, {"PYTHONPATH": str(HERE.parent)}, fields["rollout_batch_size"]
    fields = TRL[name]
    settings = {
        **{"new_tokens": NEW_TOKENS, "prompts": fields["prompts"], "epochs": fields["epochs"]},
        **{"at_once": min(fields["prompts"], 32), "lora": {**LORA, "target_modules": LINEAR}},
        "arguments": {"learning_rate": fields["learning_rate"], "temperature": 1.0, "seed": seed},
    }
    where = [str(folder), str(EPISODES // fields["prompts"]), str(args.threads), json.dumps(settings)]
    return [args.trl_python, str(HERE / "_ppo_step_trl.py"), *where], {}, fields["prompts"]


def to_goal(found: dict[str, Any], replies: int, goal: float) -> dict[str, float]:
    """Seconds and episodes to the goal, endless if it is not reached; the KL there; and how far the run got in all."""
    steps = WINDOW // replies
    means = [statistics.fmean(found["scores"][i - steps : i]) for i in range(steps, len(found["scores"]) + 1)]
    spent = list(accumulate(found["cpu_seconds"]))
    told = {"seconds": math.inf, "episodes": math.inf, "kl": math.nan, "best": max(means)}
    for step, mean in enumerate(means, steps):
        if mean >= goal:
            return {**told, "seconds": spent[step - 1], "episodes": float(step * replies), "kl": found["kl"][step - 1]}
    return told


def main() -> None:
    options = parser(__doc__, repeats=1, threads=1)
    options.add_argument("--trl-python", required=True, help="interpreter of an environment with trl==1.12.0")
    options.add_argument("--pick", default="0", help="seeds by which each side's configuration is picked (default 0)")
    options.add_argument("--seeds", default="1,2,3", help="seeds of the comparison (default 1,2,3)")
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        making = multiprocessing.get_context("spawn").Process(target=make_models, args=(folder,))
        making.start()  # beside this process: accelerate leaves variables behind that would tell TRL's that it is one of many
        making.join()
        if making.exitcode:
            sys.exit("the models could not be made")

        kept = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.is_file() else []
        done = {(row["side"], row["name"], row["seed"]): row for row in kept}

        def run(side: str, name: str, seed: int) -> tuple[dict[str, Any], int]:
            script, more, replies = command(side, name, seed, args, folder)
            if (side, name, seed) not in done:
                found = run_side(script, more, folder)
                row: dict[str, Any] = {"side": side, "name": name, "seed": seed}
                row |= {key: [round(v, 4) for v in found[key]] for key in ("scores", "kl", "cpu_seconds")}
                with ROWS.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                done[side, name, seed] = row
            found = done[side, name, seed]
            told = {"first": found["scores"][0], "last": found["scores"][-1], "seconds": sum(found["cpu_seconds"])}
            print(side, name, seed, {k: round(v, 3) for k, v in told.items()}, file=sys.stderr, flush=True)
            return found, replies

        tried = [("ours", name) for name in OURS] + [("trl", name) for name in TRL]
        seen = {case: [run(*case, int(seed)) for seed in args.pick.split(",")] for case in tried}
        start = statistics.fmean(found["scores"][0] for runs in seen.values() for found, _ in runs)
        goal = start + RISE
        picks = {case: [to_goal(*found, goal) for found in runs] for case, runs in seen.items()}
        medians = {case: statistics.median(r["seconds"] for r in found) for case, found in picks.items()}
        best = {side: min((c for c in medians if c[0] == side), key=medians.__getitem__) for side in ("ours", "trl")}
        runs: dict[str, list[dict[str, float]]] = {"ours": [], "trl": []}
        for seed in map(int, args.seeds.split(",")):
            for side, case in best.items():
                runs[side].append(to_goal(*run(*case, seed), goal))
    measured: dict[str, Any] = {
        f"{side}/{name}": spread([r[name] for r in found]) for side, found in runs.items() for name in found[0]
    }
    if any(math.isinf(r["seconds"]) for found in runs.values() for r in found):
        sys.exit("a run of the comparison did not reach the goal: more --pick seeds, or more EPISODES")
    ratios = [b["seconds"] / a["seconds"] for a, b in zip(runs["ours"], runs["trl"], strict=True)]
    measured["times_as_quick"] = spread(ratios)
    for (side, name), found in picks.items():
        reached = [r["seconds"] for r in found if math.isfinite(r["seconds"])]
        best_means = spread([r["best"] for r in found])
        measured[f"picking/{side}/{name}"] = {"reached": len(reached), "best": best_means} | (
            {"seconds": spread(reached)} if reached else {}
        )
    settings = {
        **{
            "model": "bundled Llama, 0.66 M parameters, float32, CPU",
            "start": start,
            "goal": goal,
            "episodes": EPISODES,
        },
        **{f"best_{side}": name for side, (_, name) in best.items()},
        **{"picked_by_seeds": args.pick, "seeds": args.seeds, "trl": "1.12.0"},
    }
    emit(report("ppo_to_reward", settings, measured, len(args.seeds.split(",")), args.threads), args.output)


if __name__ == "__main__":
    main()
