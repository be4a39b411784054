"""Two Ray nodes on this machine: the learner on one, generator and scorer on the other, as their labels say."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rlhf_ray.config import PPOConfig
from rlhf_ray.errors import ResourceError
from rlhf_ray.stages.start import ppo

pytestmark = pytest.mark.integration


@pytest.fixture
def cluster() -> Iterator[Any]:
    import ray
    from ray.cluster_utils import Cluster

    if ray.is_initialized():  # the Ray of this folder's other tests
        ray.shutdown()
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "labels": {"place": "training"}})
    try:
        made.add_node(num_cpus=1, num_gpus=1, labels={"place": "rollouts"})
        ray.init(address=made.address, log_to_driver=False, logging_level=logging.ERROR)
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def test_roles_on_the_nodes_of_their_labels(cluster: Any, split_job: Callable[..., PPOConfig], console: Any) -> None:
    there = {"num_cpus": 0.4, "num_threads": 1, "label_selector": {"place": "rollouts"}}
    changes: dict[str, Any] = {
        "learner": {"num_threads": 1, "num_gpus": 0.0, "label_selector": {"place": "training"}},
        "generator": {**there, "num_gpus": 0.5},
        "scorer": {**there, "num_gpus": 0.0},
        "max_steps": 1,
        "eval_on_start": False,
    }
    with pytest.raises(ResourceError, match=r"scorer.label_selector: no node has these labels; expected place: moon"):
        ppo(split_job("moon", **{**changes, "scorer": {**there, "label_selector": {"place": "moon"}}}), console)
    assert ppo(split_job("two", **changes), console).steps == 1
    nodes = dict(re.findall(r"(generator 0|scorer 0|learner) .*?node (\w+)", console.text))
    assert nodes["generator 0"] == nodes["scorer 0"] != nodes["learner"]
    assert re.search(r"generator 0 .* GPU 0,", console.text) and re.search(r"scorer 0 .* no GPU", console.text)
