"""A checkpoint holds nothing in vain: without any one item, the run that goes on is not the run that nobody touched."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.maths.controllers import make_controller
from rlhf_ray.maths.stats import RunningMoments
from rlhf_ray.storage.run_folder import describe_files

from .dropping import Drop, state, tensors

pytestmark = pytest.mark.integration


def nothing(checkpoint: Path) -> None:
    pass


CONTROLLER = make_controller("adaptive", 0.05, 6.0, 10000.0, 0.1).state_dict()
ITEMS: dict[str, Drop] = {
    "policy adapter": tensors("adapter/adapter_model.safetensors", "lora_B"),
    "value adapter": tensors("value/adapter_model.safetensors", "lora_B"),
    "value head": tensors("value/adapter_model.safetensors", "score"),
    "mean of gradients, policy": tensors("optimizer.safetensors", "policy."),
    "mean of gradients": tensors("optimizer.safetensors", "::exp_avg"),
    "mean of squared gradients": tensors("optimizer.safetensors", "::exp_avg_sq"),
    "optimizer step": tensors("optimizer.safetensors", "::step"),
    "KL controller": state(kl_controller=CONTROLLER),
    "reward statistics": state(reward_moments=RunningMoments().state_dict()),
    "step": state(step=2),
    "tokens": state(tokens=0),
    "best evaluation": state(best={"step": 0, "reward": (-float("inf")).hex()}),
    "first values": state(first={}),
    "length of metrics.jsonl": state(metrics_bytes=0),
    "length of samples.jsonl": state(samples_bytes=0),
    "hash of the adapter": state(adapter_sha256=""),
}
SHORT = ("nothing", "KL controller", "optimizer step", "value head")


def without(run: Path, drop: Drop) -> None:
    """Drop an item of the newest checkpoint, under a manifest that says all is well."""
    checkpoint = max((run / "checkpoints").glob("step_*"))
    drop(checkpoint)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    files = describe_files(checkpoint, skip=("manifest.json",))
    (checkpoint / "manifest.json").write_text(json.dumps({**manifest, "files": files}))


@pytest.mark.parametrize(
    "item", [pytest.param(i, marks=() if i in SHORT else pytest.mark.long) for i in ("nothing", *ITEMS)]
)
def test_it_is_missed(world: Any, untouched: Path, stopped: Path, item: str, same: Any) -> None:
    name = "without-" + item.replace(" ", "-").replace(",", "")
    run = world.copy("stopped", name)
    without(run, ITEMS.get(item, nothing))
    child = world.start("resume", f"runs/{name}")
    code = child.wait()
    assert code in (0, 5), child.text
    went_on_alike = code == 0 and same(untouched, run)
    assert went_on_alike == (item == "nothing"), child.text


def test_the_last_values_are_what_a_run_ends_with_that_has_no_step_left(world: Any, untouched: Path, same: Any) -> None:
    """Killed between its last checkpoint and its summary."""
    child = world.start("ppo", world.job("ended"), fault="learner:step_end:step=10:kill")
    assert child.wait() == -signal.SIGKILL, child.text
    world.copy("ended", "ended-too")
    world.finish("ended")
    assert same(untouched, world.run("ended"))
    without(world.run("ended-too"), state(last={}))
    world.finish("ended-too")
    assert not same(untouched, world.run("ended-too"))
