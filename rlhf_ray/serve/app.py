"""The Ray Serve application: an API process in front of replicas of the base. `rlhf_ray.serve.app:build` also serves config files.

proxy ──> Api (HTTP, keys, limits; no model) ──> Engine x N (base, adapters, decode thread)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayError, TaskCancelledError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError
from ray.serve.handle import DeploymentHandle

from rlhf_ray.config.load import load_dict
from rlhf_ray.config.resolved import to_dict
from rlhf_ray.config.serve import ServeConfig
from rlhf_ray.serve.admission import max_requests
from rlhf_ray.serve.api_errors import ApiError, overloaded
from rlhf_ray.serve.generation import Event, GenerationRequest
from rlhf_ray.serve.score import ScoreRequest, score_on

log = logging.getLogger(__name__)

APP_NAME = "rlhf_ray"
MAX_ATTEMPTS = 3
"""Of a request whose replica dies: it starts again on another one, with the same seed."""
MAX_API_REQUESTS = 10_000
MODELS_TTL_S = 0.5
SERVE_ERRORS = (RayError, BackPressureError, DeploymentUnavailableError, RequestCancelledError)


@serve.deployment(name="Engine")
class EngineDeployment:
    """A replica (replica.py) as a Serve deployment."""

    async def __init__(self, values: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it on the replica's event loop
        from rlhf_ray.serve.metrics import Metrics
        from rlhf_ray.serve.replica import Replica

        name = serve.get_replica_context().replica_id.unique_id
        self.replica = Replica(load_dict(ServeConfig, values, "serve job"), name, Metrics())
        await self.replica.start()

    async def complete(self, request: GenerationRequest) -> list[Event]:
        return [event async for events in self.replica.events(request, whole=True) for event in events]

    async def score(self, request: ScoreRequest, key: str) -> dict[str, Any]:
        return await score_on(self.replica, request, key)

    async def stream(self, request: GenerationRequest) -> AsyncIterator[list[Event]]:
        events = self.replica.events(request)
        try:
            async for batch in events:
                yield batch
        finally:
            await events.aclose()  # type: ignore[attr-defined]  # now, not when it is garbage-collected: its rows are being decoded

    async def models(self, known: str = "") -> tuple[str, list[dict[str, Any]] | None]:
        """(what the list is known by, the list; None if it is still that of `known`)."""
        return await self.replica.models_since(known)

    async def tokenize(self, model: str, prompt: dict[str, Any]) -> dict[str, Any]:
        return await self.replica.tokenize(model, prompt)

    async def detokenize(self, ids: list[int]) -> dict[str, Any]:
        return await self.replica.detokenize(ids)

    async def tokenizer_info(self) -> dict[str, Any]:
        return await self.replica.tokenizer_info()

    async def status(self) -> dict[str, Any]:
        return await self.replica.status()

    async def check_health(self) -> None:
        self.replica.export_gauges()
        await self.replica.check_health()

    async def __del__(self) -> None:
        if hasattr(self, "replica"):
            await self.replica.close()


class ServeBackend:
    """The backend of the API: replicas behind a Serve handle. Serve routes to one of them, and refuses when all are full."""

    def __init__(self, engine: DeploymentHandle, config: ServeConfig) -> None:
        self._engine, self._limits = engine, config.limits
        self._streaming = engine.options(stream=True)
        self._models: tuple[float, list[dict[str, Any]]] | None = None
        self._models_known = ""

    async def complete(self, request: GenerationRequest) -> list[Event]:
        return list(await self._retried(self._engine.complete, request))

    async def score(self, request: ScoreRequest, key: str) -> dict[str, Any]:
        return dict(await self._retried(self._engine.score, request, key))

    async def _retried(self, method: Any, *values: Any) -> Any:
        """What a replica answers; one that dies meanwhile costs nothing but time."""
        deadline = asyncio.get_running_loop().time() + self._limits.request_timeout_s + 5
        for attempt in range(1, MAX_ATTEMPTS + 1):
            response = method.remote(*values)
            try:
                async with asyncio.timeout_at(deadline):
                    return await response
            except asyncio.CancelledError:
                _cancel(response)
                raise
            except TimeoutError:
                _cancel(response)
                raise ApiError(504, "The reply was not finished in time.", "timeout") from None
            except SERVE_ERRORS as error:
                self._raise_unless_retryable(error, last=attempt == MAX_ATTEMPTS)
                await asyncio.sleep(0.05 * attempt)
        raise AssertionError

    async def stream(self, request: GenerationRequest) -> AsyncIterator[list[Event]]:
        """A request whose replica dies before its first event is sent to another one."""
        for attempt in range(1, MAX_ATTEMPTS + 1):
            response: Any = self._streaming.stream.remote(request)
            started = False
            try:
                async for events in response:
                    started = True
                    yield events
                return
            except SERVE_ERRORS as error:
                self._raise_unless_retryable(error, last=started or attempt == MAX_ATTEMPTS)
                await asyncio.sleep(0.05 * attempt)
            finally:
                _cancel(response)

    async def models(self) -> list[dict[str, Any]]:
        now = asyncio.get_running_loop().time()
        if self._models is None or now - self._models[0] > MODELS_TTL_S:
            try:
                async with asyncio.timeout(10):
                    known = "" if self._models is None else self._models_known
                    self._models_known, listed = await self._engine.models.remote(known)
                assert listed is not None or self._models is not None
                self._models = now, self._models[1] if listed is None and self._models is not None else listed or []
            except (RayError, BackPressureError, DeploymentUnavailableError, TimeoutError) as error:
                if self._models is None:
                    self._raise_unless_retryable(error, last=True)
        assert self._models is not None
        return self._models[1]

    async def tokenize(self, model: str, prompt: dict[str, Any]) -> dict[str, Any]:
        return await self._ask(self._engine.tokenize, model, prompt)

    async def detokenize(self, ids: list[int]) -> dict[str, Any]:
        return await self._ask(self._engine.detokenize, ids)

    async def tokenizer_info(self) -> dict[str, Any]:
        return await self._ask(self._engine.tokenizer_info)

    async def check_health(self) -> None:
        """ApiError unless a replica answers."""
        await self._ask(self._engine.models)

    async def _ask(self, method: Any, *values: Any) -> Any:
        """What a replica answers at once. ApiError if none does."""
        try:
            async with asyncio.timeout(10):
                return await method.remote(*values)
        except TimeoutError:
            raise ApiError(503, "No replica has answered in time.", "replica_failed") from None
        except SERVE_ERRORS as error:
            self._raise_unless_retryable(error, last=True)

    def _raise_unless_retryable(self, error: BaseException, last: bool) -> None:
        """Return if another attempt makes sense; else raise the error for the client."""
        if isinstance(error, BackPressureError):
            raise overloaded(self._limits.retry_after_s) from None
        replica_died = isinstance(
            error, (RayActorError, TaskCancelledError, DeploymentUnavailableError, RequestCancelledError)
        )
        log.warning("a replica failed: %s", type(error).__name__)
        if last or not replica_died:
            code = "replica_failed" if replica_died else "internal_error"
            raise ApiError(
                503 if replica_died else 500, "The service failed on this request. Try again.", code
            ) from None


def _cancel(response: Any) -> None:
    """Serve raises here, a second time, the error of a request that never had a replica, and would hide the one being raised."""
    with contextlib.suppress(*SERVE_ERRORS):
        response.cancel()


@serve.deployment(name="Api")
@serve.ingress()
class ApiDeployment:
    """The HTTP application (api.py) as a Serve deployment."""

    def __init__(self, values: dict[str, Any], engine: DeploymentHandle) -> None:
        self.config = load_dict(ServeConfig, values, "serve job")
        self.engine = engine

    def __serve_build_asgi_app__(self) -> Any:
        from rlhf_ray.serve.api import HttpApi
        from rlhf_ray.serve.metrics import Metrics

        return HttpApi(self.config, ServeBackend(self.engine, self.config), Metrics()).app


def build(args: dict[str, Any]) -> serve.Application:
    """The application for a Serve config file: `import_path: rlhf_ray.serve.app:build`, `args:` the fields of a serve job.

    Raises ConfigError."""
    return application(load_dict(ServeConfig, args, "args"))


def application(config: ServeConfig, own_ray: bool = False) -> serve.Application:
    """own_ray: on a Ray of our own everything fits, whatever the number of cores."""
    from rlhf_ray.serve.template_date import with_template_date  # brings what reads adapters

    config = with_template_date(config)
    values, limits, replicas = to_dict(config), config.limits, config.replicas
    cpus = replicas.num_cpus if replicas.num_cpus is not None else 0.1 if own_ray else 1.0
    gpus = replicas.num_gpus
    if gpus is None:
        gpus = min(ray.cluster_resources().get("GPU", 0.0), 1.0) if ray.is_initialized() else 0.0
    options: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": cpus, "num_gpus": gpus},
        # A replica that is full refuses by itself, at once; requests must reach it for that.
        "max_ongoing_requests": 2 * (limits.max_batch_rows + limits.max_waiting_rows),
        "max_queued_requests": max_requests(config),
        "graceful_shutdown_timeout_s": limits.request_timeout_s + 5,
        "graceful_shutdown_wait_loop_s": 0.2,
        "health_check_period_s": 1,
        # Serve gives a replica up after three checks in a row without an answer.
        "health_check_timeout_s": replicas.unresponsive_after_s / 3,
        "request_router_config": RequestRouterConfig(
            request_router_class="rlhf_ray.serve.affinity:AffinityRouter",  # type: ignore[arg-type]  # it is imported from this
            request_router_kwargs={"slack": replicas.affinity_slack},
        ),
        "max_constructor_retry_count": 3,
    }
    if replicas.max_replicas is not None:
        options["autoscaling_config"] = {
            "min_replicas": replicas.min_replicas,
            "max_replicas": replicas.max_replicas,
            "target_ongoing_requests": replicas.target_ongoing_requests,
        }
    else:
        options["num_replicas"] = replicas.min_replicas
    api = ApiDeployment.options(  # type: ignore[attr-defined]  # what the decorators make of it
        ray_actor_options={"num_cpus": 0.1},
        max_ongoing_requests=MAX_API_REQUESTS,
        graceful_shutdown_timeout_s=limits.request_timeout_s + 10,
        graceful_shutdown_wait_loop_s=0.2,
    )
    return api.bind(values, EngineDeployment.options(**options).bind(values))  # type: ignore[attr-defined,no-any-return]
