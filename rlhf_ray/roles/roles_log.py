"""roles.log of a split run: who sampled and scored each step, where, and with which adapter. Written for people, a line a step:

2026-03-04 10:11:12  generator 1  pid 4711 on 10.0.0.7 (node 3fa9c1), GPU 1, cuda:0, 8 threads, 1 base
2026-03-04 10:11:40  step 7: adapter 6 (9c41d20e)  generator 0: 4 chunks, 5.2 s  scorer 0: 4 chunks, 1.9 s
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HASH_CHARACTERS = 8


@dataclass(frozen=True)
class Done:
    """A chunk that an actor has done. work: its account (`actor_pool.CallStats`)."""

    role: str
    chunk: int
    work: Any

    @property
    def who(self) -> str:
        return f"{self.role} {self.work.index}"


def peaks(done: Iterable[Done]) -> dict[str, float]:
    """`memory/generator_process_peak` and its like: the largest of a role's actors, bytes."""
    found: dict[str, float] = {}
    for item in done:
        for name, value in item.work.memory.items():
            own = name.replace("/", f"/{item.role}_")
            found[own] = max(found.get(own, 0.0), value)
    return found


class RolesLog:
    """Appends to `path`, whatever it holds: it tells what happened, steps that an interrupted run took twice included."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "a", encoding="utf-8", errors="backslashreplace", buffering=1)  # noqa: SIM115 - closed by close()
        self._pids: dict[str, int] = {}

    def start(self, lines: Iterable[str], pids: dict[str, int]) -> None:
        """lines: who is who.  pids: process of each actor, as in `generator 0`."""
        self.lines(lines)
        self._pids |= pids

    def lines(self, lines: Iterable[str]) -> None:
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        self._file.writelines(f"{now}  {line.strip()}\n" for line in lines)

    def step(self, what: str, version: int, sha256: str, done: Iterable[Done], again: int) -> None:
        """what: `step 7`.  version, sha256: the adapter that the rollouts say they were sampled with.  again: chunks done again."""
        of: dict[str, list[Done]] = {}
        for item in sorted(done, key=lambda d: (d.role, d.work.index, d.chunk)):
            of.setdefault(item.who, []).append(item)
        self.lines(self._moved(of))
        parts = [f"{who}: {_chunks(len(d))}, {sum(x.work.seconds for x in d):.2g} s" for who, d in of.items()]
        parts += [f"{_chunks(again)} done again"] if again else []
        parts = parts or ["from the checkpoint"]  # which keeps a rollout that waits for its step, not who sampled it
        self.lines([f"{what}: adapter {version} ({sha256[:HASH_CHARACTERS]})  " + "  ".join(parts)])

    def _moved(self, of: dict[str, list[Done]]) -> list[str]:
        """A line for every actor that is another process than at its last chunk."""
        found = []
        for who, done in of.items():
            work = done[-1].work
            before, self._pids[who] = self._pids.get(who), work.pid
            if before not in (None, work.pid):
                gpus = f"GPU {', '.join(work.gpus)}" if work.gpus else "no GPU"
                found.append(f"{who}  restarted: pid {work.pid} on {work.node}, {gpus}")
        return found

    def close(self) -> None:
        self._file.close()


def _chunks(count: int) -> str:
    return f"{count} chunk{'' if count == 1 else 's'}"
