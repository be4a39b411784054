"""`rollout.cuda_graphs` on a CPU, where it is the same buffers without graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_ray.config import PPOConfig
from rlhf_ray.metrics import read_metrics

from .test_ppo import run

pytestmark = pytest.mark.integration


def test_a_run_by_steps_over_shapes_that_last(
    ppo_job: Callable[..., PPOConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The replies of ordinary steps, while the adapter changes from step to step; log-probabilities differ by rounding."""
    from rlhf_ray.sampler import static_step

    steps: list[int] = []
    original = static_step.StaticSteps.step

    def counted(self: static_step.StaticSteps, *args: object) -> object:
        steps.append(self.made)
        return original(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(static_step.StaticSteps, "step", counted)
    ordinary = run(ppo_job("ordinary"))
    assert not steps
    static = run(ppo_job("static", rollout={"cuda_graphs": True}))
    assert len(steps) > 3 * 2 * 7  # two chunks of 8 tokens a step, and evaluations
    for one, other in zip(
        *(read_metrics(Path(done.run_dir, "metrics.jsonl"))[1:] for done in (ordinary, static)), strict=True
    ):
        assert other["reward/mean"] == pytest.approx(one["reward/mean"], abs=1e-6)
        assert other["ratio/first_minibatch_max_deviation"] == 0 and other["sampler/probe_difference"] < 1e-4
