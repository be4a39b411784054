"""The driver's part of placing a job: what it needs is there, or nothing is kept.

Generators and scorers get a placement group of their own, before the learner group, which Ray Train places by itself. So that two
jobs cannot each hold half of what they need, a job waits for all of it in one piece, and holds nothing while it waits. Then it
takes its parts one by one; a job that gets only half, because another one came in between, gives it back and waits again. What
cannot be had in time is given back, and the job ends with exit code 3.
"""

from __future__ import annotations

import random
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from rlhf_ray.config import JobFields, PPOConfig
from rlhf_ray.config.rewards import longest_reward_request_s
from rlhf_ray.console import Console
from rlhf_ray.errors import ResourceError
from rlhf_ray.launch import autoscaling
from rlhf_ray.launch.preflight import check, nodes_of
from rlhf_ray.launch.resources import Node, ResourceRequest, described, processes, split_job
from rlhf_ray.runtime.imports import call_imported
from rlhf_ray.runtime.session import usable_cores

WAIT_LONGER = "wait for the other job to end, or start again with --wait-for-resources 600"
ASK_LESS = "ask for less, or raise the maxima of the cluster's node types"
Builder = str
"""`package.module:build` of a build(config, num_gpus=...): what an actor of a role is, by name, imported there. The rooms above
know what a role loads; this one only places it."""
LOOK_S = 2.0
"""Seconds between two looks at what the autoscaler says of a request."""
PART_S = 2.0
"""How long a job tries for a part of what it has just seen free as a whole."""
TELL_S = 10.0
"""Seconds between two lines about what is missing."""


def default_threads(config: JobFields) -> int:
    """CPU threads of each process: the usable cores, shared among all processes of the job where roles are split."""
    return max(usable_cores() // processes(config), 1)


@contextmanager
def placed(
    config: JobFields, requests: Sequence[ResourceRequest], console: Console, builders: Mapping[str, Builder]
) -> Iterator[Any]:
    """Generators and scorers of a split job, placed and starting (`pool.ActorHandles`), or None. The learner group fits beside
    them.

    Raises ResourceError if they cannot be had within `wait_for_resources` seconds. All is given back at the end."""
    from ray.util.placement_group import remove_placement_group

    split, group, actor_handles = split_job(config), None, None
    try:
        group = _take(requests, config.wait_for_resources, console)
        if split is not None:
            actor_handles = _start(
                split, requests, group, builders, f"rlhf-ray resume {shlex.quote(config.output_dir)}"
            )
        yield actor_handles
    finally:
        if actor_handles is not None:
            from rlhf_ray.roles.actor_pool import stop

            stop(actor_handles)
        if group is not None:
            remove_placement_group(group)


def _take(requests: Sequence[ResourceRequest], wait_s: float, console: Console) -> Any:
    """A placement group of generators and scorers (None if there are none), when the learner group fits beside it.

    ResourceError, and nothing kept, if that is not so within `wait_s` seconds."""
    from ray.util.placement_group import remove_placement_group

    deadline = time.monotonic() + wait_s
    actors, learner = [a for a in requests if a.role != "learner"], [a for a in requests if a.role == "learner"]
    while True:
        remove_placement_group(_wait(requests, wait_s, deadline, console))
        if not actors:
            return None
        group = _within(actors, PART_S)
        if group is not None:
            share = _within(learner, PART_S * (1.0 + random.random()))  # two jobs must not give up together
            if share is not None:
                remove_placement_group(share)
                return group
            remove_placement_group(group)
        if time.monotonic() > deadline:
            raise _missing(requests, _too_late(wait_s))
        time.sleep(PART_S * random.random())


def _wait(requests: Sequence[ResourceRequest], wait_s: float, deadline: float, console: Console) -> Any:
    """A placement group of everything, told of while it is missing. ResourceError if it is not there in time."""
    from ray.util.placement_group import remove_placement_group

    group, there, told = _asked(requests), False, time.monotonic() + LOOK_S - TELL_S
    try:
        while not there:
            left = deadline - time.monotonic()
            there = group.wait(min(max(left, 0.5), LOOK_S))
            if there or left <= 0:
                break
            if autoscaling.given_up(group):
                raise _missing(requests, "they do not fit even if the cluster grows as far as it may", ASK_LESS)
            if left > LOOK_S and time.monotonic() > told + TELL_S:
                told = time.monotonic()
                console.log(f"waiting for {', '.join(map(str, requests))}; free now: {_free(requests)}")
    finally:
        if not there:
            remove_placement_group(group)
    if not there:
        raise _missing(requests, _too_late(wait_s))
    return group


def _within(requests: Sequence[ResourceRequest], seconds: float) -> Any:
    """A placement group, or None, and nothing kept."""
    from ray.util.placement_group import remove_placement_group

    group, there = _asked(requests), False
    try:
        there = group.wait(seconds)
    finally:
        if not there:
            remove_placement_group(group)
    return group if there else None


def _asked(requests: Sequence[ResourceRequest]) -> Any:
    """A placement group with a bundle for every process of `requests`, perhaps not there yet."""
    from ray.util.placement_group import placement_group

    pieces = [request for request in requests for _ in range(request.count)]
    labels = [dict(request.labels) for request in pieces]
    return placement_group(
        [dict(request.each) for request in pieces],
        strategy="PACK",
        bundle_label_selector=labels if any(labels) else None,  # type: ignore[arg-type]
    )


def _too_late(wait_s: float) -> str:
    return f"cannot be placed within {wait_s:g} s: other jobs hold what they need, or nodes are missing"


def _missing(requests: Sequence[ResourceRequest], why: str, fix: str = WAIT_LONGER) -> ResourceError:
    kinds = dict.fromkeys(kind for request in requests for kind in request.each)
    return ResourceError.at(
        " and ".join(request.role for request in requests),
        f"{why} ({', '.join(map(str, requests))})",
        described({kind: sum(request.total(kind) for request in requests) for kind in kinds}),
        f"{_free(requests)} free",
        fix,
    )


def _free(requests: Sequence[ResourceRequest]) -> str:
    import ray

    free = ray.available_resources()
    return described(
        {kind: free.get(kind, 0.0) for kind in dict.fromkeys(k for request in requests for k in request.each)}
    )


def check_cluster(requests: Sequence[ResourceRequest]) -> None:
    """ResourceError if the roles do not fit on the cluster, grown as far as it may. Where its autoscaler does not say how far that
    is, waiting for the resources tells."""
    if (nodes := cluster_nodes()) is not None:
        check(requests, nodes)


def cluster_total() -> Mapping[str, float]:
    """The resources of this cluster, with those of the nodes that its autoscaler may add where it says how many that is."""
    import ray

    nodes = cluster_nodes()
    if nodes is None:
        return ray.cluster_resources()
    total: dict[str, float] = {}
    for node in nodes:
        for kind, amount in node.resources.items():
            total[kind] = total.get(kind, 0.0) + amount
    return total


def cluster_nodes() -> list[Node] | None:
    """The nodes of this cluster, with those that its autoscaler may add; None where it does not say how many that is."""
    import ray

    living = nodes_of(ray.nodes())
    more = autoscaling.addable(living)
    return None if more is None else living + more


def _start(
    config: PPOConfig, requests: Sequence[ResourceRequest], group: Any, builders: Mapping[str, Builder], resume: str
) -> Any:
    from rlhf_ray.roles.actor_pool import ActorSpec, start

    specs, first = [], 0
    for request in requests:
        if request.role == "learner":
            continue
        settings = getattr(config, request.role)
        specs.append(
            ActorSpec(
                role=request.role,
                build=partial(call_imported, builders[request.role], config, num_gpus=request.each.get("GPU", 0.0)),
                resources=request.each,
                num_threads=settings.num_threads or default_threads(config),
                bundles=range(first, first + request.count),
                timeout_s=role_timeout_s(config, request.role),
                imports=builders[request.role],
            )
        )
        first += request.count
    return start(specs, group, with_ref_store=config.learner.num_workers > 1, resume=resume)


ROLE_TIMEOUT_S = 1800.0
MARGIN_S = 300.0
"""Of what waits for a reward server, beyond the server's own limit."""


def longest_answer_s(config: JobFields) -> float:
    """Seconds that whoever waits for the job's reward servers and judges must have; 0 if it has none."""
    longest = longest_reward_request_s(config)
    return longest + MARGIN_S if longest else 0.0


def role_timeout_s(config: JobFields, role: str) -> float:
    """Of an actor: as the job says; by default a scorer that asks a server has the time that the server has."""
    given: float | None = getattr(config, role).timeout_s
    return given or max(ROLE_TIMEOUT_S, longest_answer_s(config) if role == "scorer" else 0.0)
