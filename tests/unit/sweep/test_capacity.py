"""How many trials fit at once: Tune does not count the workers that a trial starts."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_ray.config import PPOConfig
from rlhf_ray.errors import ResourceError
from rlhf_ray.launch.resources import Node
from rlhf_ray.sweep.capacity import capacity


def job(**changes: Any) -> PPOConfig:
    fields = {
        "output_dir": "x",
        "model_name_or_path": "m",
        "data": {"train": "p.jsonl"},
        "rewards": [{"function": "f.py:score"}],
    }
    return PPOConfig(**{**fields, **changes})


def cluster(*nodes: dict[str, float]) -> tuple[dict[str, float], list[Node]]:
    total = {kind: sum(n.get(kind, 0.0) for n in nodes) for kind in ("CPU", "GPU")}
    return total, [Node(f"n{i}", n) for i, n in enumerate(nodes)]


def test_two_cores_hold_two_trials_of_one_thread() -> None:
    found = capacity([job()], *cluster({"CPU": 2.0}), own_ray=True)
    assert (found.in_process, found.at_once, found.threads, found.each) == (True, 2, 1, {"CPU": 1.0})
    assert capacity([job(learner={"num_threads": 2})], *cluster({"CPU": 2.0}), own_ray=True).at_once == 1


def test_fractions_of_gpus() -> None:
    nodes = cluster({"CPU": 16.0, "GPU": 2.0})
    whole = capacity([job()], *nodes, own_ray=False)
    assert (whole.at_once, whole.each) == (2, {"CPU": 8.0, "GPU": 1.0})
    half = capacity([job(learner={"num_gpus": 0.5})], *nodes, own_ray=False)
    assert (half.at_once, half.each) == (4, {"CPU": 4.0, "GPU": 0.5})


def test_workers_of_their_own_are_counted() -> None:
    role = {"num_actors": 1, "num_gpus": 0.5, "num_cpus": 1.0}
    split = job(placement="split", learner={"num_gpus": 1.0, "num_threads": 2}, generator=role, scorer=role)
    found = capacity([split], *cluster({"CPU": 32.0, "GPU": 4.0}), own_ray=False)
    assert (found.in_process, found.at_once, found.each) == (False, 2, {"CPU": 0.01})
    ranks = job(learner={"num_workers": 2, "num_gpus": 1.0, "num_threads": 1})
    assert capacity([ranks], *cluster({"CPU": 8.0, "GPU": 2.0}), own_ray=False).at_once == 1


def test_the_most_demanding_trial_decides() -> None:
    jobs = [job(learner={"num_gpus": share}) for share in (0.25, 1.0)]
    assert capacity(jobs, *cluster({"CPU": 8.0, "GPU": 2.0}), own_ray=False).at_once == 2


def test_a_trial_that_fits_nowhere() -> None:
    with pytest.raises(ResourceError, match="trial"):
        capacity([job(learner={"num_gpus": 4.0})], *cluster({"CPU": 8.0, "GPU": 2.0}), own_ray=False)
