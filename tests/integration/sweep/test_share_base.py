"""Sweeps whose trials share a base, with real Ray and Tune's schedulers."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config import SweepConfig
from rlhf_ray.errors import ConfigError
from rlhf_ray.storage.run import Run
from rlhf_ray.storage.run_folder import open_run
from rlhf_ray.sweep import bases
from rlhf_ray.sweep.host import Host
from rlhf_ray.sweep.sweep import resume_sweep, sweep

pytestmark = pytest.mark.integration
Job = Callable[..., SweepConfig]

PID = '''
"""The share of ASCII characters, and the process that was asked; fails, or ends its process, where a file beside it says so."""
import os
import signal
from pathlib import Path

HERE = Path(__file__).parent


def score(prompts, completions, **columns):
    (HERE / f"pid{os.getpid()}").touch()
    return [sum(c.isascii() for c in text) / max(len(text), 1) for text in completions]


def dies(prompts, completions, **columns):
    if (HERE / "die").is_file():
        (HERE / "die").unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return score(prompts, completions)


def fails(prompts, completions, **columns):
    raise RuntimeError("the reward service is gone")
'''


def table(run: Run | str) -> list[dict[str, str]]:
    with open(Path(run if isinstance(run, str) else run.run_dir) / "trials.csv") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def pid_reward(tmp_path: Path) -> Callable[[str], list[dict[str, Any]]]:
    (tmp_path / "pid_reward.py").write_text(PID)
    return lambda name: [{"name": "ascii", "function": f"{tmp_path / 'pid_reward.py'}:{name}"}]


def test_trials_on_one_base_are_the_trials_apart(
    two_cpus: Any, sweep_job: Job, console: Any, tmp_path: Path, pid_reward: Any
) -> None:
    fields = {"ppo": {"rewards": pid_reward("score")}, "space": {"kl_coef": [0.01, 0.1], "learning_rate": [1e-4, 1e-3]}}
    together = sweep(sweep_job("together", share_base=True, **fields), console)
    assert "4 at once on one base, in a process of 1 CPU each" in console.text
    pids = [path.name for path in tmp_path.glob("pid*[0-9]")]
    assert len(pids) == 1 and pids != [f"pid{os.getpid()}"], "one process for all"
    apart = sweep(sweep_job("apart", **fields), console)
    for one, other in zip(table(together), table(apart), strict=True):
        assert one["status"] == other["status"] == "done" and one["trial"] == other["trial"]
        assert float(one["score"]) == pytest.approx(float(other["score"]), abs=0.05)
        assert float(one["kl_k1"]) == pytest.approx(float(other["kl_k1"]), abs=0.05)
    assert not list(Path(together.run_dir).glob(".turn*"))
    # an interrupted sweep runs what is left: a trial that was lost is run again, and the others are kept
    record = json.loads((Path(together.run_dir) / "sweep.json").read_text())
    lost = Path(together.run_dir) / record["trials"][1]["run_dir"]
    manifest = json.loads((lost / "manifest.json").read_text())
    (lost / "manifest.json").write_text(json.dumps({**manifest, "status": "running"}))
    whole = Path(together.run_dir) / "manifest.json"
    whole.write_text(json.dumps({**json.loads(whole.read_text()), "status": "running"}))
    again = resume_sweep(together.run_dir, console)
    assert again.metrics["trials/done"] == 4.0 and "1 at once on one base" in console.text


@pytest.mark.fault
def test_a_trial_that_kills_the_process_or_fails_leaves_the_others_alone(
    two_cpus: Any, sweep_job: Job, console: Any, tmp_path: Path, note: Any, pid_reward: Any
) -> None:
    """Fault 23, on a shared base: the others go on in another process without a mark, whoever did it once too often does not."""
    (tmp_path / "die").touch()
    space = {"rewards": [pid_reward(name) for name in ("score", "dies", "fails")], "kl_coef": [0.01, 0.1]}
    run = sweep(sweep_job("mixed", share_base=True, space=space, metric="eval/reward", ppo={"save_steps": 1}), console)
    rows = table(run)
    note(23, [row["status"] for row in rows] == ["done"] * 4 + ["failed"] * 2, "trials that share a process")
    assert all("the reward service is gone" in row["reason"] for row in rows[4:])
    assert not (tmp_path / "die").exists() and len(list(tmp_path.glob("pid*[0-9]"))) == 2
    assert any("died, and they resume in another one" in line for line in console.warnings)


def test_without_ray_the_process_is_this_one(sweep_job: Job, console: Any, tmp_path: Path, pid_reward: Any) -> None:
    """learner.num_workers 0: less memory, and the same sweep; a trial that fails is tried again and leaves the others alone."""
    space = {"rewards": [pid_reward(name) for name in ("score", "fails")], "kl_coef": [0.01, 0.1]}
    fields = {"learner": {"num_workers": 0, "num_threads": 1}, "space": space, "metric": "eval/reward"}
    rows = table(sweep(sweep_job("here", share_base=True, **fields), console))
    assert "4 at once on one base, in this process, without Ray" in console.text
    assert [row["status"] for row in rows] == ["done"] * 2 + ["failed"] * 2
    assert all("the reward service is gone" in row["reason"] for row in rows[2:])
    assert [path.name for path in tmp_path.glob("pid*[0-9]")] == [f"pid{os.getpid()}"]
    assert not list((tmp_path / "here").glob(".turn*"))


def test_a_trial_that_failed_is_tried_again_by_a_finished_sweep(sweep_job: Job, console: Any) -> None:
    """Its cause removed, the sweep is the one that nothing failed in."""
    fields = {"learner": {"num_workers": 0, "num_threads": 1}, "space": {"kl_coef": [0.01, 0.1]}}
    whole = sweep(sweep_job("again", share_base=True, max_concurrent_trials=1, **fields), console)
    before, failed = table(whole), Path(whole.run_dir) / "trials" / table(whole)[1]["trial"]
    shutil.rmtree(failed)
    failed.with_name(f"{failed.name}.failure.json").write_text(json.dumps({"error": "out of memory", "limit": False}))
    again = resume_sweep(whole.run_dir, console)
    assert again.metrics == whole.metrics and open_run(whole.run_dir).manifest()["status"] == "done"
    assert [{**row, "seconds": ""} for row in table(again)] == [{**row, "seconds": ""} for row in before]


def test_asha_stops_trials_on_a_shared_base(two_cpus: Any, sweep_job: Job, console: Any) -> None:
    ppo_fields = {"max_steps": 6, "confirm_held_out": False}
    space = {"learning_rate": [1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 3e-3]}
    config = sweep_job(
        "asha",
        ppo=ppo_fields,
        space=space,
        scheduler="asha",
        grace_evaluations=1,
        reduction_factor=2,
        share_base=True,
        trials_per_base=3,
        max_concurrent_trials=3,
    )
    rows = table(sweep(config, console))
    stopped = [row for row in rows if row["status"] == "stopped"]
    assert stopped and {row["status"] for row in rows} == {"done", "stopped"}
    assert all(row["reason"].startswith("asha: others do better at step") for row in stopped)
    assert all(int(row["step"]) < 6 for row in stopped)


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"space": {"dtype": ["float32", "bfloat16"]}}, "space.dtype: decides which base is loaded"),
        ({"ppo": {"placement": "split"}}, "share_base: trials have actors of their own"),
        ({"learner": {"num_workers": 2}}, "share_base: trials have several workers"),
        ({"learner": {"zero_stage": 3}}, "share_base: ZeRO 3 cuts up the base"),
    ],
)
def test_what_cannot_share_a_base_is_refused(sweep_job: Job, console: Any, fields: dict[str, Any], where: str) -> None:
    with pytest.raises(ConfigError, match=where) as refused:
        sweep(sweep_job("refused", share_base=True, **fields), console)
    assert len(refused.value.problems) == 1


class CannotStart(Host):
    """A process that cannot start trials once: where a file says so."""

    def start(self, trials: list[Mapping[str, Any]]) -> None:
        if (told := Path(self.config.output_dir).parent / "cannot-start").is_file():
            told.unlink()
            raise RuntimeError("can't start new thread")
        super().start(trials)


def test_trials_that_a_process_could_not_start_are_started_again(
    two_cpus: Any, sweep_job: Job, console: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a search by optuna over a list, whose sampler must not suggest a setting that is being tried."""
    pytest.importorskip("optuna")
    monkeypatch.setattr(bases, "Host", CannotStart)
    (tmp_path / "cannot-start").touch()
    space = {"kl_coef": [0.01, 0.1], "learning_rate": [1e-4, 1e-3]}
    run = sweep(sweep_job("started", share_base=True, search="optuna", num_samples=4, seeds=(0,), space=space), console)
    rows = table(run)
    assert len(rows) == len({row["trial"] for row in rows}) == 4
    assert [row["status"] for row in rows] == ["done"] * 4
    assert "4 trials could not be started: RuntimeError: can't start new thread" in console.text
