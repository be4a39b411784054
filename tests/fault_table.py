"""The faults of the table, and the count of what was tried and what held. Tests note their tries by the fixture `note`.

`pytest -m fault --fault-table table.md` runs the tests that note any, prints the table at its end and writes it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass, field
from typing import Any

FAULTS = {
    1: "kill -9 a generator in a rollout",
    2: "a generator hangs",
    3: "all generators gone, restarts used up",
    4: "stale generator after a restart",
    5: "scorer killed, slow, or raises",
    6: "reward not finite, wrong count, wrong order",
    7: "kill -9 one learner rank",
    8: "a learner rank hangs",
    9: "kill -9 the Train controller",
    10: "kill -9 the driver",
    11: "SIGTERM, Ctrl-C",
    12: "the node of a learner is drained",
    13: "kill -9 Ray's control service (GCS)",
    14: "a node with generators is lost",
    15: "2 % of Ray's remote calls fail",
    16: "a scorer runs out of memory",
    17: "disk full while saving",
    18: "kill -9 at any instant of a save",
    19: "checkpoint file cut, flipped, missing",
    20: "gradient not finite",
    21: "weights that are not finite reach a generator",
    22: "KL, clipping or length run away",
    23: "kill -9 a trial, or the driver, of a sweep",
    24: "kill -9 a replica of the service under load",
    25: "kill -9 the service's controller or proxy under load",
    26: "a damaged adapter is promoted under load",
    27: "ten times the service's capacity, for a minute",
    28: "two runs on one folder",
    29: "checkpoints of another version",
    30: "500 steps without a leak",
}


@dataclass
class Row:
    """tried, passed: counts.  figures: what was seen, each with the numbers that stand at its {}."""

    tried: int = 0
    passed: int = 0
    figures: dict[str, list[float]] = field(default_factory=dict)

    def told(self) -> str:
        return "; ".join(text.replace("{}", _range(numbers)) for text, numbers in self.figures.items())


class FaultTable:
    """What was tried and what held, by row of the table."""

    def __init__(self) -> None:
        self.rows: defaultdict[int, Row] = defaultdict(Row)

    def note(self, number: int, held: bool, figure: str = "", seconds: float | None = None) -> None:
        """One try. figure: what was seen; {} in it stands for `seconds`, of which the table gives least and most."""
        row = self.rows[number]
        row.tried += 1
        row.passed += held
        if figure:
            row.figures.setdefault(figure, []).extend([] if seconds is None else [seconds])

    def export(self) -> dict[int, Any]:
        """As plain values, for `add`."""
        return {number: asdict(row) for number, row in self.rows.items()}

    def add(self, exported: dict[int, Any]) -> None:
        """The tries of another table."""
        for number, values in exported.items():
            row = self.rows[number]
            row.tried += values["tried"]
            row.passed += values["passed"]
            for figure, seconds in values["figures"].items():
                row.figures.setdefault(figure, []).extend(seconds)

    def lines(self) -> list[str]:
        """A table in Markdown."""
        head = ["| # | fault | tried | passed | figures |", "|---|---|---|---|---|"]
        body = [f"| {n} | {FAULTS[n]} | {r.tried} | {r.passed} | {r.told()} |" for n, r in sorted(self.rows.items())]
        total = [sum(getattr(r, name) for r in self.rows.values()) for name in ("tried", "passed")]
        return [*head, *body, f"| | all | {total[0]} | {total[1]} | |"]


def _range(numbers: list[float]) -> str:
    shown = list(dict.fromkeys(_short(n) for n in (min(numbers), max(numbers)))) if numbers else []
    return " to ".join(shown)


def _short(number: float) -> str:
    return f"{number:.1f}" if number < 9.95 else f"{number:.0f}"
