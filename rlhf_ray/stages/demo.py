"""The whole chain on the bundled task: a base trained from scratch, SFT, reward model, PPO, and a comparison by the task's rule.

It proves the plumbing and the learning on any machine in minutes; the model is no language model. What it ran is left in
DIR/jobs as job files to edit and run again.
"""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rlhf_ray.config import PipelineConfig
from rlhf_ray.config.resolved import dump_yaml
from rlhf_ray.console import Console, LocalConsole
from rlhf_ray.data.tinyworld import build_base, write_world
from rlhf_ray.errors import ConfigError
from rlhf_ray.launch.launch import launch
from rlhf_ray.runtime.session import Session
from rlhf_ray.stages.pipeline import finish_pipeline, open_pipeline, run_stages, stage_configs
from rlhf_ray.stages.start import BUILDERS
from rlhf_ray.storage.run import Run, load_run
from rlhf_ray.storage.run_folder import atomic_write_text, is_run, open_run
from rlhf_ray.supervised.reward_metrics import accuracy_line

SEED = 0
RULE = "rlhf_ray.data.tinyworld:score"
COEFFICIENTS = {
    "kl": (0.1, 0.5),
    "clamped_kl": (0.1, 0.5),
    "bregman": (0.3, 2.0),
    "jensen_shannon": (1.0, 4.0),
    "squared_error": (0.2, 1.0),
    "none": (0.0,),
}


def demo(output_dir: str | Path = "runs/demo", fresh: bool = False, console: Console | None = None) -> Run:
    """Run the demo, or go on with it; `fresh` deletes an earlier demo in `output_dir` first. Returns its run.

    ConfigError if `output_dir` holds anything else."""
    folder = Path(output_dir).absolute()
    console = console or LocalConsole()
    if is_run(folder):
        stage = open_run(folder, verify=False).stage
        if stage != "demo":
            raise ConfigError.at(
                "output_dir", f"{output_dir} holds a run of another stage", "a demo, or a new folder", stage
            )
        if fresh:
            shutil.rmtree(folder)
    if is_run(folder) and open_run(folder, verify=False).manifest()["status"] == "done":
        console.log(f"demo: {output_dir} is finished; nothing to do (--fresh starts over)")
        run = load_run(folder)
    else:
        run = launch("rlhf_ray.stages.demo:run_demo", demo_config(folder), console, BUILDERS)
    if (judged := accuracy_line({k.removeprefix("reward/"): v for k, v in run.metrics.items()})) is not None:
        console.log(f"reward model: {judged}")
    tell_next(folder, console)
    return run


def demo_config(folder: Path) -> PipelineConfig:
    """The demo as a pipeline job over the files it writes itself. What differs from a default is for 0.66 M parameters."""
    world = folder / "world"
    rule = {"name": "true_reward", "function": RULE, "weight": 0.0}
    prompts = {"train": str(world / "prompts.jsonl"), "eval_max_rows": 128}
    return PipelineConfig(
        output_dir=str(folder),
        resume="auto",
        seed=SEED,
        model_name_or_path=str(folder / "base"),
        template="alpaca_short",
        sft={
            "data": {"train": str(world / "sft.jsonl")},
            "lora": {"r": 16, "lora_alpha": 32},
            "max_length": 128,
            "train_batch_size": 32,
            "per_device_train_batch_size": 32,
            "learning_rate": 2e-3,
            "adam_epsilon": 1e-5,
            "max_steps": 150,
        },
        reward={
            "data": {"train": str(world / "preferences.jsonl")},
            "max_length": 128,
            "train_batch_size": 32,
            "per_device_train_batch_size": 32,
            "learning_rate": 3e-3,
            "adam_epsilon": 1e-5,
            "max_steps": 200,
        },
        ppo={
            "data": prompts,
            "rewards": [{"normalize": False}],
            "rollout_batch_size": 128,
            "num_mini_batches": 4,
            "num_ppo_epochs": 2,
            "per_device_train_batch_size": 32,
            "response_length": 32,
            "max_length": 128,
            "learning_rate": 1e-3,
            "value": {"learning_rate": 1e-3, "warmup_steps": 0},
            "cliprange_value": 0.2,
            "kl_coef": 0.2,
            "max_steps": 20,
        },
        evaluate={
            "data": {**prompts, "eval_max_rows": 256},
            "rewards": [rule],
            "judge": "true_reward",
            "response_length": 32,
            "max_length": 128,
            "baseline": "sft",
            "reference": "sft",
        },
    )


def run_demo(config: PipelineConfig, session: Session) -> Run:
    """The body: make the world and the base, then the pipeline's stages."""
    configs = stage_configs(config)
    with ExitStack() as held:
        folder = open_pipeline(config, session, "demo", held)
        if session.is_main:
            make_inputs(folder.path, session)
            write_jobs(folder.path, config)
        session.barrier()
        runs = run_stages(configs, session, config.output_dir)
        found = {n: v for n, v in runs["evaluate"].metrics.items() if n.startswith(("true_reward/", "true_reward_se/"))}
        return finish_pipeline(config, session, folder, runs, **found)


def make_inputs(folder: Path, session: Session) -> None:
    """World files and the base model, unless they are there and whole."""
    session.console.log("writing the tiny world (instructions, preferences, prompts)")
    write_world(folder / "world", SEED)

    def progress(step: int, total: int, shown: dict[str, float]) -> None:
        session.console.progress("base", step, total, shown)

    build_base(folder / "base", SEED, num_threads=session.num_threads, progress=progress)
    session.console.done()


def write_jobs(folder: Path, config: PipelineConfig) -> None:
    """One job file per stage and one for the pipeline, each ready to run into a folder of its own."""
    jobs = folder / "jobs"
    jobs.mkdir(exist_ok=True)
    for stage in config.stages:
        values = config.stage_config(stage).model_dump(mode="json", exclude_unset=True)
        _write_job(jobs / f"{stage}.yaml", {**values, "output_dir": str(folder / "again" / stage)}, stage)
    values = config.model_dump(mode="json", exclude_unset=True)
    _write_job(jobs / "pipeline.yaml", {**values, "output_dir": str(folder / "again" / "pipeline")}, "pipeline")
    _write_job(jobs / "sweep.yaml", sweep_values(folder, config), "sweep")
    _write_job(jobs / "serve.yaml", serve_values(folder, config), "serve")


def sweep_values(folder: Path, config: PipelineConfig) -> dict[str, Any]:
    """A sweep over the five KL penalties and none, on the demo's own SFT and reward runs, judged by the task's rule.

    Two coefficients per penalty, chosen so that the measured KL is about 1 and about 3 nats after a short run."""
    ppo = config.stage_config("ppo").model_dump(mode="json", exclude_unset=True)
    shared = {name: ppo.pop(name) for name in ("model_name_or_path", "template")}
    for name in ("output_dir", "resume", "seed", "kl_coef"):
        del ppo[name]
    rule = {"name": "true_reward", "function": RULE, "weight": 0.0}
    short = {"rollout_batch_size": 64, "num_mini_batches": 2, "max_steps": 12, "eval_steps": 4, "learning_rate": 2e-3}
    value = {**ppo["value"], "learning_rate": 2e-3}
    data = {**ppo["data"], "eval_max_rows": 128}
    return {
        "output_dir": str(folder / "again" / "sweep"),
        **shared,
        "seeds": [0, 1],
        "metric": "eval/reward/true_reward",
        "kl_cap": 5.0,
        "ppo": {**ppo, **short, "value": value, "data": data, "rewards": [*ppo["rewards"], rule]},
        "space": {
            "kl_penalty": list(COEFFICIENTS),
            "kl_coef": {"given": "kl_penalty", "cases": {name: list(c) for name, c in COEFFICIENTS.items()}},
        },
    }


def serve_values(folder: Path, config: PipelineConfig) -> dict[str, Any]:
    """The endpoint over the demo's base, its SFT and PPO adapters side by side, and its reward model as the judge."""
    return {
        "output_dir": str(folder / "again" / "serve"),
        "model_name_or_path": config.model_name_or_path,
        "template": config.template,
        "adapters": {stage: str(folder / stage) for stage in ("sft", "ppo", "reward")},
        "limits": {"max_tokens": 64, "default_max_tokens": 32},
    }


def _write_job(path: Path, values: dict[str, Any], stage: str) -> None:
    note = f"# Written by the demo. Edit it, then: rlhf-ray {stage} {path}\n"
    atomic_write_text(path, note + dump_yaml(values))


def tell_next(folder: Path, console: Console) -> None:
    """Where things are, and what to type next."""
    question = "Name two animals."
    console.header(
        "next",
        [
            f"look      {folder / 'report.html'}",
            f"ask       rlhf-ray generate --policy base --policy {folder / 'sft'} --policy {folder / 'ppo'}"
            f' --instruction "{question}"',
            f"try       rlhf-ray serve {folder / 'jobs' / 'serve.yaml'}   (a page to compare them, and OpenAI's API)",
            f"change    rlhf-ray ppo {folder / 'jobs' / 'ppo.yaml'} kl_penalty=jensen_shannon output_dir=runs/ppo-js",
            f"your own  edit {folder / 'jobs' / 'pipeline.yaml'}, then rlhf-ray pipeline {folder / 'jobs' / 'pipeline.yaml'}",
        ],
    )
