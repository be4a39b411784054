"""`placement: split` with a learner of two ranks at ZeRO stage 3: whoever reads or writes weights there does it on every rank.

Publishing, the probe under an older adapter, and the report of a disagreement would otherwise wait for a rank that never comes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_ray.config import PPOConfig
from rlhf_ray.errors import InvariantError
from rlhf_ray.launch.launch import launch
from rlhf_ray.metrics import read_metrics
from rlhf_ray.runtime.session import Session
from rlhf_ray.storage.run import Run

pytestmark = [pytest.mark.integration, pytest.mark.long]


def train(config: PPOConfig, session: Session) -> Run:
    """`train_ppo`, with the proof that nothing of base or adapters was on this rank outside a forward pass, before and after. (What
    DeepSpeed keeps whole, small tensors by default, is there from the first forward pass on: a look before tells nothing.)

    A run called `disagree` takes any difference between sampler and learner for too large."""
    from rlhf_ray.ppo import loop as stage

    set_up, looks = stage.set_up, []

    def watched(*args: Any) -> Any:
        setup = set_up(*args)

        def look() -> None:
            here = {name: tuple(p.shape) for name, p in setup.learner.models.named_parameters() if p.numel()}
            assert not here or config.learner.zero_stage < 3, f"not sharded: {here}"

        look()
        looks.append(look)
        return replace(setup, tolerance=-1.0) if config.output_dir.endswith("disagree") else setup

    stage.set_up = watched
    try:
        run = stage.train_ppo(config, session)
    finally:
        stage.set_up = set_up
    for look in looks:
        look()
    return run


@pytest.fixture
def job(two_gpus: Any, split_job: Callable[..., PPOConfig], tmp_path: Path) -> Callable[..., PPOConfig]:
    """job("name", stage, ...) -> 3 steps with rollouts one step ahead, each of them probed; two ranks."""
    two_gpus.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    settings = tmp_path / "zero3.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))

    def make(name: str, stage: int, **changes: Any) -> PPOConfig:
        learner: dict[str, Any] = {"num_workers": 2, "num_threads": 1, "num_gpus": 0.0, "zero_stage": stage}
        if stage == 3:
            learner["deepspeed"] = str(settings)
        common: dict[str, Any] = {"max_steps": 3, "max_staleness": 1, "probe_steps": 1, "learner": learner}
        return split_job(name, **{**common, **changes})

    return make


def weights(run: Run, name: str) -> dict[str, torch.Tensor]:
    return load_file(Path(run.run_dir) / name / "adapter_model.safetensors")


def test_it_learns_what_stage_0_learns(job: Callable[..., PPOConfig], console: Any) -> None:
    plain, sharded = (launch(train, job(f"stage_{stage}", stage), console) for stage in (0, 3))
    for name in ("adapter", "value"):
        ours, theirs = weights(sharded, name), weights(plain, name)
        assert ours.keys() == theirs.keys()
        assert max(float((ours[k] - theirs[k]).abs().max()) for k in ours) < 1e-5
    steps = [row for row in read_metrics(Path(sharded.run_dir) / "metrics.jsonl") if row["step"]]
    assert [row["sampler/staleness"] for row in steps] == [0, 1, 1]
    assert all(row["sampler/probe_difference"] < 1e-5 for row in steps), "probed under the adapter that sampled"
    assert steps[-1]["sync/bytes"] == sum(t.numel() * 4 for t in weights(sharded, "adapter").values())


def test_a_disagreement_is_told_and_nobody_waits(job: Callable[..., PPOConfig], console: Any) -> None:
    with pytest.raises(InvariantError, match=r"step 1: .*generator 0 holds the learner's adapter, all \d+ tensors"):
        launch(train, job("disagree", 3), console)
