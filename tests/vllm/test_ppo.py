"""PPO with `rollout.engine: vllm`: what the builtin engine gives, within what two kernels differ."""

from __future__ import annotations

import contextlib
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rlhf_ray.config import PPOConfig
from rlhf_ray.console import NullConsole
from rlhf_ray.metrics import read_metrics
from rlhf_ray.sampler.vllm_engine import VLLMEngine, VLLMOptions
from rlhf_ray.stages.start import ppo
from rlhf_ray.storage.run import Run, load_run
from tests.integration.ppo.test_ppo import deterministic, same, weights

pytestmark = pytest.mark.integration
Job = Callable[..., PPOConfig]


def run(job: PPOConfig) -> Run:
    return ppo(job, NullConsole())


def test_it_learns_what_the_builtin_engine_learns(vllm_job: Job) -> None:
    """In this process, three steps: the same replies, so the same rewards; log-probabilities differ by rounding, and so do the
    adapters that come out. Each step is corrected by weights that are about 1."""
    found = {engine: run(vllm_job(engine, rollout={"engine": engine})) for engine in ("builtin", "vllm")}
    builtin, vllm = (read_metrics(Path(found[engine].run_dir, "metrics.jsonl")) for engine in ("builtin", "vllm"))
    assert len(builtin) == len(vllm) == 4
    for ours, theirs in zip(builtin[1:], vllm[1:]):
        assert theirs["reward/mean"] == pytest.approx(ours["reward/mean"], abs=1e-6)
        assert theirs["response/length"] == ours["response/length"]
        assert theirs["kl/k1_per_response"] == pytest.approx(ours["kl/k1_per_response"], abs=1e-3)
        assert theirs["ratio/first_minibatch_max_deviation"] == 0
        assert 0 < theirs["sampler/probe_difference"] < 1e-4
        assert theirs["sampler/importance_weight"] == pytest.approx(1, abs=1e-4)
        assert "sampler/importance_weight" not in ours
        assert theirs["sync/bytes"] == ours["sync/bytes"] > 0


def test_the_reward_rises_as_it_does_with_the_builtin_engine(vllm_job: Job) -> None:
    """20 steps of 32 replies, one run after the other in this process: both end at the same reward, well above the start."""
    fields = {"rollout_batch_size": 32, "max_steps": 20, "learning_rate": 5e-3, "eval_steps": 20, "num_ppo_epochs": 1}
    ends = {}
    for engine in ("builtin", "vllm"):
        done = run(vllm_job(engine, rollout={"engine": engine}, **fields))
        rows = read_metrics(Path(done.run_dir, "metrics.jsonl"))
        ends[engine] = rows[-1]["eval/reward"]
        start = rows[0]["eval/reward"]
        assert ends[engine] > start + 0.1, (engine, start, ends[engine])
    assert ends["vllm"] == pytest.approx(ends["builtin"], abs=0.05)


def test_it_leaves_the_process_as_it_was(vllm_job: Job) -> None:
    """Random generators, threads and what sets them: vLLM changes all of them where it starts."""
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    setter = torch.set_num_threads
    job = vllm_job("x", max_steps=1)
    from rlhf_ray.ppo.vllm import policy_engine

    policy_engine(job, torch.device("cpu"), "generator")[1].engine.close()
    after: Any = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert before == after and torch.set_num_threads is setter and torch.get_num_threads() == 1


RUN = """
import os, sys
from pathlib import Path
from rlhf_ray.config import PPOConfig
from rlhf_ray.console import NullConsole
from rlhf_ray.stages.start import ppo

if __name__ == "__main__":
    Path(sys.argv[2]).write_text(str(os.getpid()))
    ppo(PPOConfig.model_validate_json(Path(sys.argv[1]).read_text()), NullConsole())
"""


def test_a_run_whose_process_is_killed_goes_on_to_the_same_bits(vllm_job: Job, tmp_path: Path) -> None:
    """kill -9 of learner and engine, which are one process, in the rollout of step 4; the engine that goes on has read nothing of
    what the first one had in its cache."""
    common: dict[str, Any] = {"max_steps": 5, "save_steps": 1, "eval_steps": 5, "ref_model_sync_steps": 2}
    straight = run(vllm_job("straight", **common))
    killed = vllm_job("killed", **common, resume="auto")
    (tmp_path / "run.py").write_text(RUN)
    (tmp_path / "job.json").write_text(killed.model_dump_json())
    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "job.json"), str(tmp_path / "victim")]
    assert subprocess.run(command, check=False, timeout=300).returncode == -signal.SIGKILL
    assert load_run(killed.output_dir).status == "running"
    resumed = run(killed)
    assert same(weights(straight.run_dir), weights(resumed.run_dir))
    assert same(weights(straight.run_dir, "value"), weights(resumed.run_dir, "value"))
    assert deterministic(straight.run_dir) == deterministic(resumed.run_dir)


class Sleeper(VLLMEngine):
    """vLLM's own sleep, with what a GPU does then and a CPU does not: weights and slots are elsewhere until it wakes, here nan, and
    keys and values are lost."""

    naps = 0

    def __init__(self, options: VLLMOptions) -> None:
        super().__init__(options)
        self.options = replace(options, enable_sleep_mode=True)
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def sleep(self) -> None:
        super().sleep()
        if not self.kept:
            Sleeper.naps += 1
            self._in_worker(lambda worker: self._put_away(worker.model_runner))

    def _put_away(self, runner: Any) -> None:
        slots = [getattr(m, f"lora_{ab}_stacked", ()) for m in runner.model.modules() for ab in "ab"]
        held = [t for stacked in slots for t in (stacked if isinstance(stacked, (tuple, list)) else (stacked,))]
        for tensor in [*runner.model.parameters(), *held, *runner.kv_caches]:
            self.kept.append((tensor.data, tensor.data.clone()))
            tensor.data.fill_(torch.nan)

    def wake(self) -> None:
        super().wake()
        for tensor, copy in self.kept:
            tensor.copy_(copy)
        self.kept = []


def test_an_engine_that_sleeps_while_the_learner_learns(vllm_job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody touches it meanwhile, be it to hand over an adapter or to hash what layers hold: the run is that of an engine that
    never sleeps, bit for bit. (What vLLM gives back of a GPU's memory only a GPU can show.)"""
    awake = run(vllm_job("awake", eval_steps=2))
    monkeypatch.setattr("rlhf_ray.ppo.vllm.VLLMEngine", Sleeper)
    asleep = run(vllm_job("asleep", eval_steps=2))
    assert Sleeper.naps >= 1 + 2 * 3  # at the start; after each rollout and each hand-over
    assert same(weights(awake.run_dir), weights(asleep.run_dir))
    assert deterministic(awake.run_dir) == deterministic(asleep.run_dir)


class TestSplit:
    """Generators are actors, each with an engine in its process."""

    def split(self, vllm_job: Job, name: str, **changes: Any) -> PPOConfig:
        fields: dict[str, Any] = {
            "placement": "split",
            "learner": {"num_workers": 1, "num_threads": 1},
            "generator": {"num_actors": 2, "num_threads": 1},
            "scorer": {"num_actors": 1, "num_threads": 1},
            "rollout_batch_size": 24,
            "rollout_chunk_size": 4,
            "num_ppo_epochs": 1,
            "max_steps": 2,
        }
        return vllm_job(name, **{**fields, **changes})

    def test_a_generator_that_is_killed_in_a_rollout(self, vllm_job: Job, tmp_path: Path, ray_of: Any) -> None:
        """kill -9 of an engine's process: its chunks are done again, and the adapter that comes out is that of the run beside a
        learner, bit for bit, since a chunk is sampled alike by whoever samples it."""
        ray_of(num_cpus=4)
        job = self.split(vllm_job, "killed")

        def kill_the_first() -> None:
            deadline = time.monotonic() + 300
            while time.monotonic() < deadline:
                with contextlib.suppress(OSError, IndexError, AttributeError):
                    text = Path(job.output_dir, "roles.log").read_text()
                    pid = re.search(r"generator 0 +pid (\d+)", text).group(1)  # type: ignore[union-attr]
                    (tmp_path / "victim").write_text(pid)
                    return
                time.sleep(0.05)

        killer = threading.Thread(target=kill_the_first)
        killer.start()
        done = run(job)
        killer.join()
        log = Path(done.run_dir, "roles.log").read_text()
        rows = read_metrics(Path(done.run_dir, "metrics.jsonl"))
        assert not (tmp_path / "victim").exists() and sum(row.get("faults/retries", 0) for row in rows) > 0, log
        assert all(row["sampler/probe_difference"] < 1e-4 for row in rows[1:])
        beside = run(vllm_job("beside", rollout_batch_size=24, rollout_chunk_size=4, num_ppo_epochs=1, max_steps=2))
        assert load_file(done.adapter_dir / "adapter_model.safetensors").keys()
        for key, tensor in load_file(done.adapter_dir / "adapter_model.safetensors").items():
            assert torch.equal(tensor, load_file(beside.adapter_dir / "adapter_model.safetensors")[key]), key
