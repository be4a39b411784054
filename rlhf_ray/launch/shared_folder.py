"""The learner group writes into the run folder from whatever node it is on: every such node must see it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_ray.errors import ConfigError
from rlhf_ray.launch.preflight import matches
from rlhf_ray.launch.resources import ResourceRequest

LOOK_S = 5.0
"""Longest wait until a folder that was just made is seen on another node: network file systems look again after seconds."""
ANSWER_S = 20.0
"""Longest wait for an answer. A node that is too busy to give one is asked by its worker, later."""


def check_all_see(folder: Path, request: ResourceRequest) -> None:
    """Ask each node that could take a worker of `request` whether it sees `folder`, which is there. ConfigError if one does not."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    others = [n for n in ray.nodes() if n["NodeID"] != here and _takes(n, request)]
    asked = {
        ray.remote(_sees)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(n["NodeID"], soft=False), max_retries=0)
        .remote(str(folder)): n
        for n in others
    }
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S) if asked else ([], [])
    for answer in answered:
        try:
            sees = ray.get(answer)
        except ray.exceptions.RayError:  # the node has gone; it will take no worker either
            continue
        if not sees:
            raise unseen(folder, f"{asked[answer]['NodeManagerAddress']} (node {asked[answer]['NodeID'][:6]})")


def unseen(folder: Path, node: str) -> ConfigError:
    fix = "put output_dir on storage that all nodes share, or keep the learner on one node by learner.label_selector"
    return ConfigError.at("output_dir", f"{folder.parent} is not visible on node {node}", "a folder that is", fix=fix)


def _takes(node: Mapping[str, Any], request: ResourceRequest) -> bool:
    has = node.get("Resources") or {}
    enough = all(has.get(kind, 0.0) >= amount for kind, amount in request.each.items())
    return bool(node.get("Alive")) and enough and matches(node.get("Labels") or {}, request.labels)


def _sees(folder: str) -> bool:
    deadline = time.monotonic() + LOOK_S
    while not os.path.isdir(folder):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
