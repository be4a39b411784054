"""Errors as a client sees them: OpenAI's error object and its status code. Never the text of an exception."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
]
"""Of every response."""
ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


@dataclass
class ApiError(Exception):
    """status: HTTP code.  code: OpenAI's machine-readable name.  param: the field that is at fault.  retry_after: seconds."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    retry_after: int | None = None

    def to_json(self) -> dict[str, Any]:
        kind = ERROR_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def as_dict(self) -> dict[str, Any]:
        """To cross processes as plain data: an exception would arrive wrapped in Ray's, with its traceback."""
        return {k: getattr(self, k) for k in ("status", "message", "code", "param", "retry_after")}


def model_not_found(name: str) -> ApiError:
    """The same for a name that does not exist, and for one that this key may not use."""
    return ApiError(404, f"The model {name[:100]!r} does not exist, or you may not use it.", "model_not_found", "model")


def adapter_refused(name: str) -> ApiError:
    return ApiError(
        503, f"The adapter {name[:100]!r} cannot be served: it has failed its checks.", "adapter_refused", "model"
    )


def overloaded(retry_after: int, param: str | None = None) -> ApiError:
    """param: "model" where requests for other models may still be accepted."""
    return ApiError(429, "The service is at capacity. Try again later.", "rate_limit_exceeded", param, retry_after)


def request_timeout(seconds: float) -> ApiError:
    return ApiError(504, f"The reply was not finished within {seconds:g} s.", "timeout")


def internal_error() -> ApiError:
    return ApiError(500, "The service failed on this request.", "internal_error")


async def send_error(error: ApiError, send: Any) -> None:
    """The whole response, by ASGI's `send`: for requests that are refused before any route."""
    body = json.dumps(error.to_json()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *SECURITY_HEADERS]
    if error.retry_after is not None:
        headers.append((b"retry-after", b"%d" % error.retry_after))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
