from __future__ import annotations

from typing import Any

import pytest

from rlhf_ray.console import Console


class Recording(Console):
    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def emit(self, event: dict[str, Any]) -> None:
        self.events.append(event)


@pytest.fixture
def console() -> Recording:
    return Recording()
