"""Whether the roles of a job fit on the nodes, told before anything waits.

Ray lets a request that can never be met wait for ever. Here every process is put on a node, as Ray would: a fraction of a GPU
comes from one GPU, whole GPUs are whole. What does not fit is named, with the nearest placement that does.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rlhf_ray.config import JobFields
from rlhf_ray.console import counted
from rlhf_ray.errors import Problem, ResourceError
from rlhf_ray.launch.resources import ACCELERATOR, Node, ResourceRequest, described, role_requests, this_machine

_EPS = 1e-6
_SETS = re.compile(r"(?P<no>!?)in\((?P<values>[^)]*)\)")
FIELDS = {"GPU": "num_gpus", "CPU": "num_threads"}


def check(requests: Sequence[ResourceRequest], nodes: Sequence[Node]) -> dict[str, list[str]]:
    """Role -> node of each of its processes. ResourceError, all problems at once, if they do not fit on empty nodes."""
    problems = [p for request in requests for p in _alone(request, nodes)]
    ResourceError.raise_all(problems)
    placed = place(requests, nodes)
    if placed is None:
        raise ResourceError(_together(requests, nodes))
    return placed


def check_this_machine(config: JobFields) -> None:
    """Where no Ray is given, the one that a job starts has this machine: ResourceError if it is too small. Starts nothing."""
    ray = sys.modules.get("ray")
    connected = ray is not None and bool(ray.is_initialized())
    if connected or is_given_a_cluster() or config.learner.num_workers == 0:
        return
    machine = this_machine()
    check(role_requests(config, machine.resources, own_ray=True), [machine])


def is_given_a_cluster() -> bool:
    """Whether Ray would join a cluster: RAY_ADDRESS, or the one that `ray start` has made this machine part of."""
    return bool(os.environ.get("RAY_ADDRESS")) or _current_cluster().is_file()


def given_address() -> tuple[str, str]:
    """Who says so (RAY_ADDRESS or a file), and the address of the cluster that Ray would join."""
    address = os.environ.get("RAY_ADDRESS", "")
    if address in ("", "auto") and _current_cluster().is_file():
        return str(_current_cluster()), _current_cluster().read_text().strip()
    return "RAY_ADDRESS", address


def _current_cluster() -> Path:
    """Where `ray start` leaves the address of its cluster, until `ray stop`."""
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    return Path(folder, "ray", "ray_current_cluster")


def place(requests: Sequence[ResourceRequest], nodes: Sequence[Node]) -> dict[str, list[str]] | None:
    """First fit, largest first: role -> node of each process; None if they do not all fit."""
    free = [_Free.of(node) for node in nodes]
    found: dict[str, list[str]] = {request.role: [] for request in requests}
    pieces = [request for request in requests for _ in range(request.count)]
    for request in sorted(pieces, key=lambda a: (-a.each.get("GPU", 0.0), -a.each.get("CPU", 0.0))):
        room = next((f for f in free if matches(f.node.labels, request.labels) and f.take(request.each)), None)
        if room is None:
            return None
        found[request.role].append(room.node.name)
    return found


def matches(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Ray's label selectors: `value`, `!value`, `in(a,b)`, `!in(a,b)`."""
    for key, wanted in selector.items():
        have, sets = labels.get(key), _SETS.fullmatch(wanted)
        if sets:
            inside = have in [v.strip() for v in sets["values"].split(",")]
            holds = inside != bool(sets["no"])
        elif wanted.startswith("!"):
            holds = have != wanted[1:]
        else:
            holds = have == wanted
        if not holds:
            return False
    return True


def nodes_of(found: Iterable[Mapping[str, object]]) -> list[Node]:
    """The living nodes of `ray.nodes()`."""
    return [
        Node(str(n.get("NodeManagerAddress", "node")), dict(n["Resources"]), dict(n.get("Labels") or {}))  # type: ignore[call-overload]
        for n in found
        if n.get("Alive")
    ]


@dataclass
class _Free:
    """What is left of a node. gpus: of each GPU."""

    node: Node
    other: dict[str, float] = field(default_factory=dict)
    gpus: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, node: Node) -> _Free:
        other = {kind: amount for kind, amount in node.resources.items() if kind != "GPU"}
        return cls(node, other, [1.0] * int(node.resources.get("GPU", 0.0) + _EPS))

    def take(self, each: Mapping[str, float]) -> bool:
        """Take it all, or nothing."""
        if any(self.other.get(kind, 0.0) + _EPS < amount for kind, amount in each.items() if kind != "GPU"):
            return False
        wanted = each.get("GPU", 0.0)
        if wanted >= 1.0:
            whole = [i for i, left in enumerate(self.gpus) if left > 1.0 - _EPS]
            if len(whole) < int(wanted):
                return False
            for i in whole[: int(wanted)]:
                self.gpus[i] = 0.0
        elif wanted:
            fits = [i for i, left in enumerate(self.gpus) if left + _EPS >= wanted]
            if not fits:
                return False
            self.gpus[min(fits, key=lambda i: self.gpus[i])] -= wanted
        for kind, amount in each.items():
            if kind != "GPU":
                self.other[kind] -= amount
        return True


def _alone(request: ResourceRequest, nodes: Sequence[Node]) -> list[Problem]:
    """What no node has enough of for a single process of the role."""
    able = [n for n in nodes if matches(n.labels, request.labels)]
    if not able:
        got = "; ".join(", ".join(f"{k}: {v}" for k, v in n.labels.items()) or "none" for n in nodes)
        wanted = ", ".join(f"{k}: {v}" for k, v in request.labels.items())
        return [Problem(f"{request.role}.label_selector", "no node has these labels", wanted, got)]
    problems = []
    for kind, amount in request.each.items():
        largest = max((n.resources.get(kind, 0.0) for n in able), default=0.0)
        if amount <= largest + _EPS:
            continue
        if kind.startswith(ACCELERATOR):
            model = kind.removeprefix(ACCELERATOR)
            there = {k.removeprefix(ACCELERATOR) for n in nodes for k in n.resources if k.startswith(ACCELERATOR)}
            got = ", ".join(sorted(there)) or "no GPU whose model Ray knows"
            problems.append(Problem(f"{request.role}.accelerator_type", f"no node has a {model}", model, got))
            continue
        problems.append(
            Problem(
                f"{request.role}.{FIELDS.get(kind, kind)}",
                f"no node has {amount:g} {kind}",
                f"{amount:g} {kind} on one node",
                f"largest node has {largest:g}",
                "ask for less per worker, or use a larger cluster",
            )
        )
    return problems


def _together(requests: Sequence[ResourceRequest], nodes: Sequence[Node]) -> Problem:
    """Each process would fit, all of them do not."""
    kinds = [k for k in requests[0].each | {k: 0 for a in requests for k in a.each} if not k.startswith(ACCELERATOR)]
    short = [
        f"{sum(a.total(k) for a in requests):g} {k}"
        for k in kinds
        if sum(a.total(k) for a in requests) > sum(n.resources.get(k, 0.0) for n in nodes) + _EPS
    ]
    has = ", ".join(f"{sum(n.resources.get(k, 0.0) for n in nodes):g} {k}" for k in kinds)
    if len(requests) == 1:
        request = requests[0]
        most = next(
            (c for c in range(request.count, 0, -1) if place([replace(request, count=c)], nodes) is not None), 0
        )
        return Problem(
            f"{request.role}.num_workers",
            f"the cluster has room for {most} workers of {described(request.each)}",
            f"room for {request.count}",
            f"{most}",
            f"set {request.role}.num_workers={max(most, 1)}, or use a larger cluster",
        )
    what = "; ".join(map(str, requests)).replace("; ", ", ")
    spread = f"on {counted(len(nodes), 'node')}"
    return Problem(
        "placement",
        f"the roles do not fit together: {what}",
        ", ".join(short) or "room for every process on one node",
        f"{has} {spread}",
        nearest(requests, nodes) or "use a larger cluster",
    )


def nearest(requests: Sequence[ResourceRequest], nodes: Sequence[Node]) -> str:
    """The smallest change to the job that fits, as settings; empty if none of those tried does."""
    for change, changed in _changes(requests):
        if place(changed, nodes) is not None:
            return f"set {change}"
    return ""


def _changes(requests: Sequence[ResourceRequest]) -> Iterable[tuple[str, list[ResourceRequest]]]:
    actors = [a for a in requests if a.role != "learner"]
    learner = next(a for a in requests if a.role == "learner")
    most = max((a.count for a in actors), default=1)
    for count in range(most, 0, -1):
        fewer = [replace(a, count=min(a.count, count)) for a in actors]
        counts = [f"{a.role}.num_actors={a.count}" for a, b in zip(fewer, actors) if a.count < b.count]
        for share in (None, 0.5, 0.25):
            shared = [a if share is None or "GPU" not in a.each else _with_gpu(a, share) for a in fewer]
            gpus = [f"{a.role}.num_gpus={share:g}" for a, b in zip(shared, fewer) if a.each != b.each]
            if counts or gpus:
                yield " ".join(counts + gpus), [*shared, learner]
    yield "placement=colocate", [learner]
    for workers in range(learner.count - 1, 0, -1):
        yield f"placement=colocate learner.num_workers={workers}", [replace(learner, count=workers)]
    alone = [_with_gpu(a, 0.0) for a in actors]
    yield " ".join(f"{a.role}.num_gpus=0" for a in actors), [*alone, learner]


def _with_gpu(request: ResourceRequest, share: float) -> ResourceRequest:
    each = {k: v for k, v in request.each.items() if k != "GPU"}
    return replace(request, each=each | ({"GPU": min(share, request.each.get("GPU", share))} if share else {}))
