"""What can be known of a cluster's autoscaler: that there is one, how far it may grow, and that it has given a request up.

Ray 2.60 has no public way to any of this. Node types are told by managed services (`get_cluster_config`) and by the file that
`ray up` leaves on the head node; under KubeRay nobody tells them, but its autoscaler (v2) says which placement groups no node type
can ever hold. Where nothing is known, a request waits as long as the job allows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rlhf_ray.launch.resources import Node

BOOTSTRAP = "~/ray_bootstrap_config.yaml"
MOST_NODES = 64
"""Nodes of one type that the check looks at."""
NODE_GROUP = "ray.io/node-group"
READ_ONLY = "node_"
"""How the monitor of a cluster that cannot grow calls the types of its nodes."""


def addable(living: list[Node]) -> list[Node] | None:
    """The nodes that the autoscaler may still add; [] on a cluster that cannot grow, None where nobody says how far it may."""
    if (types := _reported_types()) is None:
        if not _at_work():
            return []
        if (types := _bootstrap_types()) is None:
            return None
    found = []
    for name, (resources, most) in types.items():
        up = sum(_is_of(node, name, resources) for node in living)
        found += [Node(f"a node of type {name}", resources)] * min(max(most - up, 0), MOST_NODES)
    return found


def given_up(group: Any) -> bool:
    """Whether the autoscaler says that no node type, at its maximum, has room for placement group `group`."""
    state = _state_v2()
    details = [str(r.details) for r in state.infeasible_gang_resource_requests] if state is not None else []
    return any(text.startswith(group.id.hex()) for text in details)


def _is_of(node: Node, name: str, resources: Mapping[str, float]) -> bool:
    group = node.labels.get(NODE_GROUP)
    same = all(node.resources.get(kind, 0.0) == amount for kind, amount in resources.items() if kind in ("CPU", "GPU"))
    return group == name if group else same


def _at_work() -> bool:
    """Whether an autoscaler looks after this cluster. Every `ray start --head` runs its monitor, most of them read-only."""
    state = _state_v2()
    if state is not None:
        return True
    try:
        from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_initialized

        status = _internal_kv_get("__autoscaling_status") if _internal_kv_initialized() else None
        report = (json.loads(status or "{}") or {}).get("autoscaler_report") or {}
    except (ImportError, ValueError, AttributeError):
        return False
    types = [*(report.get("node_type_mapping") or {}).values(), *(report.get("active_nodes") or {})]
    return any(not str(kind).startswith(READ_ONLY) for kind in types)


def _state_v2() -> Any:
    """What autoscaler v2 has reported, None where it is not at work."""
    import ray

    try:
        from ray._raylet import GcsClient  # type: ignore[attr-defined]
        from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # type: ignore[attr-defined]

        response = GetClusterStatusReply()
        response.ParseFromString(GcsClient(ray.get_runtime_context().gcs_address).get_cluster_status(timeout_s=5))
    except (ImportError, AttributeError, ray.exceptions.RayError):
        return None
    return response.autoscaling_state if response.HasField("autoscaling_state") else None


def _reported_types() -> dict[str, tuple[dict[str, float], int]] | None:
    try:
        from ray._private.state import state

        config = state.get_cluster_config()
    except (ImportError, AttributeError):
        return None
    if config is None:
        return None
    types = {}
    for kind in config.node_group_configs:
        most = kind.max_count if kind.max_count >= 0 else MOST_NODES
        types[kind.name] = {name: float(amount) for name, amount in kind.resources.items()}, most
    return types


def _bootstrap_types() -> dict[str, tuple[dict[str, float], int]] | None:
    """Node types of a cluster that `ray up` made, where this is its head node."""
    try:
        config = yaml.safe_load(Path(BOOTSTRAP).expanduser().read_text())
        return {
            str(name): (
                {k: float(v) for k, v in (kind.get("resources") or {}).items()},
                int(kind.get("max_workers", config.get("max_workers", 0))),
            )
            for name, kind in config["available_node_types"].items()
            if name != config.get("head_node_type")
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return None
