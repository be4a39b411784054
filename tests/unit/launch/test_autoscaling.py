"""What an autoscaling cluster may still add, from whichever place tells its node types."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_ray.launch import autoscaling
from rlhf_ray.launch.autoscaling import addable
from rlhf_ray.launch.resources import Node

HEAD = Node("head", {"CPU": 4.0, "GPU": 0.0})
FILE = """
head_node_type: head
max_workers: 3
available_node_types:
  head: {resources: {CPU: 4}}
  big: {resources: {CPU: 8, GPU: 2}, max_workers: 2}
  small: {resources: {CPU: 2}}
"""


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """An autoscaler is at work, and nobody says how far it may go."""
    monkeypatch.setattr(autoscaling, "_reported_types", lambda: None)
    monkeypatch.setattr(autoscaling, "_at_work", lambda: True)
    monkeypatch.setattr(autoscaling, "BOOTSTRAP", str(tmp_path / "bootstrap.yaml"))
    return monkeypatch


def names(nodes: list[Node] | None) -> list[str]:
    assert nodes is not None
    return [node.name.removeprefix("a node of type ") for node in nodes]


def test_a_fixed_cluster_adds_nothing(cluster: pytest.MonkeyPatch) -> None:
    cluster.setattr(autoscaling, "_at_work", lambda: False)
    assert addable([HEAD]) == []


def test_nobody_says(cluster: pytest.MonkeyPatch) -> None:
    assert addable([HEAD]) is None
    Path(autoscaling.BOOTSTRAP).write_text("no: mapping of node types")
    assert addable([HEAD]) is None


def test_types_up_to_their_maxima_less_what_is_up(cluster: pytest.MonkeyPatch) -> None:
    """A node is of a type by its label, or by its CPUs and GPUs."""
    Path(autoscaling.BOOTSTRAP).write_text(FILE)
    assert names(addable([HEAD])) == ["big"] * 2 + ["small"] * 3
    up = [Node("a", {"CPU": 8.0, "GPU": 2.0}), Node("b", {"CPU": 7.0}, {"ray.io/node-group": "small"})]
    assert names(addable([HEAD, *up])) == ["big"] + ["small"] * 2


def test_a_managed_service_comes_first(cluster: pytest.MonkeyPatch) -> None:
    Path(autoscaling.BOOTSTRAP).write_text(FILE)
    cluster.setattr(autoscaling, "_reported_types", lambda: {"gpu": ({"GPU": 1.0}, 1)})
    assert names(addable([HEAD])) == ["gpu"]
