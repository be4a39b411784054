"""The body of a request: read and validated, in bounded time and memory."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from rlhf_ray.config.serve import LimitsConfig
from rlhf_ray.serve.api_errors import ApiError
from rlhf_ray.serve.strict_json import load_json

ModelT = TypeVar("ModelT", bound=BaseModel)
MAX_FIELDS = 64
MAX_PROBLEMS = 5
LONG_BODY = 1 << 16
"""Bytes from which a body is parsed beside the event loop."""


async def read_body(request: Request, limits: LimitsConfig) -> bytes:
    """ApiError while it is being read if it is too long (413) or too slow (408)."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise ApiError(415, "Send the request as application/json.", "unsupported_media_type")
    length = request.headers.get("content-length", "")
    if length.isdigit() and (len(length) > 12 or int(length) > limits.max_body_bytes):
        raise _too_long(limits)
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.max_body_bytes:
                    raise _too_long(limits)
    except TimeoutError:
        raise ApiError(408, f"The body was not there within {limits.body_timeout_s:g} s.", "timeout") from None
    except ClientDisconnect:
        raise ApiError(400, "The client has left.", "disconnected") from None
    return bytes(body)


async def parsed(body: bytes, model: type[ModelT]) -> ModelT:
    """`parse_body`, so that a long body does not keep other clients waiting."""
    if len(body) < LONG_BODY:
        return parse_body(body, model)
    return await asyncio.to_thread(parse_body, body, model)


def parse_body(body: bytes, model: type[ModelT]) -> ModelT:
    """ApiError 400 for a body that is not one JSON object, or that `model` does not accept."""
    try:
        values = load_json(body.decode("utf-8"))
    except (ValueError, RecursionError):
        raise ApiError(400, "The body is not valid JSON in UTF-8.", "invalid_json") from None
    if not isinstance(values, dict):
        raise ApiError(400, "The body must be one JSON object.", "invalid_json")
    if len(values) > MAX_FIELDS:
        raise ApiError(400, f"The request has {len(values)} fields; expected at most {MAX_FIELDS}.", "invalid_value")
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise _validation_error(error) from None
    except RecursionError:
        raise ApiError(400, "The body is nested too deeply.", "invalid_json") from None


def _too_long(limits: LimitsConfig) -> ApiError:
    return ApiError(413, f"The body is longer than {limits.max_body_bytes} bytes.", "body_too_long")


def _validation_error(error: ValidationError) -> ApiError:
    """Field and message of the first few problems; nothing of the values themselves."""
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    fields = [_field_name(p["loc"]) for p in problems]
    messages = list(dict.fromkeys(f"{where}: {p['msg']}" for where, p in zip(fields, problems)))
    more = f" (and {len(messages) - MAX_PROBLEMS} more)" if len(messages) > MAX_PROBLEMS else ""
    return ApiError(400, "; ".join(messages[:MAX_PROBLEMS]) + more, "invalid_value", fields[0])


def _field_name(loc: tuple[int | str, ...]) -> str:
    """`messages.0.role`, without the members of a union, which pydantic names too (ours are no identifiers)."""
    parts = [str(part)[:64] for part in loc if isinstance(part, int) or str(part).isidentifier()]
    return ".".join(p for p in parts if p not in ("str", "int", "constrained")) or "body"
