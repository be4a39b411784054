"""Replies on their way, and who writes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf_ray.data.templates import Template
from rlhf_ray.serve.catalogue import Readout
from rlhf_ray.serve.slots import Slot
from rlhf_ray.serve.text import ReplyText


@dataclass(frozen=True)
class Speaker:
    """Who writes a reply. model: as it was asked for.  slot: None for the base, adapters off."""

    model: str
    id: str
    sha256: str
    template: Template
    stop_ids: tuple[int, ...]
    slot: Slot[Readout] | None = None


@dataclass(eq=False)
class Choice:
    """One reply on its way. room: most tokens it may take."""

    index: int
    speaker: Speaker
    prompt: Mapping[str, Any]
    prompt_ids: tuple[int, ...]
    room: int
    text: ReplyText
    reply_ids: list[int] = field(default_factory=list)
    logprob: float = 0.0
    end: Literal["stop", "length"] | None = None
