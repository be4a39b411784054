"""Requests that come while replicas are full are refused without asking one, for a moment; not those of another model's trouble."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config.serve import ServeConfig
from rlhf_ray.serve.app import FULL_S, Replicas
from rlhf_ray.serve.asks import Ask
from rlhf_ray.serve.errors import ApiError, overloaded

ASK = Ask(models=("base",), prompts=({"text": "Hello"},))


class Engine:
    """What Serve's handle looks like. says: the events of every reply."""

    def __init__(self, says: list[dict[str, Any]]) -> None:
        self.says, self.asked = says, 0
        self.complete = self

    def options(self, stream: bool) -> Engine:
        return self

    def remote(self, ask: Ask) -> Any:
        self.asked += 1

        async def reply() -> list[dict[str, Any]]:
            return self.says

        return reply()


@pytest.mark.parametrize(("param", "asked"), [(None, 1), ("model", 2)])
def test_a_full_replica_is_not_asked_again_at_once(tmp_path: Path, param: str | None, asked: int) -> None:
    engine = Engine([{"error": overloaded(1, param).as_dict()}])
    config = ServeConfig(output_dir=str(tmp_path), model_name_or_path="base")

    async def story() -> None:
        replicas = Replicas(engine, config)  # type: ignore[arg-type]
        await replicas.complete(ASK)
        try:
            await replicas.complete(ASK)
        except ApiError as error:
            assert error.status == 429 and error.retry_after == config.limits.retry_after_s
        assert engine.asked == asked
        await asyncio.sleep(2 * FULL_S)
        await replicas.complete(ASK)
        assert engine.asked == asked + 1

    asyncio.run(story())
