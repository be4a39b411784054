"""A split run that was interrupted goes on to the bits of an undisturbed one, under either placement."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config import PPOConfig
from rlhf_ray.config.resolved import dump_yaml
from rlhf_ray.errors import RlhfRayError
from rlhf_ray.metrics import read_metrics
from rlhf_ray.stages.start import ppo
from rlhf_ray.storage.run import load_run
from rlhf_ray.storage.run_folder import sha256_file

pytestmark = [pytest.mark.integration, pytest.mark.long]
Job = Callable[..., PPOConfig]
COLOCATE: dict[str, Any] = {"placement": "colocate", "learner": {"num_workers": 0, "num_threads": 1}}
STEPS: dict[str, Any] = {"max_steps": 3, "save_steps": 1, "eval_steps": 3, "ref_model_sync_steps": 1}


def result(folder: str) -> dict[str, Any]:
    """Hashes of policy and value model, and every metric that repeats."""
    rows = read_metrics(Path(folder) / "metrics.jsonl")
    kept = [{k: v for k, v in row.items() if k.split("/")[0] not in ("time", "memory", "faults")} for row in rows]
    hashes = {n: sha256_file(Path(folder) / n / "adapter_model.safetensors") for n in ("adapter", "value")}
    return {"steps": load_run(folder).steps, "metrics": kept, **hashes}


@pytest.fixture
def undisturbed(split_job: Job, console: Any) -> dict[str, Any]:
    return result(ppo(split_job("undisturbed", **COLOCATE, **STEPS), console).run_dir)


@pytest.mark.parametrize("first", ["split", "colocate"])
def test_the_other_placement_goes_on(
    two_gpus: Any, split_job: Job, console: Any, undisturbed: dict[str, Any], first: str
) -> None:
    """Interrupted in step 2 by its reward function, gone on with under the placement that it was not started with."""
    there, here = split_job("run", resume="auto", **STEPS), split_job("run", resume="auto", **COLOCATE, **STEPS)
    before, after = (there, here) if first == "split" else (here, there)
    reward = Path(str(before.rewards[0].function).rsplit(":", 1)[0])
    intact = reward.read_text()
    # a call is a chunk: one of an evaluation, then six a step
    reward.write_text(intact.replace("    CALLS += 1\n", "    CALLS += 1\n    assert CALLS < 10, 'out of order'\n"))
    with pytest.raises(RlhfRayError, match="out of order"):
        ppo(before, console)
    assert [path.name for path in Path(before.output_dir).glob("checkpoints/step_*")] == ["step_000001"]
    reward.write_text(intact)
    assert result(ppo(after, console).run_dir) == undisturbed
    assert "resuming from step 1" in console.text


def test_the_driver_killed(
    split_job: Job, undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 of the command once step 1 is kept; `rlhf-ray resume` brings the actors up anew. All on a Ray of its own."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    on_cpu = {"num_threads": 1, "num_gpus": 0.0}
    roles = {"learner": {"num_workers": 1, **on_cpu}, "generator": {"num_actors": 2, **on_cpu}, "scorer": on_cpu}
    job = split_job("killed", **roles, **STEPS)
    (tmp_path / "job.yaml").write_text(dump_yaml(job.model_dump(mode="json", exclude_unset=True)))
    command, folder = [sys.executable, "-m", "rlhf_ray.cli"], Path(job.output_dir)
    process = subprocess.Popen([*command, "ppo", str(tmp_path / "job.yaml")], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 300
        while not (folder / "checkpoints" / "step_000001").is_dir():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait(30)
    deadline, code = time.monotonic() + 60, 2
    while code == 2 and time.monotonic() < deadline:  # until the orphaned worker has gone, which holds the run's lock
        done = subprocess.run([*command, "resume", str(folder)], capture_output=True, text=True, timeout=300)
        code = done.returncode
    assert code == 0, done.stderr
    assert "resuming from step" in done.stderr
    assert result(str(folder)) == undisturbed
