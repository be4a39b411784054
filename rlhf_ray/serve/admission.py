"""Admission control in Ray Serve's proxy: a request beyond the capacity of the service is refused before it is sent on.

A request that a replica refuses has crossed three processes by then. At ten times the load that a machine can take, this crossing
eats the processor time that the responses need, and requests queue in the proxy, whose queue is unbounded. So every response of
the application carries its capacity in a header (`capacity_header`), and the proxy admits no more requests than that at a time.

Serve calls `middlewares` in each proxy where the environment of its Ray node has CALLBACK_VARIABLE=CALLBACK: `rlhf-ray serve` sets
it for a Ray of its own, the files under cluster/ for theirs. Without it replicas refuse, later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlhf_ray.config.serve import ServeConfig
from rlhf_ray.serve.api_errors import ApiError, overloaded, send_error
from rlhf_ray.serve.metrics import Metrics

CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
CALLBACK = "rlhf_ray.serve.admission.middlewares"
CAPACITY_HEADER = b"x-rlhf-ray-places"
MAX_PREFIXES = 64
"""Applications of one proxy whose capacity is remembered: those that answered last. Any client can make prefixes up, before it is
asked for a key."""
MAX_HEADER_BYTES = 32_768
MAX_PATH_BYTES = 2_048
LIMITED_ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/compare", "/v1/score")


def middlewares() -> list[Any]:
    """What Serve's proxy expects of its callback (Starlette's Middleware)."""
    from starlette.middleware import Middleware

    return [Middleware(AdmissionControl, metrics=Metrics())]


def max_requests(config: ServeConfig) -> int:
    """Requests that all replicas together take at a time, if each wants one response."""
    limits, copies = config.limits, config.replicas.max_replicas or config.replicas.min_replicas
    return copies * (limits.max_batch_rows + limits.max_waiting_rows)


def capacity_header(config: ServeConfig) -> tuple[bytes, bytes]:
    """Of every response: max_requests, and the seconds for Retry-After."""
    return CAPACITY_HEADER, b"%d;%d" % (max_requests(config), config.limits.retry_after_s)


@dataclass
class ServiceCapacity:
    """Of one application, by its prefix.  max_requests: None until a response has told it."""

    max_requests: int | None = None
    retry_after_s: int = 1
    in_flight: int = 0

    @property
    def is_full(self) -> bool:
        return self.max_requests is not None and self.in_flight >= self.max_requests


class Admission:
    """One request, as it counts against the capacity: `acquire` and `release` count once each, however often they are called."""

    def __init__(self, capacity: ServiceCapacity) -> None:
        self._capacity = capacity
        self._state = "waiting"

    def acquire(self) -> None:
        if self._state == "waiting":
            self._state = "acquired"
            self._capacity.in_flight += 1

    def release(self) -> None:
        if self._state == "acquired":
            self._capacity.in_flight -= 1
        self._state = "released"


class AdmissionControl:
    """ASGI middleware. A request counts once its body is complete, so that slow clients keep nobody out."""

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics
        self.capacities: dict[str, ServiceCapacity] = {}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        is_http = scope["type"] == "http"
        if is_http and (problem := _too_long(scope)) is not None:
            await send_error(problem, send)
            return
        route = next((path for path in LIMITED_ROUTES if is_http and scope["path"].endswith(path)), None)
        if route is None or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        prefix = scope["path"].removesuffix(route)
        capacity = self.capacities.get(prefix) or ServiceCapacity()
        if capacity.is_full:
            self.metrics.count("refused")
            await send_error(overloaded(capacity.retry_after_s), send)
            return
        admission = Admission(capacity)

        async def receive_and_acquire() -> Any:
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body"):
                admission.acquire()
            return message

        async def send_and_release(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                for name, value in headers:
                    if name == CAPACITY_HEADER:
                        known = self.capacities.pop(prefix, capacity)
                        self.capacities[prefix] = known  # the last of all
                        while len(self.capacities) > MAX_PREFIXES:
                            del self.capacities[next(iter(self.capacities))]
                        known.max_requests, known.retry_after_s = map(int, value.split(b";"))
                message = {**message, "headers": [(n, v) for n, v in headers if n != CAPACITY_HEADER]}
            elif message["type"] == "http.response.body" and not message.get("more_body"):
                admission.release()  # before the client has the response, and sends its next request
            await send(message)

        try:
            await self.app(scope, receive_and_acquire, send_and_release)
        finally:
            admission.release()


def _too_long(scope: Any) -> ApiError | None:
    """A path and headers beyond what the service ever needs go no further. That they are read at all is uvicorn's; see
    cluster/nginx.conf."""
    if len(scope.get("raw_path") or scope["path"]) > MAX_PATH_BYTES:
        return ApiError(414, "The path is too long.", "path_too_long")
    if sum(len(name) + len(value) for name, value in scope.get("headers", ())) > MAX_HEADER_BYTES:
        return ApiError(431, f"The headers are longer than {MAX_HEADER_BYTES} bytes.", "headers_too_long")
    return None
