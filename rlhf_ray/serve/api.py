"""The public HTTP application: OpenAI's routes, comparisons, preferences, the page. No route here changes what is served."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from rlhf_ray.config.serve import ServeConfig
from rlhf_ray.serve.admission import max_requests
from rlhf_ray.serve.api_errors import ApiError, internal_error, model_not_found, request_timeout
from rlhf_ray.serve.api_keys import ApiKeys
from rlhf_ray.serve.generation import GenerationRequest
from rlhf_ray.serve.host_check import HostCheck
from rlhf_ray.serve.idempotency import IdempotencyCache
from rlhf_ray.serve.info_routes import InfoRoutes
from rlhf_ray.serve.key_usage import KeyUsage
from rlhf_ray.serve.metrics import Metrics, NoMetrics
from rlhf_ray.serve.openai_responses import ResponseBuilder, sse_stream
from rlhf_ray.serve.openai_types import ChatRequest, CompareRequest, CompletionRequest, PreferenceRequest, to_prompt
from rlhf_ray.serve.page import Page
from rlhf_ray.serve.request_body import parsed, read_body
from rlhf_ray.serve.request_context import Backend, Handler, RequestContext
from rlhf_ray.serve.request_log import ACCESS_LOG, PREFERENCE_LOG, TIE_LOG, RequestLog, preference_row
from rlhf_ray.serve.score import ROWS_PER_PASS, ScoreRequest

log = logging.getLogger(__name__)

TAKES_TURNS = frozenset({"/v1/score"})
"""Routes whose requests wait, where others are answered 429, until their key has room: a training job sends several batches at a
time, and must not end because its key may have few rows."""
LONGEST_TURN_S = 30.0


class HttpApi:
    """`app` is the ASGI application."""

    def __init__(self, config: ServeConfig, backend: Backend, metrics: Metrics | None = None) -> None:
        self.config, self.limits, self.backend = config, config.limits, backend
        self.metrics = metrics or NoMetrics()
        self.keys = None if config.api_keys is None else ApiKeys(config.api_keys)
        folder = Path(config.output_dir)
        self.access_log = RequestLog(
            folder / ACCESS_LOG, max_bytes=config.access_log_max_bytes, backups=config.access_log_backups
        )
        self.preference_log = RequestLog(folder / PREFERENCE_LOG, durable=True)
        self.tie_log = RequestLog(folder / TIE_LOG, durable=True)
        self.page = Page()
        self.idempotency = IdempotencyCache()
        self.usage = KeyUsage(self.limits.retry_after_s, max(max_requests(config) // 4, 4))
        self._listed: tuple[Any, bytes] | None = None  # what the backend gave, and all of it as JSON
        info = InfoRoutes(config, backend)
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        for path, method, handler in (
            ("/v1/models", "GET", self.list_models),
            ("/v1/models/{model:path}", "GET", self.retrieve_model),
            ("/v1/chat/completions", "POST", self.create_chat_completion),
            ("/v1/completions", "POST", self.create_completion),
            ("/v1/compare", "POST", self.create_comparison),
            ("/v1/preferences", "POST", self.create_preference),
            ("/tokenize", "POST", info.tokenize),
            ("/detokenize", "POST", info.detokenize),
            ("/tokenizer_info", "GET", info.tokenizer_info),
            ("/v1/score", "POST", self.create_score),
        ):
            app.add_api_route(path, self._endpoint(path, handler), methods=_methods(method), response_model=None)
        for path, open_handler in (  # without a key
            ("/", self.show_page),
            ("/health", info.health),
            ("/version", info.version),
            ("/openapi.json", info.openapi),
        ):
            app.add_api_route(path, open_handler, methods=_methods("GET"), response_model=None)
        app.add_exception_handler(HTTPException, _on_http_exception)
        app.add_exception_handler(Exception, _on_exception)
        self.app = HostCheck(app, config)

    # ---- routes --------------------------------------------------------------------------------------------------------

    async def show_page(self, request: Request) -> Response:
        return HTMLResponse(
            self.page.html, headers={"content-security-policy": self.page.policy, "cache-control": "no-cache"}
        )

    async def list_models(self, context: RequestContext) -> Response:
        models = await self.backend.models()
        if context.key is not None and context.key.models:
            return JSONResponse({"object": "list", "data": [m for m in models if context.allows(m["id"])]})
        if (
            self._listed is None or self._listed[0] is not models
        ):  # with many names this takes a while, and changes seldom
            listed = {"object": "list", "data": models}
            self._listed = models, await asyncio.to_thread(lambda: bytes(JSONResponse(listed).body))
        return Response(self._listed[1], media_type="application/json")

    async def retrieve_model(self, context: RequestContext) -> Response:
        wanted = context.request.path_params["model"]
        context.require_access(wanted)
        for model in await self.backend.models():
            if model["id"] == wanted:
                return JSONResponse(model)
        raise model_not_found(wanted)

    async def create_chat_completion(self, context: RequestContext) -> Response:
        body = await read_body(context.request, self.limits)
        chat = await parsed(body, ChatRequest)
        context.require_access(chat.model, *await self._reward_models(context, chat.reward))
        request = chat.to_generation_request(self.limits, (chat.model,), (chat.prompt(self.limits),))
        builder = ResponseBuilder("chat", chat.model, request.logprobs, chat.wants_usage, chat.calls)
        builder.single_call = chat.parallel_tool_calls is False
        builder.tools = frozenset(tool.function.name for tool in chat.tools or ())
        return await self._generate(context, body, request, builder, chat.wants_stream)

    async def create_completion(self, context: RequestContext) -> Response:
        body = await read_body(context.request, self.limits)
        completion = await parsed(body, CompletionRequest)
        context.require_access(completion.model, *await self._reward_models(context, completion.reward))
        prompts = completion.prompts()
        if len(prompts) > self.limits.max_messages:
            raise ApiError(
                400,
                f"prompt: expected at most {self.limits.max_messages} prompts; got {len(prompts)}.",
                "invalid_value",
                "prompt",
            )
        request = completion.to_generation_request(self.limits, (completion.model,), prompts)
        builder = ResponseBuilder("completion", completion.model, request.logprobs, completion.wants_usage)
        builder.best = (request.n, completion.n or 1) if request.ranked else None
        return await self._generate(context, body, request, builder, completion.wants_stream)

    async def create_comparison(self, context: RequestContext) -> Response:
        body = await read_body(context.request, self.limits)
        comparison = await parsed(body, CompareRequest)
        models = comparison.models
        if len(models) > self.limits.max_n:
            raise ApiError(
                400, f"models: expected at most {self.limits.max_n}; got {len(models)}.", "invalid_value", "models"
            )
        if len(set(models)) != len(models):
            raise ApiError(400, "models: a name stands there twice.", "invalid_value", "models")
        context.require_access(*models, *await self._reward_models(context, comparison.reward))
        prompt = to_prompt(comparison.prompt, comparison.messages, self.limits)
        request = comparison.to_generation_request(self.limits, tuple(models), (prompt,))
        builder = ResponseBuilder("comparison", ",".join(models), include_usage=comparison.wants_usage)
        return await self._generate(context, body, request, builder, comparison.wants_stream)

    async def create_preference(self, context: RequestContext) -> Response:
        body = await read_body(context.request, self.limits)
        preference = await parsed(body, PreferenceRequest)
        context.require_access(*filter(None, (preference.chosen_model, preference.rejected_model)))
        prompt = to_prompt(preference.prompt, preference.messages, self.limits)
        if preference.verdict == "better":
            _check_learnable(preference, prompt, body)
        row = preference_row(preference, prompt, context.key_name)

        async def store() -> dict[str, Any]:
            kept = self.preference_log if preference.verdict == "better" else self.tie_log
            await asyncio.to_thread(kept.append, row)
            self.metrics.count("preferences")
            return {"id": row["id"], "object": "preference", "created": row["created"]}

        return JSONResponse(await self.idempotency.get_or_run(self._idempotency_key(context, body), store))

    async def create_score(self, context: RequestContext) -> Response:
        body = await read_body(context.request, self.limits)
        request = await parsed(body, ScoreRequest)
        if request.model is None and (named := context.request.query_params.get("model")) is not None:
            request = request.model_copy(update={"model": named})
        context.require_access(*await self._reward_models(context, request.model or True))
        key, rows = context.key, min(len(request.prompts), ROWS_PER_PASS)
        if key is not None:  # rows take turns: who may have fewer at a time is not refused for that
            context.rows += self.usage.begin_some(key, rows - context.rows)
        try:
            # Waiting for a turn counts; a replica's own answer to what takes too long comes before this one.
            async with asyncio.timeout_at(context.arrived + self.limits.request_timeout_s + 5):
                found = await self.backend.score(request, "" if key is None else key.name)
        except (asyncio.CancelledError, TimeoutError) as ended:
            if key is not None:  # how far it got is not known here: no token is less than a byte
                self.usage.charge(key, len(body))
            if isinstance(ended, TimeoutError):
                raise request_timeout(self.limits.request_timeout_s) from None
            raise
        usage = found["usage"]
        if key is not None:
            self.usage.charge(key, usage["total_tokens"])
        context.log |= {k: v for k, v in usage.items() if k != "total_tokens"}
        if (error := found.get("error")) is not None:
            raise ApiError(**error)
        context.log |= {"model": found["model"], "rows": len(found["rewards"])}
        return JSONResponse({"object": "score", **found})

    async def _reward_models(self, context: RequestContext, reward: str | bool) -> tuple[str, ...]:
        """The reward adapter that a request names, or gets by default (see `Replica._reward_model`), for `require_access`."""
        if isinstance(reward, str):
            return (reward,)
        if not reward or context.key is None or not context.key.models:
            return ()
        if self.config.reward is not None:
            return (self.config.reward,)
        return tuple(m["id"] for m in await self.backend.models() if m.get("kind") == "reward" and "@" not in m["id"])

    # ---- from a request to a response ----------------------------------------------------------------------------------

    async def _generate(
        self, context: RequestContext, body: bytes, request: GenerationRequest, builder: ResponseBuilder, stream: bool
    ) -> Response:
        context.log["model"] = builder.model
        if self.config.log_prompts:
            context.log["prompt"] = [dict(p) for p in request.prompts]
        if context.key is not None:
            self._count_rows(context, request.rows)
            request = replace(request, key=context.key.name)
        if request.seed is None:  # so that a second attempt, on another replica, gives the same response
            request = replace(request, seed=secrets.randbits(62))
        if stream:
            return await self._stream(context, request, builder)

        async def complete() -> dict[str, Any]:
            try:
                builder.add(await self.backend.complete(request))
            except asyncio.CancelledError:  # its client has left, and how far the replies got is not known here
                if context.key is not None:
                    most = min(self.limits.default_max_tokens, self.limits.max_tokens)
                    most = most if request.max_tokens is None else request.max_tokens
                    self.usage.charge(context.key, request.rows * most)
                raise
            return builder.response()

        try:
            content = await self.idempotency.get_or_run(self._idempotency_key(context, body), complete)
        finally:  # a reply that was not finished in time has cost what it has
            self._log_generation(context, builder)
        return JSONResponse(content)

    def _count_rows(self, context: RequestContext, rows: int) -> None:
        """A request with a key counts as one reply until what it asks for is known. ApiError as of `KeyUsage.begin`."""
        assert context.key is not None
        self.usage.end(context.key, context.rows)
        context.rows = 0
        self.usage.begin(context.key, rows)
        context.rows = rows

    async def _stream(self, context: RequestContext, request: GenerationRequest, builder: ResponseBuilder) -> Response:
        events = self.backend.stream(request)
        try:
            first = await anext(events)
            builder.add(first)  # an error before the first event is an HTTP status, not a chunk
        except BaseException:
            await _aclose(events)
            raise
        context.is_streaming = True
        started_at = time.monotonic()

        async def finish() -> None:
            if context.is_streaming:
                context.is_streaming = False
                self._log_generation(context, builder)
                context.log["stream_seconds"] = round(time.monotonic() - started_at, 4)
                self._finish_request(context, 200)
            await _aclose(events)

        async def content() -> AsyncIterator[str]:
            chunks = sse_stream(builder, first, events)
            try:
                async for chunk in chunks:
                    yield chunk
            finally:
                await finish()
                await _aclose(chunks)

        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        return ClosingStreamingResponse(content(), finish, media_type="text/event-stream", headers=headers)

    def _log_generation(self, context: RequestContext, builder: ResponseBuilder) -> None:
        usage = builder.token_usage()
        if context.key is not None:
            self.usage.charge(context.key, usage["total_tokens"])
        context.log |= {
            "adapter": builder.adapter_ids(),
            **{k: v for k, v in usage.items() if k != "total_tokens"},
        }
        if self.config.log_prompts:
            context.log["replies"] = [partial.text for partial in builder.partials.values()]

    def _idempotency_key(self, context: RequestContext, body: bytes) -> str | None:
        """The same key with the same body is the same request, by the same caller. None without a key. (X-Request-Id, which proxies
        set and clients keep, only names a request in the log.)"""
        key = context.request.headers.get("idempotency-key")
        if not key:
            return None
        digest = hashlib.sha256(body).hexdigest()
        return "\n".join((context.key_name or "", context.request.url.path, key[:256], digest))

    # ---- around every request ------------------------------------------------------------------------------------------

    def _endpoint(self, path: str, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        """`handler` with authentication, errors as responses, and a line in the access log."""

        async def endpoint(request: Request) -> Response:
            context = RequestContext(request, None)
            context.log |= {
                "time": round(time.time(), 3),
                "request_id": (request.headers.get("x-request-id") or "")[:128],
                "method": request.method,
                "route": path,
            }
            status = 499  # the client has disconnected, unless something else happens
            try:
                if self.keys is not None:
                    key = self.keys.authenticate(request.headers.get("authorization"))
                    if path in TAKES_TURNS:
                        # Half is for the answer, and clients (reward servers' among them) give up after a minute.
                        await self.usage.wait(key, min(self.limits.request_timeout_s / 2, LONGEST_TURN_S))
                    else:
                        self.usage.begin(key, 1)
                    context.key, context.rows = key, 1
                response = await handler(context)
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
                return error_response(internal_error())
            finally:
                if not context.is_streaming:
                    self._finish_request(context, status)

        return endpoint

    def _finish_request(self, context: RequestContext, status: int) -> None:
        if context.key is not None:
            self.usage.end(context.key, context.rows)
        seconds = round(time.time() - context.log["time"], 4)
        try:
            self.access_log.append({**context.log, "key": context.key_name, "status": status, "seconds": seconds})
        except OSError:  # a full disk must not take the service down
            pass
        except Exception:  # nor may a line that cannot be written take the answer away
            log.exception("a request is missing from the access log")


class ClosingStreamingResponse(StreamingResponse):
    """Closes its iterator when it ends, however it ends: the rows of a client that disconnects must not wait for the collector.

    finish: called then as well, since an iterator that was not begun runs nothing of its own when it is closed."""

    def __init__(
        self,
        content: AsyncIterator[str],
        finish: Callable[[], Awaitable[None]],
        media_type: str,
        headers: dict[str, str],
    ) -> None:
        super().__init__(content, media_type=media_type, headers=headers)
        self._finish = finish

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            try:
                await _aclose(self.body_iterator)
            finally:
                await self._finish()


def _check_learnable(preference: PreferenceRequest, prompt: dict[str, Any], body: bytes) -> None:
    """ApiError for a row that the reward stage could not learn from."""
    chosen, rejected = preference.chosen.strip(), preference.rejected.strip()
    if not str(prompt.get("text", "-")).strip() or not chosen or not rejected:
        raise ApiError(400, "Prompt and both replies must say something.", "invalid_value", "chosen")
    if b"\\u0000" in body:
        raise ApiError(400, "A NUL character is no text that can be learnt from.", "invalid_value", "chosen")
    if chosen == rejected:
        message = "The two replies are the same: nothing can be learnt from that."
        raise ApiError(400, message, "invalid_value", "rejected")


def _methods(method: str) -> list[str]:
    return [method, "HEAD"] if method == "GET" else [method]


def error_response(error: ApiError) -> JSONResponse:
    headers = {}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.retry_after is not None:
        headers["retry-after"] = str(error.retry_after)
    return JSONResponse(error.to_json(), status_code=error.status, headers=headers)


async def _on_http_exception(request: Request, error: Any) -> Response:
    message = {404: "There is nothing here.", 405: "This route does not take this method."}.get(
        error.status_code, "Bad request."
    )
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    response = error_response(ApiError(error.status_code, message, code))
    response.headers.update(error.headers or {})
    return response


async def _on_exception(request: Request, error: Exception) -> Response:
    return error_response(internal_error())


async def _aclose(iterator: Any) -> None:
    close = getattr(iterator, "aclose", None)
    if close is not None:
        await close()
