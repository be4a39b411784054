"""max_staleness 1 with real generators: the same bits whoever samples and whatever dies, equal to the run in one process."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from rlhf_ray.config import PPOConfig
from rlhf_ray.errors import RlhfRayError
from rlhf_ray.metrics import read_metrics
from rlhf_ray.roles.collector import Collected, Collector
from rlhf_ray.stages.start import ppo
from rlhf_ray.storage.run import Run
from rlhf_ray.storage.run_folder import sha256_file

pytestmark = pytest.mark.integration
Job = Callable[..., PPOConfig]
STEPS = {"max_steps": 4, "save_steps": 1, "eval_on_start": False, "eval_steps": 4, "ref_model_sync_steps": 2}


def adapter_sha256(run: Run, name: str = "adapter") -> str:
    return sha256_file(Path(run.run_dir) / name / "adapter_model.safetensors")


def deterministic(run: Run) -> list[dict[str, Any]]:
    rows = read_metrics(Path(run.run_dir) / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k.split("/")[0] not in ("time", "memory", "faults")} for row in rows]


@pytest.fixture
def in_process(split_job: Job, console: Any, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The same job without Ray, sampling each rollout at the moment when it is begun."""
    begin, finish = Collector.start, Collector.finish
    with monkeypatch.context() as patch:
        patch.setattr(Collector, "start", lambda self, *args: finish(self, begin(self, *args)))
        patch.setattr(Collector, "collect", Collector.start)
        patch.setattr(Collector, "finish", lambda self, s: s if isinstance(s, Collected) else finish(self, s))
        job = split_job("alone", placement="colocate", learner={"num_workers": 0, "num_threads": 1}, **STEPS)
        return ppo(job.model_copy(update={"max_staleness": 1}), console)


def test_it_equals_the_run_in_one_process_even_if_a_generator_dies(
    two_gpus: Any, split_job: Job, console: Any, tmp_path: Path, in_process: Run
) -> None:
    run = ppo(split_job("split", max_staleness=1, **STEPS), console)
    assert adapter_sha256(run) == adapter_sha256(in_process)
    assert adapter_sha256(run, "value") == adapter_sha256(in_process, "value")
    assert deterministic(run) == deterministic(in_process)
    steps = [row for row in deterministic(run) if row["step"]]
    assert [row["sampler/staleness"] for row in steps] == [0, 1, 1, 1]
    # reset after step 2, when rollout 3 is on its way to scorers already
    assert [row["kl/reference_step"] for row in steps] == [0, 0, 0, 2]
    killed = ppo(split_job("killed", max_staleness=1, **STEPS), Killer(tmp_path / "victim", console))
    assert not (tmp_path / "victim").exists(), "nobody was killed"
    assert adapter_sha256(killed) == adapter_sha256(in_process)
    assert deterministic(killed) == deterministic(in_process)


class Killer:
    """A console that tells the reward function, which then kills it, the process id of generator 1."""

    def __init__(self, victim: Path, console: Any) -> None:
        self.victim, self.inner = victim, console

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def emit(self, event: dict[str, Any]) -> None:
        found = re.search(r"generator 1 +pid (\d+)", "\n".join(event.get("lines", [])))
        if found and event["kind"] == "header":
            self.victim.write_text(found[1])
        self.inner.emit(event)


@pytest.mark.long
def test_a_run_stopped_with_a_rollout_under_way_goes_on_to_the_same_bits(
    two_gpus: Any, split_job: Job, console: Any, tmp_path: Path
) -> None:
    straight = ppo(split_job("straight", max_staleness=1, **STEPS), console)
    job = split_job("broken", max_staleness=1, resume="auto", **STEPS)
    reward = Path(str(job.rewards[0].function).rsplit(":", 1)[0])
    intact = reward.read_text()
    # 6 chunks a step; rollout 4 is scored while step 3 learns
    reward.write_text(intact.replace("    CALLS += 1\n", "    CALLS += 1\n    assert CALLS < 20, 'out of order'\n"))
    with pytest.raises(RlhfRayError, match="out of order"):
        ppo(job, console)
    reward.write_text(intact)
    resumed = ppo(job, console)
    assert "resuming from step" in console.text
    assert adapter_sha256(resumed) == adapter_sha256(straight)
    assert deterministic(resumed) == deterministic(straight)


@pytest.mark.long
def test_two_ranks_two_adapters_on_the_board(two_gpus: Any, split_job: Job, console: Any) -> None:
    """Both ranks hand out chunks with the adapter from before the update, and probe them under it."""
    learner = {"num_workers": 2, "num_threads": 1, "num_gpus": 0.0}
    two = ppo(split_job("two", max_staleness=1, learner=learner, **STEPS), console)
    steps = [row for row in deterministic(two) if row["step"]]
    assert [row["sampler/staleness"] for row in steps] == [0, 1, 1, 1]
    assert all(row["sampler/probe_difference"] < 1e-5 for row in steps)
    one = ppo(split_job("one", max_staleness=1, **STEPS), console)
    gap = [
        (a - b).abs().max()
        for a, b in zip(
            *(load_file(Path(r.run_dir) / "adapter" / "adapter_model.safetensors").values() for r in (one, two))
        )
    ]
    assert max(gap) < 1e-6
