"""What a stage has to say in its report, before it is laid out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rlhf_ray.report.charts import Chart
from rlhf_ray.report.html import Html
from rlhf_ray.report.numbers import shown


@dataclass(frozen=True)
class Tile:
    """A headline figure: what, how much, and compared with what."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Finding:
    """The outcome of one check. `text` says what was measured, and for a concern what it means and what to do."""

    concern: bool
    title: str
    text: str


@dataclass(frozen=True)
class Story:
    """sentence: the outcome in a line.  groups: headed rows of charts, the most telling group first.  tables: anything else."""

    sentence: str
    tiles: Sequence[Tile] = ()
    findings: Sequence[Finding] = ()
    groups: Sequence[tuple[str, Sequence[Chart]]] = ()
    tables: Sequence[Html] = field(default_factory=tuple)


def change(values: Sequence[float], unit: str = "", first: str = "at the start") -> str:
    """`from 0.12 at the start`, or nothing if there is only one value."""
    return f"from {shown(values[0], unit)} {first}" if len(values) > 1 else ""
