"""What the routes of the HTTP application share: the replicas behind them, and a request while it is handled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from rlhf_ray.serve.api_errors import model_not_found
from rlhf_ray.serve.api_keys import ApiKey
from rlhf_ray.serve.generation import Event, GenerationRequest
from rlhf_ray.serve.score import ScoreRequest


class Backend(Protocol):
    """The replicas."""

    async def complete(self, request: GenerationRequest) -> list[Event]:
        """All events of a request."""
        ...

    def stream(self, request: GenerationRequest) -> AsyncIterator[list[Event]]:
        """The events as they come. Closing the iterator ends the work."""
        ...

    async def score(self, request: ScoreRequest, key: str) -> dict[str, Any]:
        """See `score_on`."""
        ...

    async def models(self) -> list[dict[str, Any]]: ...

    async def tokenize(self, model: str, prompt: dict[str, Any]) -> dict[str, Any]:
        """{ids, texts, context}: what a model reads of a prompt; or {error}."""
        ...

    async def detokenize(self, ids: list[int]) -> dict[str, Any]:
        """{text}, or {error}."""
        ...

    async def tokenizer_info(self) -> dict[str, Any]: ...

    async def check_health(self) -> None:
        """ApiError unless a replica answers."""
        ...


class RequestContext:
    """One HTTP request while it is handled. log: its line in the access log.   arrived: by the event loop's clock."""

    def __init__(self, request: Request, key: ApiKey | None) -> None:
        self.request, self.key = request, key
        self.arrived = asyncio.get_running_loop().time()
        self.log: dict[str, Any] = {}
        self.rows = 0
        """That it counts as in `KeyUsage`."""
        self.is_streaming = False
        """The line is written when the stream ends."""

    @property
    def key_name(self) -> str | None:
        return None if self.key is None else self.key.name

    def allows(self, model: str) -> bool:
        return self.key is None or self.key.allows(model)

    def require_access(self, *models: str) -> None:
        """ApiError as for a model that does not exist: a key does not learn of others' models."""
        for model in models:
            if not self.allows(model):
                raise model_not_found(model)


Handler = Callable[[RequestContext], Awaitable[Response]]
