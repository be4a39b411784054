"""Before any route: the Host and Origin of a request, and headers that would switch the proxy's protection off."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from starlette.middleware.cors import CORSMiddleware

from rlhf_ray.config.serve import ServeConfig, is_loopback
from rlhf_ray.serve.admission import capacity_header
from rlhf_ray.serve.api_errors import SECURITY_HEADERS, ApiError, send_error

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
FORBIDDEN_HEADERS = frozenset({b"x-request-disconnect-disabled"})
"""With it any client could have Ray Serve go on with a request after it has disconnected."""


class HostCheck:
    """ASGI middleware. Without API keys, browsers may reach the service under its own names only, so that no web page can use a
    visitor's loopback service (DNS rebinding). Pages of another origin are refused, but for those of `allowed_origins` (CORS)."""

    def __init__(self, app: Any, config: ServeConfig) -> None:
        self.allowed_origins = frozenset(config.allowed_origins)
        if self.allowed_origins:
            app = CORSMiddleware(
                app,
                allow_origins=config.allowed_origins,
                allow_methods=("GET", "POST"),
                allow_headers=("authorization", "content-type", "idempotency-key", "x-request-id"),
                expose_headers=("retry-after",),
            )
        self.app = app
        own = LOOPBACK_NAMES if is_loopback(config.host) else frozenset({config.host})
        self.allowed_hosts = own | {name.lower() for name in config.allowed_hosts}
        self.any_host = config.api_keys is not None and not config.allowed_hosts
        self.response_headers = [*SECURITY_HEADERS, capacity_header(config)]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        error = self._check(scope)
        if error is not None:
            await send_error(error, send)
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *self.response_headers]}
            await send(message)

        await self.app(scope, receive, send_with_headers)

    def _check(self, scope: Any) -> ApiError | None:
        headers = scope.get("headers") or []
        if any(name.lower() in FORBIDDEN_HEADERS for name, _ in headers):
            return ApiError(400, "A header of this request is not accepted.", "invalid_header")
        try:
            hosts = [value.decode("ascii") for name, value in headers if name.lower() == b"host"]
            origins = [value.decode("ascii") for name, value in headers if name.lower() == b"origin"]
        except UnicodeDecodeError:
            return ApiError(400, "A header of this request is not ASCII.", "invalid_header")
        host_names = [_host_name(f"//{host}") for host in hosts]
        if not self.any_host and (len(host_names) != 1 or host_names[0] not in self.allowed_hosts):
            return ApiError(403, "The service is not reached under this name (see allowed_hosts).", "forbidden_host")
        others = [origin for origin in origins if _host_name(origin) not in host_names]
        if "*" not in self.allowed_origins and not self.allowed_origins.issuperset(others):
            return ApiError(403, "Pages of other origins may not use this service.", "forbidden_origin")
        return None


def _host_name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
