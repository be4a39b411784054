"""What cannot be had is told in seconds, exit code 3, and nothing stays reserved."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config import PPOConfig
from rlhf_ray.console import Console
from rlhf_ray.errors import ResourceError
from rlhf_ray.stages.start import ppo
from rlhf_ray.storage.run import Run

pytestmark = pytest.mark.integration
Job = Callable[..., PPOConfig]


def free(ray: Any) -> dict[str, float]:
    return {kind: ray.available_resources().get(kind, 0.0) for kind in ("CPU", "GPU")}


def test_an_impossible_request_is_refused_at_once(two_gpus: Any, split_job: Job, console: Any) -> None:
    """In under 5 s from being connected, with what is missing and what would fit."""
    job = split_job("greedy", generator={"num_actors": 2, "num_gpus": 1.0, "num_cpus": 0.1})
    started = time.monotonic()
    with pytest.raises(
        ResourceError, match=r"do not fit together.*expected 3.5 GPU; got 3 CPU, 2 GPU.*fix: set generator"
    ) as caught:
        ppo(job, console)
    assert time.monotonic() - started < 5.0
    assert caught.value.exit_code == 3
    assert not Path(job.output_dir).exists()
    assert free(two_gpus) == {"CPU": 3.0, "GPU": 2.0}


def test_half_of_what_a_job_needs_is_not_kept(two_gpus: Any, split_job: Job, console: Any) -> None:
    """Its actors can be placed, its learner cannot: another job holds the second GPU."""
    from ray.util.placement_group import placement_group, remove_placement_group

    other = placement_group([{"GPU": 1.0}])
    assert other.wait(10)
    try:
        wanted = (
            r"generator and scorer and learner: cannot be placed within 2 s: .*expected .* 2 GPU; got .* 1 GPU free"
        )
        with pytest.raises(ResourceError, match=wanted):
            ppo(split_job("second", wait_for_resources=2.0), console)
        left, deadline = {"CPU": 3.0, "GPU": 1.0}, time.monotonic() + 20
        while free(two_gpus) != left and time.monotonic() < deadline:
            time.sleep(0.1)
        assert free(two_gpus) == left
    finally:
        remove_placement_group(other)


class Signal(Console):
    """Sets `started` when a run has said what it is."""

    def __init__(self) -> None:
        self.started = threading.Event()

    def emit(self, event: dict[str, Any]) -> None:
        if event["kind"] == "header":
            self.started.set()


@pytest.mark.long
def test_two_runs_where_one_fits(two_gpus: Any, split_job: Job, console: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One runs to its end, the other ends with exit code 3 while the first is at work."""
    first, done = Signal(), []

    def run_first() -> None:
        done.append(ppo(split_job("first", max_steps=6), first))

    thread = threading.Thread(target=run_first)
    thread.start()
    try:
        assert first.started.wait(120)
        with pytest.raises(ResourceError, match="cannot be placed within 2 s") as caught:
            ppo(split_job("second", wait_for_resources=2.0), console)
        assert caught.value.exit_code == 3
    finally:
        thread.join(240)
    assert [(type(run), run.steps) for run in done] == [(Run, 6)]


def test_two_jobs_at_the_same_moment(two_gpus: Any, split_job: Job, console: Any) -> None:
    """Both start to wait while a third job holds the cluster, and each could get half of what it needs when that ends: one gets all
    of it, the other ends with exit code 3 and holds nothing."""
    from ray.util.placement_group import placement_group, remove_placement_group

    from rlhf_ray.launch.placement import placed
    from rlhf_ray.launch.resources import role_requests
    from rlhf_ray.stages.start import BUILDERS

    third, over, ends = placement_group([{"GPU": 1.0}] * 2), threading.Event(), []
    assert third.wait(10)

    def place(name: str) -> None:
        job = split_job(name, wait_for_resources=20.0)
        try:
            with placed(
                job, role_requests(job, two_gpus.cluster_resources(), False), console, BUILDERS
            ) as actor_handles:
                ends.append(len(actor_handles.actors["generator"]))
                assert over.wait(60)
        except ResourceError as error:
            ends.append(error.exit_code)
            over.set()

    threads = [threading.Thread(target=place, args=(name,)) for name in ("one", "other")]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    remove_placement_group(third)
    for thread in threads:
        thread.join(90)
    assert sorted(ends) == [2, 3], "generators of the one, exit code of the other"
