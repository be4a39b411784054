from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.models.backbone import Backbone, load_in_float32


@pytest.fixture
def make_backbone(tiny_llama: Callable[..., Path], tiny_gpt2: Callable[..., Path]) -> Callable[..., Backbone]:
    """make_backbone(family, **options) -> a freshly loaded tiny base on the CPU; family: llama, or gpt2 (learned positions)."""
    families = {"llama": tiny_llama, "gpt2": tiny_gpt2}

    def make(family: str = "llama", **options: Any) -> Backbone:
        return load_in_float32(str(families[family](**options)), "eager")

    return make


@pytest.fixture(scope="session")
def alias_of() -> Callable[..., Any]:
    """alias_of(name, versions=1) -> what a registry knows of a name; there are no adapters behind it."""
    from rlhf_ray.registry.alias import Alias
    from rlhf_ray.registry.names import adapter_id

    sha256 = "0123456789abcdef" * 4
    hashes = {"adapter_sha256": sha256, "manifest_sha256": sha256}

    def make(name: str, versions: int = 1) -> Alias:
        numbers = range(1, versions + 1)
        found = Alias(
            name, None, {n: {"id": adapter_id(name, n, sha256), "kind": "sft", "base": {}, **hashes} for n in numbers}
        )
        for n in numbers:
            found = found.then("promote", n)
        return found

    return make
