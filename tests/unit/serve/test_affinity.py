"""Which replica a request goes to: the order of an adapter's replicas, and Serve's own router going by it, without a Ray."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest

from rlhf_ray.serve.affinity import AffinityRouter, _adapter_of, order_of, preferred
from rlhf_ray.serve.generation import GenerationRequest

REPLICAS = [f"replica{i}" for i in range(4)]
ADAPTERS = [f"adapter{i}" for i in range(400)]


@pytest.fixture(autouse=True)
def _event_loop() -> Iterator[None]:
    """Serve's PendingRequest makes a future, of whatever loop its thread has."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield
    asyncio.set_event_loop(None)
    loop.close()


def test_each_adapter_has_its_own_order_of_replicas_whoever_lists_them() -> None:
    orders = {name: order_of(name, REPLICAS) for name in ADAPTERS}
    assert all(sorted(order) == REPLICAS for order in orders.values())
    assert orders == {name: order_of(name, REPLICAS[::-1]) for name in ADAPTERS}
    assert len({tuple(order) for order in orders.values()}) == 24, "all orders of four occur"
    first = Counter(order[0] for order in orders.values())
    assert all(70 <= first[replica] <= 130 for replica in REPLICAS), first


def test_a_replica_that_is_lost_or_comes_moves_only_its_share() -> None:
    for name in ADAPTERS:
        before = order_of(name, REPLICAS)
        for lost in REPLICAS:
            left = [replica for replica in REPLICAS if replica != lost]
            assert order_of(name, left) == [replica for replica in before if replica != lost]


def test_a_busier_replica_keeps_its_adapters_up_to_the_slack() -> None:
    first, second, third = order_of("helper", REPLICAS[:3])
    for slack in (0.0, 8.0):
        at_slack = {first: 2 + int(slack), second: 2, third: 2}
        assert preferred("helper", at_slack, slack) == [first, second, third]
        above = {**at_slack, first: at_slack[first] + 1}
        assert preferred("helper", above, slack) == [second, third, first], "and not whoever is least busy"
        assert preferred("helper", {**above, second: above[first]}, slack) == [third, first, second]


def generation(*models: str) -> GenerationRequest:
    return GenerationRequest(models, ({"text": "Hi"},))


def pending(*args: Any, id: str = "1") -> PendingRequest:
    return PendingRequest(list(args), {}, RequestMetadata(id, id))


@dataclass(eq=False)
class Replica:
    """What Serve's router asks of a replica. queue: requests that it has."""

    unique_id: str
    queue: int = 0
    max_ongoing_requests: int = 100

    @property
    def replica_id(self) -> ReplicaID:
        return ReplicaID(self.unique_id, DeploymentID("Engine", "rlhf_ray"))

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return self.queue


Route = Callable[..., Coroutine[Any, Any, str]]


def with_router(run: Callable[[AffinityRouter, dict[str, Replica], Route], Coroutine[Any, Any, None]]) -> None:
    """run(router, its replicas by id, route): `route(*args, id=...)` gives the id of the replica that a call goes to."""

    async def begin() -> None:
        router = AffinityRouter(
            DeploymentID("Engine", "rlhf_ray"),
            DeploymentHandleSource.REPLICA,
            use_replica_queue_len_cache=True,
            get_curr_time_s=lambda: 0.0,  # what it knows of queues never gets old
        )
        router.initialize_state(slack=8.0)
        replicas = {name: Replica(name) for name in REPLICAS}
        router.update_replicas(list(replicas.values()))  # type: ignore[arg-type]
        await router._probe_queue_lens(list(replicas.values()), 0)  # type: ignore[arg-type]

        async def route(*args: Any, id: str = "1") -> str:
            chosen = await router._choose_replica_for_request(pending(*args, id=id))
            router.on_send_request(chosen.replica_id)
            return chosen.replica_id.unique_id

        async with asyncio.timeout(20):
            await run(router, replicas, route)

    asyncio.run(begin())


@pytest.mark.parametrize(
    ("models", "adapter"),
    [
        (("helper",), "helper"),
        (("helper@v3",), "helper"),
        (("helper@v3-0a1b2c3d",), "helper"),
        (("base", "helper@v2", "other"), "helper"),
        (("base",), None),
    ],
)
def test_a_request_is_for_its_first_adapter_whatever_the_version(models: tuple[str, ...], adapter: str | None) -> None:
    assert _adapter_of(pending(generation(*models))) == adapter


def test_calls_that_are_for_no_adapter_go_anywhere() -> None:
    assert _adapter_of(None) is None and _adapter_of(pending("known")) is None

    async def run(router: AffinityRouter, replicas: dict[str, Replica], route: Route) -> None:
        chosen = Counter([await route(generation("base"), id=str(i)) for i in range(60)])
        assert chosen.keys() == set(REPLICAS) and max(chosen.values()) <= 25, chosen

    with_router(run)


def test_requests_go_to_the_replica_of_their_adapter_until_it_is_too_busy() -> None:
    """Through Serve's own routing: the first in the order, the next one once it has 8 more than the least busy."""

    async def run(router: AffinityRouter, replicas: dict[str, Replica], route: Route) -> None:
        order = order_of("helper", REPLICAS)
        chosen = [await route(generation("helper@v1" if i % 2 else "helper"), id=str(i)) for i in range(12)]
        assert chosen == [order[0]] * 9 + [order[1]] * 3
        del replicas[order[1]]
        router.update_replicas(list(replicas.values()))  # type: ignore[arg-type]
        assert await route(generation("helper"), id="again") == order[2], "the one that it had overflowed to is gone"

    with_router(run)


def test_calls_of_one_handler_do_not_wait_for_each_other() -> None:
    """They share Serve's internal id, by which it knows the first of them alone: the others waited for ever."""

    async def run(router: AffinityRouter, replicas: dict[str, Replica], route: Route) -> None:
        names = ["helper", *ADAPTERS[:5], "base"]
        chosen = await asyncio.gather(*(route(generation(name), id="one handler") for name in names))
        assert chosen[:-1] == [order_of(name, REPLICAS)[0] for name in names[:-1]]
        assert not router._pending_requests_by_id

    with_router(run)
