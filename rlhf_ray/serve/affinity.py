"""Which replica a request goes to: the one that has its adapter, unless that is busier than another one by a stated amount.

Every adapter has an order of replicas, by a hash of both (rendezvous hashing: Thaler and Ravishankar 1998). The first in it with
not more than `slack` requests more than the least busy one gets the request. So nobody needs to know what is loaded where: each
replica sees its own share of the adapters again and again; where one adapter is asked for more than a replica can take, the next in
its order loads it too; and a replica that comes or goes moves only its own share.

Serve's own multiplexing was tried beside this. There replicas report what they have loaded, to the controller and back to the
routers; a request for something that nobody has reported goes anywhere, a request for something that a full replica has waits up to
a second for it, and a request can name one model. What this gains over routing without regard to adapters: benchmarks/README.md, "A
thousand adapters".
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any
from weakref import WeakKeyDictionary

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from rlhf_ray.serve.generation import GenerationRequest

BASE = "base"


def order_of(name: str, replicas: Sequence[str]) -> list[str]:
    """The replicas, as `name` prefers them."""
    return sorted(replicas, key=lambda replica: blake2b(f"{name}\n{replica}".encode(), digest_size=8).digest())


def preferred(name: str, lengths: Mapping[str, int], slack: float) -> list[str]:
    """Replicas in the order in which they should be tried for the adapter `name`. lengths: requests that each has.

    >>> a, b = order_of("helper", ["r1", "r2"])
    >>> preferred("helper", {a: 8, b: 0}, 8) == [a, b], preferred("helper", {a: 9, b: 0}, 8) == [b, a]
    (True, True)
    """
    least = min(lengths.values())
    return sorted(order_of(name, list(lengths)), key=lambda replica: lengths[replica] - least > slack)


class AffinityRouter(RequestRouter):
    """A request router of Serve's. slack: see `replicas.affinity_slack`."""

    slack = 0.0

    def initialize_state(self, slack: float = 0.0, **others: object) -> None:
        self.slack = slack
        # By the task that routes it. Not a variable of this module: Serve sends the class itself to its routers.
        self._routed: WeakKeyDictionary[Any, PendingRequest | None] = WeakKeyDictionary()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Groups of replicas to be tried one after the other; within a group Serve takes the least busy one."""
        self._routed[asyncio.current_task()] = pending_request
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # after all of them were tried and are full
        name = _adapter_of(pending_request)
        if name is None or len(candidate_replicas) < 2:
            return [random.sample(candidate_replicas, min(2, len(candidate_replicas))), list(candidate_replicas)]
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        lengths = {id: self.replica_queue_len_cache.get(one.replica_id) or 0 for id, one in by_id.items()}
        return [[by_id[id]] for id in preferred(name, lengths, self.slack)]

    def _fulfill_next_pending_request(self, replica: RunningReplica, request_metadata: Any = None) -> None:
        """The replica is for the request that it was chosen for. Serve 2.60 finds that by an id which all calls of one handler have
        in common, and knows the first of these alone: the others would wait for ever."""
        pending = self._routed.get(asyncio.current_task())
        if pending is None:
            super()._fulfill_next_pending_request(replica, request_metadata)
        elif not pending.future.done():
            pending.future.set_result(replica)
            if self._pending_requests_by_id.get(pending.metadata.internal_request_id) is pending:
                self._remove_pending_request_from_indices(pending)


def _adapter_of(pending: PendingRequest | None) -> str | None:
    """The name, without a version, of the first adapter that a request is for."""
    requests: list[Any] = [] if pending is None else [a for a in pending.args if isinstance(a, GenerationRequest)]
    names = [model.partition("@")[0] for request in requests for model in request.models if model != BASE]
    return names[0] if names else None
