"""The public application: OpenAI's routes, comparisons, preferences, the page. No route here changes what is served."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from rlhf_ray.config.serve import ServeConfig
from rlhf_ray.serve.api_errors import ApiError, internal, model_not_found, overloaded
from rlhf_ray.serve.generation import GenerationRequest
from rlhf_ray.serve.host_check import HostCheck
from rlhf_ray.serve.idempotency import IdempotencyCache
from rlhf_ray.serve.keys import Key, Keys
from rlhf_ray.serve.metrics import Metrics, NoMetrics
from rlhf_ray.serve.openai_responses import ResponseBuilder, stream
from rlhf_ray.serve.openai_types import ChatRequest, CompareRequest, CompletionRequest, PreferenceRequest, talk
from rlhf_ray.serve.page import Page
from rlhf_ray.serve.request_log import ACCESS, PREFERENCES, RequestLog, preference_row
from rlhf_ray.serve.requests import parse, read_body

log = logging.getLogger(__name__)


class Backend(Protocol):
    """The replicas."""

    async def complete(self, request: GenerationRequest) -> list[dict[str, Any]]:
        """All events of an ask."""
        ...

    def stream(self, request: GenerationRequest) -> AsyncIterator[list[dict[str, Any]]]:
        """They as they come. Closing it ends the work."""
        ...

    async def models(self) -> list[dict[str, Any]]: ...


Handler = Callable[["RequestContext"], Awaitable[Response]]


class RequestContext:
    """One request on its way. log: its line in the access log."""

    def __init__(self, request: Request, key: Key | None) -> None:
        self.request, self.key = request, key
        self.log: dict[str, Any] = {}
        self.ends_later = False
        """The line is written when the stream ends."""

    def may_use(self, *models: str) -> None:
        """ApiError as for a model that does not exist: a key does not learn of others' models."""
        for model in models:
            if self.key is not None and not self.key.may_use(model):
                raise model_not_found(model)


class HttpApi:
    """`app` is the ASGI application."""

    def __init__(self, config: ServeConfig, backend: Backend, metrics: Metrics | None = None) -> None:
        self.config, self.limits, self.backend = config, config.limits, backend
        self.metrics = metrics or NoMetrics()
        self.keys = None if config.api_keys is None else Keys(config.api_keys)
        folder = Path(config.output_dir)
        self.access = RequestLog(folder / ACCESS)
        self.preferences = RequestLog(folder / PREFERENCES, durable=True)
        self.page = Page()
        self.idempotency = IdempotencyCache()
        self.running: Counter[str] = Counter()  # requests in flight by key
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        for path, method, handler in (
            ("/v1/models", "GET", self.list_models),
            ("/v1/models/{model:path}", "GET", self.show_model),
            ("/v1/chat/completions", "POST", self.chat),
            ("/v1/completions", "POST", self.completions),
            ("/v1/compare", "POST", self.compare),
            ("/v1/preferences", "POST", self.prefer),
        ):
            app.add_api_route(path, self._route(path, handler), methods=[method], response_model=None)
        app.add_api_route("/", self.show_page, methods=["GET"], response_model=None)
        app.add_exception_handler(HTTPException, _http_error)
        app.add_exception_handler(Exception, _any_error)
        self.app = HostCheck(app, config)

    # ---- routes --------------------------------------------------------------------------------------------------------

    async def show_page(self) -> Response:
        return HTMLResponse(
            self.page.html, headers={"content-security-policy": self.page.policy, "cache-control": "no-cache"}
        )

    async def list_models(self, call: RequestContext) -> Response:
        found = [m for m in await self.backend.models() if call.key is None or call.key.may_use(m["id"])]
        return JSONResponse({"object": "list", "data": found})

    async def show_model(self, call: RequestContext) -> Response:
        wanted = call.request.path_params["model"]
        call.may_use(wanted)
        for model in await self.backend.models():
            if model["id"] == wanted:
                return JSONResponse(model)
        raise model_not_found(wanted)

    async def chat(self, call: RequestContext) -> Response:
        body = await read_body(call.request, self.limits)
        asked = parse(body, ChatRequest)
        call.may_use(asked.model, *_reward_name(asked.reward))
        prompt = talk(None, asked.messages, self.limits)
        request = replace(asked.to_request(self.limits, (asked.model,), (prompt,)), logprobs=bool(asked.logprobs))
        builder = ResponseBuilder("chat", asked.model, bool(asked.logprobs), asked.wants_usage)
        return await self._answer(call, body, request, builder, asked.wants_stream)

    async def completions(self, call: RequestContext) -> Response:
        body = await read_body(call.request, self.limits)
        asked = parse(body, CompletionRequest)
        call.may_use(asked.model, *_reward_name(asked.reward))
        prompts = asked.prompts()
        if len(prompts) > self.limits.max_messages:
            raise ApiError(
                422,
                f"prompt: expected at most {self.limits.max_messages} prompts; got {len(prompts)}.",
                "invalid_value",
                "prompt",
            )
        wants = asked.logprobs is not None
        request = replace(asked.to_request(self.limits, (asked.model,), prompts), logprobs=wants)
        return await self._answer(
            call,
            body,
            request,
            ResponseBuilder("completion", asked.model, wants, asked.wants_usage),
            asked.wants_stream,
        )

    async def compare(self, call: RequestContext) -> Response:
        body = await read_body(call.request, self.limits)
        asked = parse(body, CompareRequest)
        if len(asked.models) > self.limits.max_n:
            raise ApiError(
                422,
                f"models: expected at most {self.limits.max_n}; got {len(asked.models)}.",
                "invalid_value",
                "models",
            )
        if len(set(asked.models)) != len(asked.models):
            raise ApiError(422, "models: a name stands there twice.", "invalid_value", "models")
        call.may_use(*asked.models, *_reward_name(asked.reward))
        prompt = talk(asked.prompt, asked.messages, self.limits)
        request = asked.to_request(self.limits, tuple(asked.models), (prompt,))
        builder = ResponseBuilder("comparison", ",".join(asked.models), usage=asked.wants_usage)
        return await self._answer(call, body, request, builder, asked.wants_stream)

    async def prefer(self, call: RequestContext) -> Response:
        body = await read_body(call.request, self.limits)
        asked = parse(body, PreferenceRequest)
        call.may_use(*filter(None, (asked.chosen_model, asked.rejected_model)))
        prompt = talk(asked.prompt, asked.messages, self.limits)
        if not str(prompt.get("text", "-")).strip() or not asked.chosen.strip() or not asked.rejected.strip():
            raise ApiError(422, "Prompt and both replies must say something.", "invalid_value", "chosen")
        if b"\\u0000" in body:
            raise ApiError(422, "A NUL character is no text that can be learnt from.", "invalid_value", "chosen")
        if asked.chosen.strip() == asked.rejected.strip():
            raise ApiError(
                422, "The two replies are the same: nothing can be learnt from that.", "invalid_value", "rejected"
            )
        row = preference_row(asked, prompt, call.key.name if call.key else None)

        async def store() -> dict[str, Any]:
            await asyncio.to_thread(self.preferences.add, row)
            self.metrics.count("preferences")
            return {"id": row["id"], "object": "preference", "created": row["created"]}

        return JSONResponse(await self.idempotency.once(self._idempotency_key(call, body), store))

    # ---- inside --------------------------------------------------------------------------------------------------------

    async def _answer(
        self, call: RequestContext, body: bytes, request: GenerationRequest, builder: ResponseBuilder, streamed: bool
    ) -> Response:
        call.log["model"] = builder.model
        if self.config.log_prompts:
            call.log["prompt"] = [dict(p) for p in request.prompts]
        if request.seed is None:
            request = replace(
                request, seed=secrets.randbits(62)
            )  # so that a second attempt, on another replica, says the same
        if streamed:
            return await self._streamed(call, request, builder)

        async def whole() -> dict[str, Any]:
            builder.take(await self.backend.complete(request))
            return builder.whole()

        found = await self.idempotency.once(self._idempotency_key(call, body), whole)
        self._note_answer(call, builder)
        return JSONResponse(found)

    async def _streamed(self, call: RequestContext, request: GenerationRequest, builder: ResponseBuilder) -> Response:
        events = self.backend.stream(request)
        try:
            first = await anext(events)
            builder.take(first)  # an error before anything was said is a status, not an event
        except BaseException:
            await _close(events)
            raise
        call.ends_later = True
        started = time.monotonic()

        async def lines() -> AsyncIterator[str]:
            pieces = stream(builder, first, events)
            try:
                async for piece in pieces:
                    yield piece
            finally:
                self._note_answer(call, builder)
                call.log["stream_seconds"] = round(time.monotonic() - started, 4)
                self._finish(call, 200)
                await _close(pieces)
                await _close(events)

        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        return _Stream(lines(), media_type="text/event-stream", headers=headers)

    def _note_answer(self, call: RequestContext, builder: ResponseBuilder) -> None:
        call.log |= {
            "adapter": builder.adapters(),
            **{k: v for k, v in builder.counts().items() if k != "total_tokens"},
        }
        if self.config.log_prompts:
            call.log["replies"] = [partial.text for partial in builder.partials.values()]

    def _idempotency_key(self, call: RequestContext, body: bytes) -> str | None:
        """The same request id with the same body is the same request, by the same caller. None without an id."""
        headers = call.request.headers
        given = headers.get("idempotency-key") or headers.get("x-request-id")
        if not given:
            return None
        digest = hashlib.sha256(body).hexdigest()
        return "\n".join((call.key.name if call.key else "", call.request.url.path, given[:256], digest))

    def _route(self, path: str, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        async def route(request: Request) -> Response:
            call = RequestContext(request, None)
            call.log |= {
                "time": round(time.time(), 3),
                "request_id": (request.headers.get("x-request-id") or "")[:128],
                "method": request.method,
                "route": path,
            }
            status = 499  # the client has left, unless something else happens
            try:
                if self.keys is not None:
                    key = self.keys.check(request.headers.get("authorization"))
                    self._enter(key)
                    call.key = key
                response = await handler(call)
                status = response.status_code
                return response
            except ApiError as error:
                status = error.status
                if status == 429:
                    self.metrics.count("refused")
                return error_response(error)
            except Exception:
                log.exception("a request failed")
                status = 500
                return error_response(internal())
            finally:
                if not call.ends_later:
                    self._finish(call, status)

        return route

    def _enter(self, key: Key) -> None:
        if key.max_concurrent is not None and self.running[key.name] >= key.max_concurrent:
            raise overloaded(self.limits.retry_after_s)
        self.running[key.name] += 1

    def _finish(self, call: RequestContext, status: int) -> None:
        if call.key is not None:
            self.running[call.key.name] -= 1
        seconds = round(time.time() - call.log["time"], 4)
        who = call.key.name if call.key is not None else None
        with contextlib.suppress(OSError):  # a full disk must not take the service down
            self.access.add({**call.log, "key": who, "status": status, "seconds": seconds})


class _Stream(StreamingResponse):
    """Closes its iterator when it ends, however it ends: the rows of a client that has left must not wait to be collected."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await _close(self.body_iterator)


def error_response(error: ApiError) -> JSONResponse:
    headers = {}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.retry_after is not None:
        headers["retry-after"] = str(error.retry_after)
    return JSONResponse(error.to_json(), status_code=error.status, headers=headers)


async def _http_error(request: Request, error: Any) -> Response:
    what = {404: "There is nothing here.", 405: "This route does not take this method."}.get(
        error.status_code, "Bad request."
    )
    response = error_response(
        ApiError(error.status_code, what, {404: "not_found", 405: "method_not_allowed"}.get(error.status_code))
    )
    response.headers.update(error.headers or {})
    return response


async def _any_error(request: Request, error: Exception) -> Response:
    return error_response(internal())


async def _close(events: Any) -> None:
    close = getattr(events, "aclose", None)
    if close is not None:
        await close()


def _reward_name(reward: str | bool) -> tuple[str, ...]:
    return (reward,) if isinstance(reward, str) else ()
