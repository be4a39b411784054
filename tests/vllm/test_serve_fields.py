"""The tests of request fields (tests/unit/serve/test_request_fields.py), word for word, against a service whose engine is vLLM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.unit.serve.conftest import LiveService, adapters, base_dir
from tests.unit.serve.conftest import live as live_of_unit_tests
from tests.unit.serve.test_request_fields import *  # noqa: F403

__all__ = ["adapters", "base_dir", "live_of_unit_tests"]


@pytest.fixture(scope="module")
def live(live_of_unit_tests: Callable[..., LiveService]) -> Callable[..., LiveService]:
    def make(**fields: Any) -> LiveService:
        return live_of_unit_tests(engine="vllm", vllm={"kv_cache_gb": 0.0625}, **fields)

    return make
