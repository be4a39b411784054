"""The error tree. Every error a user can cause says where it is, what is wrong, what was expected, what was found and how to
mend it; it carries the exit code of the command that meets it, and it survives pickling, because errors cross Ray processes.

    error: jobs/ppo.yaml: ppo.cliprange: out of range; expected 0 < x < 1; got 1.5; fix: set cliprange=0.2
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Self

SHOWN = 20
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Of an OSError: there is no room for what was written."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. `where` is a file, `file:line` or a field path; the last three may be empty."""

    where: str
    what: str
    expected: str = ""
    got: str = ""
    fix: str = ""

    def __str__(self) -> str:
        parts = [f"{self.where}: {self.what}" if self.where else self.what]
        for label, value in (("expected", self.expected), ("got", self.got), ("fix:", self.fix)):
            if value:
                parts.append(f"{label} {value}")
        return _one_line("; ".join(parts))


_ROW = re.compile(r":\d+$")
"""What `where` says of a row behind its file."""


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _same_elsewhere(others: Sequence[Problem]) -> str:
    """The rows that have the same problem as the one before."""
    rows = [problem.where.rpartition(":")[2] for problem in others]
    if not rows:
        return ""
    return f"; the same at {', '.join(rows[:4])}{f' and {len(rows) - 4} more' if len(rows) > 4 else ''}"


class RlhfRayError(Exception):
    """Base of every error this package raises on purpose. `problems` holds one or more `Problem`s, told all at once."""

    exit_code = 1

    def __init__(self, problems: Problem | Sequence[Problem]) -> None:
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__(self.problems)

    @classmethod
    def at(cls, where: str, what: str, expected: str = "", got: str = "", fix: str = "") -> Self:
        return cls(Problem(where, what, expected, got, fix))

    @classmethod
    def raise_all(cls, problems: Iterable[Problem]) -> None:
        """Raise one error that tells all `problems`; do nothing if there is none."""
        found = tuple(problems)
        if found:
            raise cls(found)

    def lines(self) -> list[str]:
        """What is printed: a line for each problem, one for all rows of a file that have the same."""
        found: dict[Problem | int, list[Problem]] = {}
        for number, problem in enumerate(self.problems):
            file = _ROW.sub("", problem.where)
            key = replace(problem, where=file) if file != problem.where else number
            found.setdefault(key, []).append(problem)
        groups = list(found.values())
        shown = [f"error: {group[0]}{_same_elsewhere(group[1:])}" for group in groups[:SHOWN]]
        if len(groups) > SHOWN:
            shown.append(f"error: and {sum(map(len, groups[SHOWN:]))} more problems")
        return shown

    def __str__(self) -> str:
        return "\n".join(line.removeprefix("error: ") for line in self.lines())


class ConfigError(RlhfRayError, ValueError):
    """The job file alone shows it is wrong (exit 2)."""

    exit_code = 2


class ResourceError(RlhfRayError, RuntimeError):
    """The machine or cluster lacks something the job needs (exit 3)."""

    exit_code = 3


class DataError(RlhfRayError, ValueError):
    """A data file is wrong (exit 4)."""

    exit_code = 4


class ArtifactError(RlhfRayError, RuntimeError):
    """A model, adapter, run or checkpoint that exists is incomplete, damaged or does not match (exit 5)."""

    exit_code = 5


class InvariantError(RlhfRayError, RuntimeError):
    """A training invariant broke: the run stops with the step and the numbers (exit 1, since it is never the user's fault)."""

    exit_code = 1


class Interrupted(RlhfRayError, RuntimeError):
    """Stopped by a signal or a fault after which the run can go on; the fix is the command that resumes it (exit 75)."""

    exit_code = 75


class LimitReached(Interrupted):
    """A limit that the job sets (max_kl and its like) was passed: the last whole step is saved, and the run may be gone on with."""
