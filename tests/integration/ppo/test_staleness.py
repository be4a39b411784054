"""max_staleness 1 in this process: a collector that samples when it is asked to begin stands for generators of their own.

(tests/integration/split/test_staleness.py runs the real ones, and compares the two.)"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_ray.config import PPOConfig
from rlhf_ray.console import NullConsole
from rlhf_ray.errors import ConfigError, InvariantError
from rlhf_ray.metrics import read_metrics
from rlhf_ray.roles.collector import Collected, Collector
from rlhf_ray.roles.learner import Learner
from rlhf_ray.stages.start import ppo
from rlhf_ray.storage.run import Run
from rlhf_ray.training import run_entry

pytestmark = pytest.mark.integration
Job = Callable[..., PPOConfig]


def stale(job: PPOConfig) -> PPOConfig:
    """The job with max_staleness 1, which its own validation refuses without generators of their own."""
    return job.model_copy(update={"max_staleness": 1})


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = Collector.start

    def start(self: Collector, *args: Any) -> Any:
        return Collector.finish(self, begin(self, *args))

    monkeypatch.setattr(Collector, "collect", start)
    monkeypatch.setattr(Collector, "start", start)

    finish = Collector.finish
    monkeypatch.setattr(Collector, "finish", lambda self, s: s if isinstance(s, Collected) else finish(self, s))


def run(config: PPOConfig) -> Run:
    return ppo(config, NullConsole())


def weights(folder: str | Path, name: str = "adapter") -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / name / "adapter_model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


def metrics(folder: str | Path) -> list[dict[str, Any]]:
    rows = read_metrics(Path(folder) / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k.split("/")[0] not in ("time", "memory", "faults")} for row in rows]


def test_rollouts_come_from_before_the_last_update(ppo_job: Job, eager: None) -> None:
    done = run(stale(ppo_job("stale", max_steps=4, save_steps=1)))
    steps = [row for row in metrics(done.run_dir) if row["step"] > 0]
    assert [row["sampler/staleness"] for row in steps] == [0, 1, 1, 1]
    assert all(row["ratio/first_minibatch_max_deviation"] == 0 for row in steps), "old is the learner's own"
    assert all(row["sampler/probe_difference"] < 1e-5 for row in steps), "checked against the adapter that sampled"
    assert all(row["sampler/logprob_difference"] > 1e-4 for row in steps[1:]), "which is not the one that learns"
    assert all(row["sampler/importance_weight"] != 1 for row in steps[1:])
    for step in (2, 3):  # the rollout stored with step n was sampled by adapter n - 1, the one of checkpoint n - 1
        checkpoints = Path(done.run_dir) / "checkpoints"
        stored = load_file(checkpoints / f"step_{step:06d}" / "waiting" / "adapter.safetensors")
        before = weights(checkpoints / f"step_{step - 1:06d}")
        assert same(stored, before)
    assert not (checkpoints / "step_000004" / "waiting").exists()


def test_the_first_step_is_the_same_and_the_second_is_not(ppo_job: Job, eager: None) -> None:
    late, fresh = run(stale(ppo_job("late"))), run(ppo_job("fresh"))
    one, other = metrics(late.run_dir), metrics(fresh.run_dir)
    rolled = [name for name in other[1] if name.split("/")[0] in ("reward", "response", "kl")]
    assert [one[1][name] for name in rolled] == [other[1][name] for name in rolled]
    assert one[1]["loss/policy"] == pytest.approx(other[1]["loss/policy"], abs=1e-6), "weights are 1 up to rounding"
    assert one[2]["reward/mean"] != other[2]["reward/mean"]
    assert not same(weights(late.run_dir), weights(fresh.run_dir))


def test_an_interrupted_run_goes_on_to_the_same_bits(
    ppo_job: Job, eager: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = {"max_steps": 4, "save_steps": 1, "eval_on_start": False}
    for check in ("require_same", "require_same_as_saved"):  # would refuse a job that no file can describe
        monkeypatch.setattr(run_entry, check, lambda *_: {})
    straight = run(stale(ppo_job("straight", **common)))
    broken = stale(ppo_job("broken", **common, resume="auto"))
    update, calls = Learner.update, []

    def fails_in_step_3(self: Learner, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("gone")
        return update(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "update", fails_in_step_3)
        with pytest.raises(RuntimeError, match="gone"):
            run(broken)
    resumed = run(broken)
    assert same(weights(straight.run_dir), weights(resumed.run_dir))
    assert same(weights(straight.run_dir, "value"), weights(resumed.run_dir, "value"))
    assert metrics(straight.run_dir) == metrics(resumed.run_dir)


def test_the_probe_puts_the_policy_back_and_finds_a_foreign_sampler(
    ppo_job: Job, eager: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sampler that used the newest adapter under the older one's name: its log-probabilities give it away."""
    probed, often = run(stale(ppo_job("often"))), run(stale(ppo_job("never", probe_steps=100)))
    assert same(weights(probed.run_dir), weights(often.run_dir)), "probing leaves no trace"
    under = Learner.logprobs_under

    def under_the_newest(self: Learner, adapter: Any, rollout: Any) -> Any:
        return under(self, self.published, rollout)

    monkeypatch.setattr(Learner, "logprobs_under", under_the_newest)
    with pytest.raises(InvariantError, match=r"step 2: sampler and learner disagree.*adapter version 0"):
        run(stale(ppo_job("foreign", learning_rate=5e-2)))


def test_it_needs_generators_of_their_own(ppo_job: Job) -> None:
    with pytest.raises((ConfigError, ValueError), match="max_staleness: 1 needs generators of their own"):
        ppo_job("x", max_staleness=1)
