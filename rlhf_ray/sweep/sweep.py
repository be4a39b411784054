"""The driver of a sweep: checks all trials, has Tune run those that are left, and writes what came of them.

Each trial is an ordinary run folder in output_dir/trials. sweep.json, the tables and the report are written from these folders,
after every trial, so that a sweep that goes on needs nothing of Tune's: Tune's own state lives in a scratch folder and is deleted.

Population-based training is not offered: it copies weights between trials, and the adapter, value model, optimizer and KL
controller of a trial would then have been trained under several settings, so that none of them could be said to have earned its
score.
"""

from __future__ import annotations

import math
import time
from functools import partial
from typing import Any

from rlhf_ray.config.stored import load_stored
from rlhf_ray.config.sweep import SweepConfig
from rlhf_ray.console import Console, LocalConsole
from rlhf_ray.errors import InvariantError
from rlhf_ray.launch.begun import begun, with_defaults_as_begun
from rlhf_ray.launch.placement import cluster_nodes, cluster_total
from rlhf_ray.launch.preflight import nodes_of
from rlhf_ray.launch.ray_cluster import cluster
from rlhf_ray.runtime.signals import Signals, Stop
from rlhf_ray.stages.resume import where_it_began
from rlhf_ray.storage.run import Run
from rlhf_ray.storage.run_folder import RunFolder, create_run, open_run, resume_command
from rlhf_ray.sweep.capacity import Capacity, capacity, here
from rlhf_ray.sweep.choice import comparison_sentence, conclusion, confirmation_sentence
from rlhf_ray.sweep.record import Record
from rlhf_ray.sweep.report import write_sweep_report
from rlhf_ray.sweep.results import K1
from rlhf_ray.sweep.sharing import check_sharing, described
from rlhf_ray.sweep.space import corners, read_space
from rlhf_ray.sweep.trial import run_trial
from rlhf_ray.sweep.trials import (
    MOST_CHECKED,
    check_size,
    check_trials,
    job_of,
    planned,
    trial_of,
    written_out,
    written_out_as,
)
from rlhf_ray.training import run_entry
from rlhf_ray.training.run_entry import (
    copy_from_now_on,
    discarded_on_error,
    keep_config,
    require_same,
    tell_changes,
)

MAY_CHANGE = (
    *("time_budget_s", "max_concurrent_trials", "max_trial_failures", "share_base", "trials_per_base"),
    *(f"{section}{name}" for section in ("", "ppo.", "dpo.", "evaluate.") for name in run_entry.MAY_CHANGE),
)
"""Fields that may differ between the job that started a sweep and the one that resumes it."""
EXCLUDED_SHOWN = 5


def sweep(config: SweepConfig, console: Console | None = None) -> Run:
    """Run the trials that are not done yet and choose the winner. Returns the sweep's run; raises the error tree of errors.py.

    Trials that fail stand in the table with their reason, and are tried again when the sweep resumes, finished or not; if none
    finishes, InvariantError. What the time budget stopped resumes with an unfinished sweep, or with a larger budget."""
    console = console or LocalConsole()
    config = with_defaults_as_begun(config)
    before = begun(config)
    check_size(config, before)
    trials = planned(config)
    jobs = check_trials(config.confirming(True), trials, before is not None)
    check_sharing(config, jobs)
    values = written_out(config.confirming(True), jobs[0])
    folder = create_run(config.output_dir, "sweep", values, config.resume)
    started = time.monotonic()
    with folder.lock(), discarded_on_error(folder, lambda: (folder.path / "sweep.json").exists()):
        config, changes = _as_it_began(folder, config)
        record, is_done = Record(config, folder.path, trials), folder.manifest()["status"] == "done"
        has_more_time = _is_longer(*changes.get("time_budget_s", (None, None)))
        record.begin(is_done, has_more_time)
        has_more = bool(record.left()) or record.to_suggest() > 0
        if is_done and not has_more:
            copy_from_now_on(folder, config.copy_to, console.warn)
            console.log(f"sweep: {config.output_dir} is finished; nothing to do")
            return Run.load(folder.path)
        if is_done:
            folder.update_manifest(status="running")
        # Known from manifest and config.yaml this once; if this start is interrupted, from the record.
        if is_done or has_more_time:
            record.write()
        tell_changes(folder, changes, console)
        keep_config(folder, written_out_as(config, True))
        if has_more:
            resume = resume_command(config.output_dir)
            with Signals(Stop(), console, config.output_dir, resume, config.stop_grace_s) as signals:
                _run(config, record, signals, console)
        return _finish(config, record, time.monotonic() - started, console)


def _as_it_began(folder: RunFolder, config: SweepConfig) -> tuple[SweepConfig, dict[str, tuple[Any, Any]]]:
    """`config` with what the sweep in `folder` began with and the job says nothing of, and the changes of `require_same`.

    ConfigError with every difference from what its trials ran under: they are compared, and chosen by one rule."""
    if not any((folder.path / name).exists() for name in ("sweep.json", "trials")):  # nothing ran
        return config.confirming(True), {}
    # one of an older version set no prompts apart
    confirm = (folder.config().get("ppo") or {}).get("confirm_held_out", False)
    return config.confirming(confirm), require_same(
        folder, config, MAY_CHANGE, partial(written_out_as, confirm=confirm)
    )


def _is_longer(old: float | None, new: float | None) -> bool:
    """Of time budgets, in seconds; None: no end."""
    return old is not None and (new is None or new > old)


def _run(config: SweepConfig, record: Record, signals: Signals, console: Console) -> None:
    sample = list(record.trials.values()) or [
        trial_of(config, settings, config.seeds[0]) for settings in corners(read_space(config.space), MOST_CHECKED)
    ]
    jobs = [job_of(config, trial) for trial in sample]
    if config.share_base and all(job.learner.num_workers == 0 for job in jobs):
        _run_shared(config, record, here(jobs), console)
        return
    with cluster(resume_command(config.output_dir)) as own_ray:
        import ray

        signals.install()  # ray.init takes SIGTERM
        nodes = cluster_nodes() or nodes_of(ray.nodes())
        fits = capacity(jobs, cluster_total(), nodes, own_ray)
        if config.share_base:
            _run_shared(config, record, fits, console)
            return
        _tell_plan(config, record, fits, console)
        record.write()
        from rlhf_ray.sweep.tuning import run_trials

        run_trials(config, record, fits, partial(run_trial, config), console)


def _run_shared(config: SweepConfig, record: Record, fits: Capacity, console: Console) -> None:
    from rlhf_ray.sweep.bases import SharedTrials

    _tell_plan(config, record, fits, console)
    record.write()
    SharedTrials(config, record, fits, console).run()


def _tell_plan(config: SweepConfig, record: Record, fits: Capacity, console: Console) -> None:
    count, left = len(record.trials), len(record.left())
    new = record.to_suggest()
    asked = left + new * len(config.seeds)
    trials = f"{count // len(config.seeds)} settings x {len(config.seeds)} seeds, {left} trials to run"
    if config.search == "optuna":
        trials = f"{new} settings to be suggested x {len(config.seeds)} seeds" + (
            f", {left} trials left" if left else ""
        )
    console.header(
        f"sweep  {config.output_dir}",
        [
            f"search     {config.search}: {trials}",
            f"varies     {', '.join(config.space)}",
            f"maximises  {config.metric}; scheduler {config.scheduler}",
            f"trials     {described(config, fits, asked)}",
        ],
    )


def _finish(config: SweepConfig, record: Record, seconds: float, console: Console) -> Run:
    """Tables, report, summary. InvariantError if no trial finished."""
    outcomes = record.outcomes()
    counts = {s: sum(o.status == s for o in outcomes) for s in ("done", "stopped", "failed")}
    record.finished = counts["done"] > 0
    record.write()
    _, choice = record.choice(outcomes)
    write_sweep_report(record.folder)
    if not counts["done"]:
        why = next((o.reason for o in outcomes if o.reason), "none was started")
        fix = "see trials.csv"
        if record.has_stopped_for_time:
            fix = f"raise time_budget_s, or {resume_command(config.output_dir)}: trials resume from their checkpoints; {fix}"
        raise InvariantError.at(config.output_dir, "no trial finished", got=why, fix=fix)
    metrics = {f"trials/{status}": float(n) for status, n in counts.items()}
    artifacts = {"report": "report.html", "trials": "trials.csv", "settings": "settings.csv"}
    if choice.winner is not None and choice.trial is not None:
        found = {"best/score": choice.winner.score, "best/score_se": choice.error}
        if choice.confirmed is not None:
            found |= {"best/confirmed": choice.confirmed.score, "best/confirmed_se": choice.confirmed.error}
        found["best/not_shown_to_be_worse"] = float(len(choice.not_worse))
        metrics |= {name: value for name, value in found.items() if math.isfinite(value)}
        artifacts |= {"best": f"trials/{choice.trial.trial.id}"}
        console.log(conclusion(choice, config.metric))
        console.log(confirmation_sentence(choice))
        if config.kl_cap is not None and math.isnan(choice.winner.mean(K1)):
            console.warn(f"kl_cap {config.kl_cap:g} was not applied: no KL of the winner was measured")
        for setting, why in choice.excluded[:EXCLUDED_SHOWN]:
            console.log(
                f"not compared: {', '.join(f'{name} {value}' for name, value in setting.settings.items())}: {why}"
            )
        if choice.p:
            console.log(f"{comparison_sentence(choice)} See {record.folder / 'settings.csv'}")
    else:
        console.warn("no setting keeps within the KL cap and the length ratio: no winner")
    run = Run(
        stage="sweep",
        status="done",
        run_dir=str(record.folder),
        steps=sum(o.step for o in outcomes),
        seconds=seconds,
        seed=config.seeds[0],
        metrics=metrics,
        artifacts=artifacts,
    )
    run.save()
    folder = RunFolder(record.folder)
    folder.seal(("config.yaml", "summary.json", "sweep.json"))
    folder.copy_finished()
    return run


def resume_sweep(run: str, console: Console | None = None) -> Run:
    """Resume the sweep in folder `run`: trials that are done are kept, those that failed or were cut off resume. See `sweep`."""
    folder, console = open_run(run, verify=False), console or LocalConsole()
    values = {**folder.config(), "resume": "auto", "output_dir": str(folder.path)}
    with where_it_began(folder, console):
        return sweep(load_stored(SweepConfig, values, str(folder.path / "config.yaml")), console)
