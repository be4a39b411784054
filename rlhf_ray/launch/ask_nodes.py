"""A question to every node that could take a process of a role, before the role is placed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rlhf_ray.launch.preflight import matches
from rlhf_ray.launch.resources import ResourceRequest

ANSWER_S = 20.0
"""Longest wait for an answer. A node that is too busy to give one is asked by its worker, later."""


def ask_nodes(
    request: ResourceRequest, question: Callable[..., Any], *args: Any, here: bool = False
) -> Iterator[tuple[str, Any]]:
    """("10.0.0.2 (node 3fa2b1)", what `question(*args)` gives there) of each node that could take a process of `request`, as far
    as it answers.

    here: of the driver's own node too."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    own = ray.get_runtime_context().get_node_id()
    asked = {
        ray.remote(question)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(n["NodeID"], soft=False), max_retries=0)
        .remote(*args): n
        for n in ray.nodes()
        if (here or n["NodeID"] != own) and _takes(n, request)
    }
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S) if asked else ([], [])
    for answer in answered:
        try:
            found = ray.get(answer)
        except ray.exceptions.RayError:  # the node has gone; it will take no worker either
            continue
        yield f"{asked[answer]['NodeManagerAddress']} (node {asked[answer]['NodeID'][:6]})", found


def _takes(node: Mapping[str, Any], request: ResourceRequest) -> bool:
    has = node.get("Resources") or {}
    enough = all(has.get(kind, 0.0) >= amount for kind, amount in request.each.items())
    return bool(node.get("Alive")) and enough and matches(node.get("Labels") or {}, request.labels)
