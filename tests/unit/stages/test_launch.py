"""Resources are checked before anything waits (faults 41, 43; exit 3)."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_ray.config import SFTConfig
from rlhf_ray.errors import ResourceError
from rlhf_ray.stages.launch import check_resources, worker_resources


def node(cpu: float, gpu: float = 0.0, alive: bool = True) -> dict[str, Any]:
    return {"Alive": alive, "Resources": {"CPU": cpu, "GPU": gpu}}


def job(**learner: Any) -> SFTConfig:
    return SFTConfig(output_dir="x", model_name_or_path="m", data={"train": "d.jsonl"}, learner=learner)


def test_more_gpus_than_any_node_has() -> None:
    with pytest.raises(ResourceError, match=r"no node has 8 GPU.*largest node has 1") as caught:
        check_resources(1, {"CPU": 1.0, "GPU": 8.0}, [node(64, 1), node(64, 9, alive=False)])
    assert caught.value.exit_code == 3 and len(caught.value.lines()) == 1


def test_more_workers_than_there_is_room_for() -> None:
    with pytest.raises(ResourceError, match=r"room for 3 workers.*learner.num_workers=3"):
        check_resources(4, {"CPU": 1.0, "GPU": 1.0}, [node(8, 2), node(1, 4)])


def test_what_fits_passes() -> None:
    check_resources(3, {"CPU": 1.0, "GPU": 1.0}, [node(8, 2), node(1, 4)])


def test_on_our_own_ray_workers_always_fit() -> None:
    for workers in (1, 2, 4):
        asked = worker_resources(job(num_workers=workers, num_threads=2), {"CPU": 2.0}, own_ray=True)
        check_resources(workers, asked, [node(2.0)])


def test_on_a_given_cluster_a_worker_asks_for_its_threads_and_a_gpu_where_there_are_some() -> None:
    assert worker_resources(job(num_threads=4), {"CPU": 8.0, "GPU": 2.0}, own_ray=False) == {"CPU": 4.0, "GPU": 1.0}
    assert worker_resources(job(num_threads=4, num_gpus=0), {"CPU": 8.0, "GPU": 2.0}, own_ray=False) == {"CPU": 4.0}
