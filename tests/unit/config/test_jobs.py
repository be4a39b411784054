"""The job files that come with the project load, and say what they are for."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_ray.config import STAGES, PipelineConfig, PPOConfig, SamplingConfig, ServeConfig, SweepConfig
from rlhf_ray.config.load import load
from rlhf_ray.launch.preflight import check
from rlhf_ray.launch.resources import Node, role_requests
from rlhf_ray.sweep.capacity import capacity
from rlhf_ray.sweep.trials import job_of, planned

JOBS = sorted((Path(__file__).parents[3] / "jobs").glob("*.yaml"))


def stage_of(job: Path) -> str:
    """The command of the launch line in the header."""
    launch = (line for line in job.read_text().splitlines() if line.startswith("#   rlhf-ray "))
    line = next(line for line in launch if job.name in line)
    return line.split()[2]


def test_there_are_some() -> None:
    assert {"ppo_2xa100_split", "ppo_2xa100_colocate", "alpaca_8b_24gb"} <= {job.stem for job in JOBS}


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.stem)
def test_it_loads_and_its_header_tells_hardware_launch_line_and_what_is_measured(job: Path) -> None:
    stage = stage_of(job)
    classes = {**STAGES, "pipeline": PipelineConfig, "sweep": SweepConfig, "serve": ServeConfig}
    load(classes[stage], job, (), check_files=False)
    header = job.read_text().split("\noutput_dir")[0]
    assert f"rlhf-ray {stage} jobs/{job.name}" in header
    assert ("GB" in header or "GiB" in header) and ("measured" in header or "estimated" in header)
    if stage != "serve":
        assert "Expected time" in header and "Expected curve" in header


@pytest.mark.parametrize("name", ["ppo_2xa100_split", "ppo_2xa100_colocate"])
def test_seed_1_on_two_gpus(name: str) -> None:
    """Its README's settings, with the minibatch that it really had (F1); and it fits on the two GPUs of its name."""
    job = next(job for job in JOBS if job.stem == name)
    config = load(PPOConfig, job, (), check_files=False)
    assert isinstance(config, PPOConfig)
    assert (config.rollout_batch_size, config.rollout_batch_size // config.num_mini_batches) == (256, 16)
    assert (config.learning_rate, config.kl_penalty, config.kl_coef) == (1e-5, "jensen_shannon", 0.02)
    assert (config.lora.r, config.lora.lora_alpha, config.response_length, config.max_length) == (8, 64.0, 300, 492)
    node = Node("two GPUs", {"CPU": 32.0, "GPU": 2.0})
    placed = check(role_requests(config, node.resources, own_ray=True), [node])
    assert sum(len(p) for p in placed.values()) == (3 if name.endswith("split") else 2)


@pytest.mark.parametrize("name", ["sweep_kl", "sweep_kl_2xa100"])
def test_sweeps_make_jobs_of_every_penalty(name: str) -> None:
    """Every trial is a valid PPO job; the number in the header is theirs; and trials fit on the hardware that it names."""
    job = next(job for job in JOBS if job.stem == name)
    config = load(SweepConfig, job, (), check_files=False)
    assert isinstance(config, SweepConfig)
    trials = planned(config)
    jobs = [job_of(config, trial) for trial in trials]
    assert {job.kl_penalty for job in jobs} == {
        "kl",
        "clamped_kl",
        "bregman",
        "jensen_shannon",
        "squared_error",
        "none",
    }
    assert f"{len(trials)} trials" in job.read_text()
    gpus = 2.0 if "2xa100" in name else 1.0
    found = capacity(jobs, {"CPU": 16.0, "GPU": gpus}, [Node("node", {"CPU": 16.0, "GPU": gpus})], own_ray=True)
    assert (found.in_process, found.at_once) == (True, 2)


def test_defaults_that_depend_on_other_fields_are_written_out() -> None:
    """So that a stored run says what it did, and a stage derived from an older pipeline is the same one."""
    job = {"output_dir": "x", "model_name_or_path": "m", "data": {"train": "d"}, "rewards": [{"function": "f.py:f"}]}
    plain = PPOConfig(**job)
    assert (plain.whiten_advantages, plain.eval_sampling.temperature) == (True, 1.0)
    sharp = PPOConfig(**job, temperature=0.7, advantage_estimator="rloo", num_generations=2)
    assert (sharp.whiten_advantages, sharp.eval_sampling.temperature) == (False, 0.7)
    assert PPOConfig(**sharp.model_dump()) == sharp
    own = PPOConfig(**job, temperature=0.7, eval_sampling={"temperature": 1.0})
    greedy = PPOConfig(**job, temperature=0.7, eval_sampling=SamplingConfig(do_sample=False))
    assert own.eval_sampling.temperature == greedy.eval_sampling.temperature == 1.0
