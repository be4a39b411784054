"""Several stages in one job and one worker group (starting a group costs seconds). A stage that is finished is not run again."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from rlhf_ray.config import JobFields, PipelineConfig
from rlhf_ray.config.load import load_dict
from rlhf_ray.config.resolved import written_out
from rlhf_ray.errors import Interrupted
from rlhf_ray.ppo import checkpoint as ppo_checkpoint
from rlhf_ray.ppo.loop import train_ppo
from rlhf_ray.runtime.devices import memory_released
from rlhf_ray.runtime.session import Session
from rlhf_ray.stages.evaluate import run_evaluate
from rlhf_ray.storage.lock import WAIT_S
from rlhf_ray.storage.run import Run
from rlhf_ray.storage.run_folder import RunFolder, create_run, is_run, open_run, resume_command
from rlhf_ray.supervised import checkpoint as supervised_checkpoint
from rlhf_ray.supervised.dpo import train_dpo
from rlhf_ray.supervised.reward import train_reward
from rlhf_ray.supervised.sft import train_sft
from rlhf_ray.training import run_entry
from rlhf_ray.training.run_entry import copy_from_now_on, discarded_on_error, finish_run, keep_config, require_same

BODIES: dict[str, Callable[[Any, Session], Run]] = {
    "sft": train_sft,
    "dpo": train_dpo,
    "reward": train_reward,
    "ppo": train_ppo,
    "evaluate": run_evaluate,
}
MAY_CHANGE = {
    "sft": supervised_checkpoint.MAY_CHANGE,
    "dpo": supervised_checkpoint.MAY_CHANGE,
    "reward": supervised_checkpoint.MAY_CHANGE,
    "ppo": ppo_checkpoint.MAY_CHANGE,
    "evaluate": run_entry.MAY_CHANGE,
}


def run_pipeline(config: PipelineConfig, session: Session) -> Run:
    """The body: every rank runs every stage's body."""
    configs = stage_configs(config)
    with ExitStack() as held:
        folder = open_pipeline(config, session, "pipeline", held)
        with discarded_on_error(folder, lambda: any(is_run(c.output_dir) for c in configs.values())):
            runs = run_stages(configs, session, config.output_dir)
        return finish_pipeline(config, session, folder, runs)


def stage_configs(config: PipelineConfig) -> dict[str, JobFields]:
    """Each stage's configuration, checked before anything runs. Raises one ConfigError for all of them."""
    load_dict(PipelineConfig, config.model_dump(exclude_unset=True))
    return {stage: config.stage_config(stage) for stage in config.stages}


def open_pipeline(config: PipelineConfig, session: Session, stage: str, held: ExitStack) -> RunFolder:
    """Make (rank 0) and open the folder that holds the stages' folders, locked for as long as `held` lasts."""
    made = None
    if session.is_main:
        made = folder = create_run(config.output_dir, stage, written_out(config), config.resume)
        held.enter_context(folder.lock(WAIT_S if config.resume == "auto" else 0.0, session.console.log))
        if folder.manifest()["status"] == "done":
            copy_from_now_on(folder, config.copy_to, session.console.warn)
        else:
            require_same_stages(config)
            keep_config(folder, written_out(config))
    session.barrier()
    return made or open_run(config.output_dir, verify=False)


def require_same_stages(config: PipelineConfig) -> None:
    """ConfigError if a stage would be refused when its turn comes: nothing runs, and nothing is written, before that is known."""
    for stage, own in stage_configs(config).items():
        if is_run(own.output_dir):
            folder = open_run(own.output_dir, verify=False)
            if folder.checkpoints() or folder.manifest()["status"] == "done":
                require_same(folder, own, MAY_CHANGE[stage])


def run_stages(configs: dict[str, JobFields], session: Session, whole: str) -> dict[str, Run]:
    """The stages' bodies in turn; each finds a finished run of itself and returns it. whole: folder of the run that they make up,
    which an interruption names as what is to be gone on with."""
    runs: dict[str, Run] = {}
    for number, (stage, config) in enumerate(configs.items(), start=1):
        session.console.log(f"stage {number} of {len(configs)}: {stage} -> {config.output_dir}")
        started = time.perf_counter()
        try:
            with memory_released():
                runs[stage] = BODIES[stage](config, session)
        except Interrupted as error:
            own, outer = resume_command(config.output_dir), resume_command(whole)
            raise Interrupted([replace(p, fix=p.fix.replace(own, outer)) for p in error.problems]) from error
        session.barrier()
        session.console.log(f"{stage} done in {time.perf_counter() - started:.0f} s")
    return runs


def finish_pipeline(
    config: PipelineConfig, session: Session, folder: RunFolder, runs: dict[str, Run], **metrics: float
) -> Run:
    """Summary and report over all stages."""
    run = Run(
        stage=str(folder.manifest()["stage"]),
        status="done",
        run_dir=str(folder.path),
        steps=sum(r.steps for r in runs.values()),
        seconds=sum(r.seconds for r in runs.values()),
        seed=config.seed,
        metrics={f"{stage}/{name}": value for stage, r in runs.items() for name, value in r.metrics.items()} | metrics,
        artifacts={stage: r.run_dir for stage, r in runs.items()} | {"report": "report.html"},
    )
    if session.is_main:
        finish_run(folder, run, ("config.yaml", "summary.json"))
    session.barrier()
    return run
