"""Sweeps with real Tune: what they leave, what ends them early, and that nothing is lost when something dies."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config import SweepConfig
from rlhf_ray.config.resolved import dump_yaml
from rlhf_ray.errors import ConfigError, InvariantError, ResourceError
from rlhf_ray.registry import Registry
from rlhf_ray.stages.start import ppo
from rlhf_ray.storage.run import Run, load_run
from rlhf_ray.storage.run_folder import sha256_file
from rlhf_ray.sweep.sweep import resume_sweep, sweep
from rlhf_ray.sweep.trial import alone
from rlhf_ray.sweep.trials import job_of, planned

pytestmark = pytest.mark.integration
Job = Callable[..., SweepConfig]


def table(run: Run | str | Path, name: str = "trials.csv") -> list[dict[str, str]]:
    with open(Path(run if isinstance(run, (str, Path)) else run.run_dir) / name) as file:
        return list(csv.DictReader(file))


def without_seconds(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k not in ("seconds", "run_dir")} for row in rows]


def _score(row: dict[str, Any]) -> float:
    return float(row["score"])


def test_a_sweep_leaves_its_tables_and_ordinary_runs(two_cpus: Any, sweep_job: Job, console: Any) -> None:
    config = sweep_job("sweep", seeds=(0, 1), kl_cap=5.0)
    run = sweep(config, console)
    rows = table(run)
    assert len(rows) == 8 and {row["status"] for row in rows} == {"done"}
    assert {(row["kl_penalty"], row["kl_coef"], row["seed"]) for row in rows} == {
        (p, c, s) for p in ("kl", "jensen_shannon") for c in ("0.01", "0.1") for s in ("0", "1")
    }
    best = Path(run.run_dir) / run.artifacts["best"]
    assert load_run(best).status == "done"
    assert (best / "adapter" / "adapter_model.safetensors").is_file() and (best / "report.html").is_file()
    record = json.loads((Path(run.run_dir) / "sweep.json").read_text())
    assert record["choice"]["trial"] == best.name
    # the median seed of the winner, measured on prompts that chose nothing
    of_winner = sorted((row for row in record["trials"] if row["setting"] == record["choice"]["setting"]), key=_score)
    assert of_winner[0]["trial"] == best.name and len(of_winner) == 2, "the lower of two"
    found = record["choice"]["confirmed"]
    assert found["metric"] == "eval/confirm/reward" and found["trial_score"] == of_winner[0]["confirmed"]
    assert found["score"] == pytest.approx(sum(row["confirmed"] for row in of_winner) / 2)
    assert found["rows"] + load_run(best).metrics["eval/rows"] == 4
    assert f"On {found['rows']} held-out prompts that chose nothing" in console.text
    assert "at most 5 nats" in record["choice"]["rule"]
    assert "Reward against measured KL" in (Path(run.run_dir) / "report.html").read_text()
    assert "reward" in console.text and record["choice"]["conclusion"] in console.text
    # a trial is the run that the same job gives by itself, bit for bit
    trial = planned(config)[0]
    by_itself = job_of(config.confirming(True), trial).model_copy(
        update={"output_dir": str(Path(run.run_dir).parent / "alone")}
    )
    single = ppo(alone(by_itself, 1), console)
    name = Path("adapter") / "adapter_model.safetensors"
    assert sha256_file(Path(single.run_dir) / name) == sha256_file(trial.folder / name)
    # the winner can be promoted; too few steps to pass the gate of the reward
    promoted = Registry(Path(run.run_dir).parent / "registry").promote(
        run.run_dir, "winner", min_reward=-1.0, force=True, reason="a test"
    )
    assert promoted.entry.manifest["source"]["run_dir"] == str(best)
    assert promoted.gates[1].limit == "at most 5 (kl_cap of the sweep)"
    assert promoted.gates[1].measured.endswith("nats per reply on prompts that chose nothing")
    assert promoted.gates[2].measured.startswith("eval/confirm/reward")
    again = sweep(config.model_copy(update={"resume": "auto"}), console)
    assert again.metrics == run.metrics and "nothing to do" in console.text


@pytest.mark.fault
def test_a_killed_trial_goes_on_and_a_failing_one_hurts_no_other(
    two_cpus: Any, sweep_job: Job, console: Any, tmp_path: Path, note: Any
) -> None:
    """Fault 23."""
    (tmp_path / "die").touch()
    died = sweep(sweep_job("died", space={"kl_coef": [0.01, 0.1]}), console)
    assert not (tmp_path / "die").exists(), "nobody died"
    done = [row["status"] for row in table(died)]
    note(23, done == ["done", "done"], "a killed trial resumes, others finish")
    # num_mini_batches 3 does not divide 8 rows, and is refused beforehand; a function that is not a number fails in the trial
    bad = f"{tmp_path / 'bad_reward.py'}:score"
    (tmp_path / "bad_reward.py").write_text(
        "def score(prompts, completions, **columns):\n    return [float('nan')] * len(prompts)\n"
    )
    good = sweep_job("x").ppo["rewards"]
    mixed = sweep_job("mixed", space={"rewards": [good, [{"name": "bad", "function": bad}]]}, metric="eval/reward")
    run = sweep(mixed, console)
    statuses = sorted(row["status"] for row in table(run))
    note(23, statuses == ["done", "failed"], "a trial that fails hurts no other")
    failed = next(row for row in table(run) if row["status"] == "failed")
    assert "bad" in failed["reason"] and "not finite" in failed["reason"]
    assert run.metrics["trials/failed"] == 1.0
    assert failed["reason"] in (Path(run.run_dir) / "report.html").read_text().replace("&#x27;", "'")


def test_all_trials_failing_is_an_error_and_resume_tries_them_again(
    two_cpus: Any, sweep_job: Job, console: Any, tmp_path: Path
) -> None:
    config = sweep_job("failing", space={"kl_coef": [0.01]}, max_trial_failures=0)
    (tmp_path / "fail").touch()
    with pytest.raises(InvariantError, match=r"no trial finished.*reward service"):
        sweep(config, console)
    assert table(config.output_dir)[0]["status"] == "failed"
    (tmp_path / "fail").unlink()
    assert resume_sweep(config.output_dir, console).metrics["trials/done"] == 1.0


@pytest.mark.parametrize("scheduler", ["asha", "median_stopping"])
def test_a_scheduler_stops_trials_and_says_why(two_cpus: Any, sweep_job: Job, console: Any, scheduler: str) -> None:
    ppo_fields = {
        "max_steps": 6,
        "confirm_held_out": False,
    }  # of so few prompts all choose, or trials tie and none is stopped
    space = {"learning_rate": [1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 3e-3]}
    config = sweep_job(
        scheduler, ppo=ppo_fields, space=space, scheduler=scheduler, grace_evaluations=1, reduction_factor=2
    )
    run = sweep(config, console)
    rows = table(run)
    stopped = [row for row in rows if row["status"] == "stopped"]
    assert stopped and {row["status"] for row in rows} == {"done", "stopped"}
    assert all(row["reason"].startswith(f"{scheduler}: others do better at step") for row in stopped)
    assert all(int(row["step"]) < 6 for row in stopped)
    assert run.metrics["trials/stopped"] == len(stopped)


def test_the_time_budget(two_cpus: Any, sweep_job: Job, console: Any) -> None:
    space = {"kl_coef": [0.01 * i for i in range(1, 9)]}
    config = sweep_job("budget", ppo={"max_steps": 100_000}, space=space, time_budget_s=20.0)
    with pytest.raises(InvariantError, match="no trial finished"):
        sweep(config, console)
    reasons = {row["reason"] for row in table(config.output_dir) if row["status"] == "stopped"}
    assert reasons == {"the time budget of 20 s was used up"}


@pytest.mark.long
def test_trials_with_workers_of_their_own(two_cpus: Any, sweep_job: Job, console: Any) -> None:
    """placement split: a generator, a scorer and a learner for each trial, one trial at a time on two CPUs."""
    role = {"num_actors": 1, "num_threads": 1, "num_cpus": 0.4}
    split = {"placement": "split", "generator": role, "scorer": role}
    config = sweep_job("split", ppo=split, space={"kl_coef": [0.01, 0.1]})
    run = sweep(config, console)
    assert [row["status"] for row in table(run)] == ["done", "done"]
    assert "1 at once, each with workers of its own" in console.text
    twin = sweep(sweep_job("colocate", space={"kl_coef": [0.01, 0.1]}), console)
    assert [row["score"] for row in table(run)] == [row["score"] for row in table(twin)]


def test_optuna_suggests_and_goes_on(two_cpus: Any, sweep_job: Job, console: Any) -> None:
    pytest.importorskip("optuna")
    space = {
        "kl_penalty": ["kl", "squared_error"],
        "kl_coef": {"given": "kl_penalty", "cases": {"kl": {"loguniform": [0.01, 1.0]}, "squared_error": [0.5]}},
        "learning_rate": {"loguniform": [1e-4, 1e-2]},
    }
    config = sweep_job("optuna", space=space, search="optuna", num_samples=4, seeds=(0, 1), max_concurrent_trials=1)
    run = sweep(config, console)
    rows = table(run)
    assert len(rows) == 8 and all(row["status"] == "done" for row in rows)
    assert all((row["kl_coef"] == "0.5") for row in rows if row["kl_penalty"] == "squared_error")
    assert len({row["learning_rate"] for row in rows}) == 4, "each suggestion with both seeds"


def test_what_cannot_be_is_told_before_the_first_trial(
    two_cpus: Any, sweep_job: Job, console: Any, tmp_path: Path
) -> None:
    for message, changes in (
        (r"space.kl_coeff=0.1: unknown key.*did you mean kl_coef", {"space": {"kl_coeff": [0.1]}}),
        (r"space.kl_coef=-1", {"space": {"kl_coef": [-1.0]}}),
        (r"space.num_mini_batches=3: 3 does not divide", {"space": {"num_mini_batches": [1, 3]}}),
        (r"metric: no reward of the job has this name.*eval/reward/ascii", {"metric": "eval/reward/judge"}),
        (r"space.kl_coef: a grid has no ranges", {"space": {"kl_coef": {"uniform": [0.1, 1.0]}}}),
    ):
        with pytest.raises(ConfigError, match=message):
            sweep(sweep_job("refused", **changes), console)
    with pytest.raises(ResourceError, match=r"trial.*8 CPU"):
        sweep(sweep_job("too-big", learner={"num_threads": 8}), console)
    assert not (tmp_path / "refused").exists() and not (tmp_path / "too-big").exists()


def finished(trials: Path) -> list[Path]:
    """Summaries of trials that are done: one that is ended between its summary and its manifest is finished on resume."""
    found = trials.glob("*/summary.json")
    return [p for p in found if json.loads((p.parent / "manifest.json").read_text())["status"] == "done"]


def until_one_more_is_done(process: subprocess.Popen[bytes], trials: Path) -> None:
    """Wait until `trials` holds one more finished trial than now, but not yet all four."""
    before, deadline = len(finished(trials)), time.monotonic() + 240
    while (now := len(finished(trials))) <= before:
        assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
        assert time.monotonic() < deadline, "no trial finished"
        time.sleep(0.05)
    assert now < 4


@pytest.mark.fault
def test_a_stopped_and_a_killed_driver_lose_nothing(
    two_cpus: Any, sweep_job: Job, console: Any, tmp_path: Path, note: Any
) -> None:
    """Fault 23: SIGTERM, then kill -9, each in the middle: finished trials are kept, and the table is that of one untouched."""
    changes: dict[str, Any] = {"ppo": {"max_steps": 6}, "max_concurrent_trials": 1}
    undisturbed = sweep(sweep_job("whole", **changes), console)
    config = sweep_job("killed", **changes)
    job, trials = tmp_path / "sweep.yaml", Path(config.output_dir) / "trials"
    job.write_text(dump_yaml(config.model_dump(mode="json", exclude_unset=True)))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    for arguments, number in ((["sweep", str(job)], signal.SIGTERM), (["resume", config.output_dir], signal.SIGKILL)):
        command = [sys.executable, "-m", "rlhf_ray.cli", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
        try:
            until_one_more_is_done(process, trials)
            process.send_signal(number)
            told = process.communicate(timeout=60)[1].decode()
        finally:
            process.kill()
            process.wait()
        if number == signal.SIGTERM:
            assert process.returncode == 75 and told.splitlines()[-1].endswith(f"rlhf-ray resume {config.output_dir}")
    kept = {p: p.stat().st_mtime_ns for p in finished(trials)}
    resumed = resume_sweep(config.output_dir, console)
    assert len(kept) >= 2 and {p: p.stat().st_mtime_ns for p in kept} == kept, "finished trials ran again"
    equal = without_seconds(table(resumed)) == without_seconds(table(undisturbed))
    note(23, equal, "driver stopped, then killed: finished trials are kept, same table")


def test_a_limit_that_is_passed_stops_the_trial_and_is_not_tried_again(
    two_cpus: Any, sweep_job: Job, console: Any
) -> None:
    config = sweep_job("limits", space={"max_kl": [1e-12, 1e9]}, seeds=(0,))
    run = sweep(config, console)
    stopped, done = sorted(table(run), key=lambda row: float(row["max_kl"]))
    assert (stopped["status"], done["status"]) == ("stopped", "done")
    assert "beyond max_kl" in stopped["reason"] and run.metrics["trials/stopped"] == 1.0
    assert "failed" not in console.text and sweep(config.model_copy(update={"resume": "auto"}), console)
