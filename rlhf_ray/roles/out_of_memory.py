"""Actors that Ray killed because the memory of their node ran out: which process it was, and how many megabytes it had.

Ray says so in the error of a call, but not for an actor that it starts again: of that the caller learns only that it was away
(ActorUnavailableError, Ray 2.60). The worker table of Ray's control service still holds the reason, under the actor's id.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress

from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayError

LESS_MEMORY = "lower rollout_chunk_size or per_device_train_batch_size, or have fewer processes on the node"
TABLE_S = 2.0
"""Longest wait until the worker table knows of a death that the caller knows of."""

_ON_NODE = re.compile(r"was ([\d.]+)GB(?: used)? / ([\d.]+)GB")
_PROCESS = re.compile(r"task name=(\w+)[^()]*?pid=(\d+), actual memory used=([\d.]+)GB")
_ACTOR = re.compile(r"Actor\((\w+)\)")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Ray killed the process because the memory of its node ran out."""
    return isinstance(error, OutOfMemoryError) or "low on memory" in str(error)


def memory_of(text: str) -> str:
    """Of what Ray says: the memory of the node, and of the killed process that had most of it, in MB. Empty if it names neither."""
    found = [f"{_mb(used)} of {_mb(all_)} MB on its node" for used, all_ in _ON_NODE.findall(text)[:1]]
    largest = max(_PROCESS.findall(text), key=lambda process: float(process[2]), default=None)
    if largest is not None:
        found.append(f"{_mb(largest[2])} MB in {largest[0]}, pid {largest[1]}")
    return "; ".join(found)


class LastWords:
    """What Ray says of the memory that ran out under an actor. Each death is told once: the next one may have another cause."""

    def __init__(self) -> None:
        self._told: dict[str, int] = {}

    def of(self, actor_id: str, error: BaseException, wait_s: float = 0.0) -> str:
        """Why the actor was lost with `error`, in Ray's words; empty if it was not its node's memory.

        wait_s: how long to look for it where only the worker table can tell."""
        if is_out_of_memory(error):
            return str(error)
        if not isinstance(error, ActorUnavailableError):
            return ""
        deadline = time.monotonic() + wait_s
        while not (found := self._new(actor_id)) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found

    def _new(self, actor_id: str) -> str:
        moment, said = last_death(actor_id, _deaths())
        if moment <= self._told.get(actor_id, 0):
            return ""
        self._told[actor_id] = moment
        return said


def last_death(actor_id: str, deaths: Iterable[tuple[int, str]]) -> tuple[int, str]:
    """The newest of `deaths` (moment, what Ray says) in which this actor was killed; (0, "") if there is none."""
    return max(((moment, said) for moment, said in deaths if actor_id in _ACTOR.findall(said)), default=(0, ""))


def _deaths() -> Iterator[tuple[int, str]]:
    """Of every worker of this cluster that was killed for memory: milliseconds of its end, what Ray says of it."""
    # Nothing public tells this without Ray's dashboard; where Ray has moved it, no reason is known.
    with suppress(ImportError, AttributeError, RayError):
        from ray._private.state import state
        from ray.core.generated.common_pb2 import NODE_OUT_OF_MEMORY  # type: ignore[attr-defined]
        from ray.core.generated.gcs_pb2 import WorkerTableData  # type: ignore[attr-defined]

        for row in state._connect_and_get_accessor().get_worker_table():
            worker = WorkerTableData.FromString(row)
            if not worker.is_alive and worker.exit_type == NODE_OUT_OF_MEMORY:
                yield worker.end_time_ms, worker.exit_detail


def _mb(gigabytes: str) -> str:
    return f"{float(gigabytes) * 1024:,.0f}"
