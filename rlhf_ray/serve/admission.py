"""In Ray Serve's proxy, before anything is sent on: what is more than the service can take is refused there.

A request that a replica refuses has crossed three processes by then. At ten times the load that a machine can take, this crossing
eats the processor that the answers need, and requests queue in the proxy, which knows no bound. So the application tells the proxy
with every answer how many requests it takes at a time (`told`), and the gate lets no more through.

Serve calls `middlewares` in each proxy where the environment of its Ray node has SETTING=CALLBACK: `rlhf-ray serve` sets it for
a Ray of its own, the files under cluster/ for theirs. Without it replicas refuse, later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlhf_ray.config.serve import ServeConfig
from rlhf_ray.serve.api_errors import overloaded, send_error
from rlhf_ray.serve.metrics import Metrics

SETTING = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
CALLBACK = "rlhf_ray.serve.admission.middlewares"
HEADER = b"x-rlhf-ray-places"
WORK = ("/v1/chat/completions", "/v1/completions", "/v1/compare")


def middlewares() -> list[Any]:
    """What Serve's proxy asks for (Starlette's Middleware)."""
    from starlette.middleware import Middleware

    return [Middleware(AdmissionControl, metrics=Metrics())]


def places(config: ServeConfig) -> int:
    """Requests that all copies together take at a time, if each wants one reply."""
    limits, copies = config.limits, config.replicas.max_replicas or config.replicas.min_replicas
    return copies * (limits.max_batch_rows + limits.max_waiting_rows)


def told(config: ServeConfig) -> tuple[bytes, bytes]:
    """The header of every answer: places, and the seconds that a refused client is told to wait."""
    return HEADER, b"%d;%d" % (places(config), config.limits.retry_after_s)


@dataclass
class Capacity:
    """Of one application, by its prefix.  places: None until it has told."""

    places: int | None = None
    retry_after_s: int = 1
    inside: int = 0

    @property
    def is_full(self) -> bool:
        return self.places is not None and self.inside >= self.places


class Admission:
    """Of one request: taken once, left once."""

    def __init__(self, capacity: Capacity) -> None:
        self._capacity = capacity
        self._state = "outside"

    def take(self) -> None:
        if self._state == "outside":
            self._state = "inside"
            self._capacity.inside += 1

    def leave(self) -> None:
        if self._state == "inside":
            self._capacity.inside -= 1
        self._state = "left"


class AdmissionControl:
    """ASGI middleware. A request takes a place when its body is there, so that one that dawdles keeps nobody out."""

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics
        self.capacities: dict[str, Capacity] = {}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        work = next((path for path in WORK if scope["type"] == "http" and scope["path"].endswith(path)), None)
        if work is None or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        prefix = scope["path"].removesuffix(work)
        capacity = self.capacities.get(prefix) or Capacity()
        if capacity.is_full:
            self.metrics.count("refused")
            await send_error(overloaded(capacity.retry_after_s), send)
            return
        admission = Admission(capacity)

        async def received() -> Any:
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body"):
                admission.take()
            return message

        async def noted(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                for name, value in headers:
                    if name == HEADER:
                        known = self.capacities.setdefault(prefix, capacity)
                        known.places, known.retry_after_s = map(int, value.split(b";"))
                message = {**message, "headers": [(n, v) for n, v in headers if n != HEADER]}
            elif message["type"] == "http.response.body" and not message.get("more_body"):
                admission.leave()  # before the client can know, and ask again
            await send(message)

        try:
            await self.app(scope, received, noted)
        finally:
            admission.leave()
