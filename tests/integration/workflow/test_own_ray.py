"""The Ray that a job starts for itself."""

from __future__ import annotations

import os

import pytest

from rlhf_ray.launch.ray_cluster import cluster

pytestmark = pytest.mark.integration


def test_its_workers_have_the_priority_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's default, niceness 15, starves them beside any other busy process."""
    import ray

    for name in ("RAY_ADDRESS", "RAY_worker_niceness"):
        monkeypatch.delenv(name, raising=False)
    with cluster("") as own:
        assert own
        niceness = ray.remote(num_cpus=0.1)(lambda: os.nice(0)).remote()
        assert ray.get(niceness, timeout=60) == os.nice(0)
    monkeypatch.delenv("RAY_worker_niceness")  # which the job has set
