"""From bytes on a socket to a checked request, in bounded time and memory."""

from __future__ import annotations

import asyncio
import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from rlhf_ray.config.serve import LimitsConfig
from rlhf_ray.serve.api_errors import ApiError

M = TypeVar("M", bound=BaseModel)
MAX_FIELDS = 64
SHOWN = 5


async def read_body(request: Request, limits: LimitsConfig) -> bytes:
    """The body, refused while it is being read if it is too long (413), or too slow (408)."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "Send the request as application/json.", "unsupported_media_type")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and (len(declared) > 12 or int(declared) > limits.max_body_bytes):
        raise _too_long(limits)
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            async for piece in request.stream():
                body += piece
                if len(body) > limits.max_body_bytes:
                    raise _too_long(limits)
    except TimeoutError:
        raise ApiError(408, f"The body was not there within {limits.body_timeout_s:g} s.", "timeout") from None
    except ClientDisconnect:
        raise ApiError(400, "The client has left.", "disconnected") from None
    return bytes(body)


def parse(body: bytes, model: type[M]) -> M:
    """ApiError 400 for what is not one JSON object, 422 for what is not a request of this kind."""
    try:
        values = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
        if b"\\u" in body:
            json.dumps(values, ensure_ascii=False).encode(
                "utf-8"
            )  # escapes may hide half a character, which is no text
    except (ValueError, RecursionError):
        raise ApiError(400, "The body is not valid JSON in UTF-8.", "invalid_json") from None
    if not isinstance(values, dict):
        raise ApiError(400, "The body must be one JSON object.", "invalid_json")
    if len(values) > MAX_FIELDS:
        raise ApiError(422, f"The request has {len(values)} fields; expected at most {MAX_FIELDS}.", "invalid_value")
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise _told(error) from None
    except RecursionError:
        raise ApiError(400, "The body is nested too deeply.", "invalid_json") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _too_long(limits: LimitsConfig) -> ApiError:
    return ApiError(413, f"The body is longer than {limits.max_body_bytes} bytes.", "body_too_long")


def _told(error: ValidationError) -> ApiError:
    """Where and what, of the first few problems; nothing of the values themselves."""
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    fields = [_field(p["loc"]) for p in problems]
    told = list(dict.fromkeys(f"{where}: {p['msg']}" for where, p in zip(fields, problems)))
    more = f" (and {len(told) - SHOWN} more)" if len(told) > SHOWN else ""
    return ApiError(422, "; ".join(told[:SHOWN]) + more, "invalid_value", fields[0])


def _field(loc: tuple[int | str, ...]) -> str:
    """`messages.0.role`; of the choices of a union, which pydantic names too, only the field."""
    parts = [str(part)[:64] for part in loc if isinstance(part, int) or str(part).isidentifier()]
    return ".".join(p for p in parts if p not in ("str", "int", "constrained")) or "body"
