"""Replies on their way, and who writes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf_ray.data.templates import Template
from rlhf_ray.serve.catalogue import ModelReadout
from rlhf_ray.serve.slots import CachedAdapter
from rlhf_ray.serve.text import ResponseText


@dataclass(frozen=True)
class ServedModel:
    """Who writes a reply. model: as it was asked for.  slot: None for the base, adapters off."""

    model: str
    id: str
    sha256: str
    template: Template
    stop_ids: tuple[int, ...]
    cached: CachedAdapter[ModelReadout] | None = None


@dataclass(eq=False)
class Generation:
    """One reply on its way. room: most tokens it may take."""

    index: int
    served: ServedModel
    prompt: Mapping[str, Any]
    prompt_ids: tuple[int, ...]
    room: int
    text: ResponseText
    response_ids: list[int] = field(default_factory=list)
    logprob: float = 0.0
    end: Literal["stop", "length"] | None = None
