"""What happened to rows that were not used as they are: counted by reason, with the first row of each, and never silent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class CountEntry:
    """How many rows share a reason, and the first of them: its `file:line` and what is special about it."""

    count: int
    where: str
    detail: str = ""

    def first(self) -> str:
        return f"first {self.where}, {self.detail}" if self.detail else f"first {self.where}"


@dataclass
class Tally:
    """Rows by reason. `verb` is what happened to them: dropped, skipped, truncated.

    >>> tally = Tally("dropped")
    >>> tally.add("over max_length 256", "alpaca.jsonl:14", "311 tokens")
    >>> str(tally)
    '1 dropped: over max_length 256 (first alpaca.jsonl:14, 311 tokens)'
    """

    verb: str
    reasons: dict[str, CountEntry] = field(default_factory=dict)

    def add(self, reason: str, where: str, detail: str = "") -> None:
        entry = self.reasons.get(reason)
        if entry is None:
            self.reasons[reason] = CountEntry(1, where, detail)
        else:
            entry.count += 1

    def update(self, other: Tally) -> None:
        """Take over the rows of another tally; the first row of a reason stays the first."""
        for reason, entry in other.reasons.items():
            if reason in self.reasons:
                self.reasons[reason].count += entry.count
            else:
                self.reasons[reason] = CountEntry(entry.count, entry.where, entry.detail)

    @property
    def total(self) -> int:
        return sum(entry.count for entry in self.reasons.values())

    def counts(self) -> Mapping[str, int]:
        """reason -> number of rows, as run summaries store it."""
        return {reason: entry.count for reason, entry in self.reasons.items()}

    def __str__(self) -> str:
        shown = [
            f"{reason if len(self.reasons) == 1 else f'{entry.count:,} {reason}'} ({entry.first()})"
            for reason, entry in self.reasons.items()
        ]
        return f"{self.total:,} {self.verb}: {', '.join(shown)}" if shown else f"0 {self.verb}"


def describe_rows(total: int, parts: Mapping[str, int], *tallies: Tally) -> str:
    """One line for the log that accounts for every row read; tallies without rows are left out.

    >>> describe_rows(2000, {"train": 1800, "held out": 200}, Tally("dropped"))
    '2,000 rows: 1,800 train, 200 held out'
    """
    shown = [f"{count:,} {name}" for name, count in parts.items()]
    return f"{total:,} rows: " + ", ".join(shown + [str(tally) for tally in tallies if tally.total])
