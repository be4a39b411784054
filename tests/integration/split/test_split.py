"""`placement: split` against `colocate`: who does the work changes nothing about it, not even if a generator is killed."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from rlhf_ray.config import PPOConfig
from rlhf_ray.console import Console
from rlhf_ray.metrics import read_metrics
from rlhf_ray.stages.start import ppo
from rlhf_ray.storage.run import Run
from rlhf_ray.storage.run_folder import sha256_file

pytestmark = pytest.mark.integration
Job = Callable[..., PPOConfig]
RESETS = {"ref_model_sync_steps": 1}


def adapter_sha256(run: Run, name: str = "adapter") -> str:
    return sha256_file(Path(run.run_dir) / name / "adapter_model.safetensors")


def published_sha256(run: Run) -> str:
    """The hash under which the last checkpoint's adapter was published."""
    state = max(Path(run.run_dir).glob("checkpoints/step_*")) / "state.json"
    return str(json.loads(state.read_text())["adapter_sha256"])


def deterministic(run: Run) -> list[dict[str, Any]]:
    rows = read_metrics(Path(run.run_dir) / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k.split("/")[0] not in ("time", "memory", "faults")} for row in rows]


@pytest.fixture
def colocated(split_job: Job, console: Any) -> Run:
    """The same job in this process."""
    learner = {"num_workers": 0, "num_threads": 1}
    return ppo(split_job("colocate", placement="colocate", learner=learner, **RESETS), console)


def test_split_gives_the_adapter_of_colocate(two_gpus: Any, split_job: Job, console: Any, colocated: Run) -> None:
    """Bit for bit, critic and metrics included, also where the scorers get a new reference after step 1."""
    run = ppo(split_job("split", **RESETS), console)
    assert adapter_sha256(run) == adapter_sha256(colocated)
    assert adapter_sha256(run, "value") == adapter_sha256(colocated, "value")
    assert deterministic(run) == deterministic(colocated)
    last = read_metrics(Path(run.run_dir) / "metrics.jsonl")[-1]
    assert last["faults/retries"] == 0.0
    assert 0.0 < last["time/idle_generator"] < 1.0
    assert ">Idle<" in (Path(run.run_dir) / "report.html").read_text()
    tensors = load_file(Path(run.run_dir) / "adapter" / "adapter_model.safetensors").values()
    assert last["sync/bytes"] == sum(t.numel() * 4 for t in tensors), "the adapter moves, and nothing else"
    log = (Path(run.run_dir) / "roles.log").read_text()
    assert re.findall(r"(step \d|evaluation at step \d): adapter (\d) \((\w{8})\)", log)[-1] == (
        *("evaluation at step 2", "2"),
        published_sha256(run)[:8],
    )
    assert len(re.findall(r"step \d: adapter \d \(\w+\)  generator 0: 3 chunks.* generator 1: 3 chunks", log)) == 2
    assert "roles.log" in console.text and "step 2: adapter 1" in (Path(run.run_dir) / "report.html").read_text()


def test_roles_land_on_their_gpus(two_gpus: Any, split_job: Job, console: Any) -> None:
    """The learner has a GPU for itself; generators and scorer share the other one, by fractions."""
    ppo(split_job("gpus", max_steps=1, eval_on_start=False), console)
    lines = [line.split() for line in console.text.splitlines()]
    of = {" ".join(w[:2]): w[w.index("GPU") + 1].strip(",") for w in lines if w[0] in ("generator", "scorer")}
    assert set(of) == {"generator 0", "generator 1", "scorer 0"}
    assert len(set(of.values())) == 1
    learner = next(w for w in lines if w[0] == "learner")
    assert {learner[learner.index("GPU") + 1].strip(","), *of.values()} == {"0", "1"}


@pytest.mark.long
def test_two_learner_ranks_hand_out_their_own_chunks(two_gpus: Any, split_job: Job, console: Any) -> None:
    """Rank 0 puts the adapter into the object store, rank 1 gets the reference; both placements give the same adapter."""
    learner = {"num_workers": 2, "num_threads": 1, "num_gpus": 0.0}
    split = ppo(split_job("split2", learner=learner, **RESETS), console)
    beside = ppo(split_job("colocate2", placement="colocate", learner=learner, **RESETS), console)
    assert adapter_sha256(split) == adapter_sha256(beside)
    assert deterministic(split) == deterministic(beside)
    assert "rank 1, pid" in console.text


class Assassin(Console):
    """Tells the reward function, which then kills (or stops) it, the process id of an actor."""

    def __init__(self, victim: Path, who: str, how: int = signal.SIGKILL) -> None:
        self.victim, self.who, self.how, self.text = victim, who, how, ""

    def emit(self, event: dict[str, Any]) -> None:
        self.text += "\n".join([*event.get("lines", []), event.get("text", "")]) + "\n"
        found = re.search(self.who + r" +pid (\d+)", self.text)
        if found and event["kind"] == "header":
            self.victim.write_text(f"{found[1]} {int(self.how)}")


def test_a_generator_killed_in_a_rollout(two_gpus: Any, split_job: Job, tmp_path: Path, colocated: Run) -> None:
    """Fault 1: kill -9 while chunks are under way. Same steps, same adapter, and the run says what happened."""
    console = Assassin(tmp_path / "victim", "generator 1")
    run = ppo(split_job("killed", **RESETS), console)
    steps = read_metrics(Path(run.run_dir) / "metrics.jsonl")
    assert not (tmp_path / "victim").exists(), "nobody was killed"
    assert sum(row.get("faults/retries", 0.0) for row in steps) >= 1.0
    assert "generator 1: lost while sampling chunk" in console.text
    assert (run.steps, adapter_sha256(run)) == (colocated.steps, adapter_sha256(colocated))
    assert deterministic(run) == deterministic(colocated)
    assert re.search(r"step \d: adapter .* chunks? done again", (Path(run.run_dir) / "roles.log").read_text())


@pytest.mark.long
def test_the_only_generator_killed(two_gpus: Any, split_job: Job, tmp_path: Path, colocated: Run) -> None:
    """Its work waits for its restart. It comes back without an adapter, and loads the one that the next request names (fault 4)."""
    console = Assassin(tmp_path / "victim", "generator 0")
    alone = {"num_actors": 1, "num_gpus": 0.5, "num_cpus": 0.25, "num_threads": 1}
    run = ppo(split_job("alone", generator=alone, **RESETS), console)
    assert not (tmp_path / "victim").exists(), "nobody was killed"
    assert "generator 0: is back, pid" in console.text
    assert adapter_sha256(run) == adapter_sha256(colocated)


@pytest.mark.long
def test_the_only_scorer_killed_in_a_step(two_gpus: Any, split_job: Job, tmp_path: Path, colocated: Run) -> None:
    """Fault 5: chunks wait for its restart and are scored again; none is made up."""
    console = Assassin(tmp_path / "victim", "scorer 0")
    run = ppo(split_job("scorer", **RESETS), console)
    assert not (tmp_path / "victim").exists(), "nobody was killed"
    assert "scorer 0: lost while scoring chunk" in console.text and "scorer 0: is back, pid" in console.text
    assert re.search(r"scorer 0  restarted: pid \d+ on", (Path(run.run_dir) / "roles.log").read_text())
    assert (run.steps, adapter_sha256(run)) == (colocated.steps, adapter_sha256(colocated))
    assert deterministic(run) == deterministic(colocated)


@pytest.mark.long
@pytest.mark.parametrize("who", ["generator 1", "scorer 0"])
def test_an_actor_that_hangs(two_gpus: Any, split_job: Job, tmp_path: Path, colocated: Run, who: str) -> None:
    """Fault 2: SIGSTOP. After `timeout_s` without a chunk it is ended, restarted, and its chunks done again."""
    console, role = Assassin(tmp_path / "victim", who, signal.SIGSTOP), who.split()[0]
    given = split_job("x").model_dump(exclude_unset=True)[role]
    run = ppo(split_job("hangs", **{role: {**given, "timeout_s": 45.0}}, **RESETS), console)
    assert not (tmp_path / "victim").exists(), "nobody was stopped"
    assert f"{who}: no answer within 45 s while" in console.text
    assert (run.steps, adapter_sha256(run)) == (colocated.steps, adapter_sha256(colocated))
    assert deterministic(run) == deterministic(colocated)
