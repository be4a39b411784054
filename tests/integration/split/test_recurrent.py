"""Models with states, trained: split gives the adapter of colocate, a killed run goes on to the same bits, and what was sampled is
what the learner finds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config import PPOConfig
from rlhf_ray.config.resolved import dump_yaml
from rlhf_ray.metrics import read_metrics
from rlhf_ray.ppo.loop import ppo
from rlhf_ray.storage.run_folder import sha256_file

pytestmark = pytest.mark.integration
Job = Callable[..., PPOConfig]
ALONE: dict[str, Any] = {"placement": "colocate", "learner": {"num_workers": 0, "num_threads": 1}}


def result(folder: str) -> dict[str, Any]:
    """Hashes of policy and value model, and every metric that repeats."""
    rows = read_metrics(Path(folder) / "metrics.jsonl")
    kept = [{k: v for k, v in row.items() if k.split("/")[0] not in ("time", "memory", "faults")} for row in rows]
    hashes = {n: sha256_file(Path(folder) / n / "adapter_model.safetensors") for n in ("adapter", "value")}
    return {"metrics": kept, **hashes}


@pytest.mark.parametrize(
    "model_type", ["qwen3_5_text", *(pytest.param(m, marks=pytest.mark.long) for m in ("lfm2", "granitemoehybrid"))]
)
def test_placement_and_kill_change_nothing(
    model_type: str, two_gpus: Any, split_job: Job, tiny_hybrid: Callable[..., Path], console: Any, tmp_path: Path
) -> None:
    common: dict[str, Any] = {"model_name_or_path": str(tiny_hybrid(model_type=model_type)), "save_steps": 1}
    common |= {"response_length": 12, "eval_on_start": False}
    undisturbed = result(ppo(split_job("colocate", **ALONE, **common), console).run_dir)
    first = undisturbed["metrics"][0]
    assert first["ratio/first_minibatch_max_deviation"] == 0.0 and first["sampler/logprob_difference"] < 1e-4
    assert result(ppo(split_job("split", **common), console).run_dir) == undisturbed

    killed = split_job("killed", **ALONE, **common, resume="auto")
    job = tmp_path / "killed.yaml"
    job.write_text(dump_yaml(killed.model_dump(mode="json", exclude_unset=True)))
    environment = {**os.environ, "RLHF_RAY_FAULT": "learner:update:step=2:kill"}
    done = subprocess.run([sys.executable, "-m", "rlhf_ray.cli", "ppo", str(job)], env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in Path(killed.output_dir).glob("checkpoints/step_*")] == ["step_000001"]
    assert result(ppo(killed, console).run_dir) == undisturbed
