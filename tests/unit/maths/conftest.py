"""Shared by the tests of `rlhf_ray.maths`: the golden values, and random batches with reply masks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    """The values that tests/golden/derive.py works out from the definitions."""
    return json.loads((GOLDEN / "maths.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def reply_mask() -> Callable[..., Tensor]:
    """reply_mask(lengths, width) -> bool[B, R], the first `length` columns of each row True."""

    def make(lengths: list[int], width: int) -> Tensor:
        return torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]

    return make


@pytest.fixture(scope="session")
def batch(reply_mask: Callable[..., Tensor]) -> Callable[..., dict[str, Tensor]]:
    """batch(seed, lengths, width) -> a dict of [B, R] float64 tensors of a PPO step and their mask, equal for equal seeds."""

    def make(seed: int, lengths: list[int], width: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shape = (len(lengths), width)

        def normal() -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        old = -normal().abs() - 0.1
        return {
            "response_mask": reply_mask(lengths, width),
            "old_logprobs": old,
            "new_logprobs": old + 0.3 * normal(),
            "ref_logprobs": old + 0.3 * normal(),
            "advantages": normal(),
            "old_values": normal(),
            "values": normal(),
            "returns": normal(),
            "rewards": normal(),
        }

    return make
