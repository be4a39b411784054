"""Before any route: who the request claims to be sent to, and headers that would switch the proxy's protection off."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from rlhf_ray.config.serve import ServeConfig, is_loopback
from rlhf_ray.serve.admission import told
from rlhf_ray.serve.api_errors import SECURITY, ApiError, send_error

LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
REFUSED_HEADERS = frozenset({b"x-request-disconnect-disabled"})
"""Ray Serve lets any client ask that its work goes on after it has left."""


class HostCheck:
    """ASGI middleware. Without API keys, browsers may reach the service under its own names only, so that no web page can use a
    visitor's loopback service (DNS rebinding); a page of another origin may not either way."""

    def __init__(self, app: Any, config: ServeConfig) -> None:
        self.app = app
        own = LOCAL if is_loopback(config.host) else frozenset({config.host})
        self.names = own | {name.lower() for name in config.allowed_hosts}
        self.any_host = config.api_keys is not None and not config.allowed_hosts
        self.added = [*SECURITY, told(config)]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        error = self._refusal(scope)
        if error is not None:
            await send_error(error, send)
            return

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *self.added]}
            await send(message)

        await self.app(scope, receive, guarded)

    def _refusal(self, scope: Any) -> ApiError | None:
        headers = scope.get("headers") or []
        if any(name.lower() in REFUSED_HEADERS for name, _ in headers):
            return ApiError(400, "A header of this request is not accepted.", "invalid_header")
        try:
            hosts = [value.decode("ascii") for name, value in headers if name.lower() == b"host"]
            origins = [value.decode("ascii") for name, value in headers if name.lower() == b"origin"]
        except UnicodeDecodeError:
            return ApiError(400, "A header of this request is not ASCII.", "invalid_header")
        names = [_name(f"//{host}") for host in hosts]
        if not self.any_host and (len(names) != 1 or names[0] not in self.names):
            return ApiError(403, "The service is not reached under this name (see allowed_hosts).", "forbidden_host")
        if any(_name(origin) not in names for origin in origins):
            return ApiError(403, "Pages of other origins may not use this service.", "forbidden_origin")
        return None


def _name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
