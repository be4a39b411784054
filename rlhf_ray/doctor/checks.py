"""What the doctor finds: one line each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rlhf_ray.plan.memory import GIB

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class CheckResult:
    """about: this machine, the cluster, or the job.   name: what was looked at.   said: what was found.   fix: how to mend it."""

    about: str
    name: str
    status: Status
    said: str
    fix: str = ""

    def __str__(self) -> str:
        fix = f"; fix: {self.fix}" if self.fix and self.status != "ok" else ""
        return " ".join(f"{self.said}{fix}".split())


def text(findings: Sequence[CheckResult]) -> str:
    """All findings, under what they are about."""
    lines: list[str] = []
    width = max((len(f.name) for f in findings), default=0)
    for about in dict.fromkeys(f.about for f in findings):
        lines.append(about)
        lines += [f"  {f.status:<4}  {f.name:<{width}}  {f}" for f in findings if f.about == about]
    counts = {status: sum(f.status == status for f in findings) for status in ("ok", "warn", "fail")}
    lines.append(", ".join(f"{count} {status}" for status, count in counts.items()))
    return "\n".join(lines)


def to_json(findings: Sequence[CheckResult]) -> dict[str, Any]:
    """For --json."""
    return {"healthy": not any(f.status == "fail" for f in findings), "findings": [asdict(f) for f in findings]}


def gib(size: float | None) -> str:
    return "unknown" if size is None else f"{size / GIB:.1f} GiB"


def room(about: str, name: str, free: float | None, least: float, enough: float, fix: str) -> CheckResult:
    """Free bytes: fail below `least`, warn below `enough`."""
    if free is None:
        return CheckResult(about, name, "warn", "unknown")
    status: Status = "fail" if free < least else "warn" if free < enough else "ok"
    return CheckResult(about, name, status, f"{gib(free)} free", fix)
