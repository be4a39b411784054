"""What the application is built of, and Serve's own refusals as the API's errors."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from ray.serve.exceptions import BackPressureError

from rlhf_ray.config.serve import ServeConfig
from rlhf_ray.serve.api_errors import ApiError
from rlhf_ray.serve.app import ServeBackend, application
from rlhf_ray.serve.generation import GenerationRequest

REQUEST = GenerationRequest(models=("base",), prompts=({"text": "Hello"},))


class Response:
    """Of a request that never got a replica: Serve raises the reason when it is read, and again when it is cancelled."""

    def __await__(self) -> Any:
        raise BackPressureError(num_queued_requests=16, max_queued_requests=16)

    def __aiter__(self) -> Response:
        return self

    async def __anext__(self) -> Any:
        await self

    def cancel(self) -> None:
        self.__await__()


class Engine:
    """A fake of Serve's handle."""

    def __init__(self) -> None:
        self.complete = self.stream = self

    def options(self, stream: bool) -> Engine:
        return self

    def remote(self, request: GenerationRequest) -> Response:
        return Response()


@pytest.mark.parametrize("streamed", [False, True])
def test_a_full_queue_is_a_429(tmp_path: Path, streamed: bool) -> None:
    backend = ServeBackend(Engine(), ServeConfig(output_dir=str(tmp_path), model_name_or_path="base"))  # type: ignore[arg-type]

    async def send() -> None:
        if streamed:
            await anext(backend.stream(REQUEST))
        else:
            await backend.complete(REQUEST)

    with pytest.raises(ApiError) as error:
        asyncio.run(send())
    assert error.value.status == 429 and error.value.retry_after == 1


def test_all_replicas_are_told_one_date(tmp_path: Path) -> None:
    """Of the base's chat template: each would else take its own, as it starts."""
    api = application(ServeConfig(output_dir=str(tmp_path), model_name_or_path="base"))._bound_deployment
    values, engine = api.init_args
    assert values["template_date"] and engine._bound_deployment.init_args == (values,)
