"""Generators and scorers as Ray actors. Nothing else in the project makes an actor of a role, or knows that a role is one.

An actor builds its role at the first call, and again after a restart; a role without state gives the same answer whoever runs it.
Work number n goes first to actor n mod count. Where an actor dies, or hangs, its work goes to another one, and to itself once Ray
has restarted it; attempts and restarts are bounded, and every wait has an end that names the role and what it was doing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import (
    ActorDiedError,
    GetTimeoutError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlhf_ray.errors import Interrupted, RlhfRayError
from rlhf_ray.roles.out_of_memory import LESS_MEMORY, TABLE_S, LastWords, memory_of
from rlhf_ray.runtime.devices import LESS_GPU_MEMORY, first_sentence, free_cached_memory, gpu_memory_ran_out, own_device
from rlhf_ray.runtime.fault_injection import fault_point
from rlhf_ray.runtime.imports import begin_imports
from rlhf_ray.runtime.session import enter, peak_memory

if TYPE_CHECKING:
    import torch

ATTEMPTS = 3
"""Tries of one piece of work, over all actors."""
MAX_RESTARTS = 4
"""Restarts of one actor in a run."""
RESTART_S = 120.0
"""Longest wait for Ray to restart an actor, before its models are loaded."""
PAUSE_S = 0.2
"""Between two looks whether one is back."""

LOST = (RayActorError, ObjectLostError, WorkerCrashedError, OutOfMemoryError, GetTimeoutError)
"""What Ray raises where a process or node is gone, as against an error of the code that it ran."""


@dataclass(frozen=True)
class CallStats:
    """One call, as the actor saw it. node, gpus: where it is, as Ray says.  seconds: of work, building aside.  built: seconds of
    building the role, 0 if it was there.  memory: the largest so far, bytes, as `session.peak_memory` names it."""

    index: int
    pid: int
    node: str
    gpus: tuple[str, ...]
    seconds: float
    built: float
    memory: dict[str, float] = field(default_factory=dict)


class RoleActor:
    """The actor: any plain class, built when it is first needed. index: within its role.  imports: a function whose module it
    takes a while to import, begun at once."""

    def __init__(
        self, index: int, build: Callable[[], Any], num_threads: int, folder: str, imports: str | None = None
    ) -> None:
        import torch

        enter(folder)
        if imports is not None:
            begin_imports(imports)
        torch.set_num_threads(num_threads)  # Ray gives a process of one CPU one thread
        self.index, self.build, self.device = index, build, own_device()
        self.role: Any = None
        context = ray.get_runtime_context()
        self.gpus = tuple(str(i) for i in context.get_accelerator_ids().get("GPU", ()))
        self.node = f"{ray.util.get_node_ip_address()} (node {context.get_node_id()[:6]})"

    def call(self, method: str, *args: Any) -> tuple[Any, CallStats]:
        """(what `method` of the role returns, the account of it)."""
        built = 0.0
        if self.role is None:
            started = time.perf_counter()
            self.role = self.build()
            built = time.perf_counter() - started
        fault_point("actor", method, rank=self.index)
        started = time.perf_counter()
        result = getattr(self.role, method)(*args)
        account = self._account(time.perf_counter() - started, built)
        free_cached_memory(self.device)  # for the role beside it, which may work while this one waits
        return result, account

    def _account(self, seconds: float, built: float) -> CallStats:
        return CallStats(self.index, os.getpid(), self.node, self.gpus, seconds, built, peak_memory(self.device))

    def ping(self) -> int:
        return os.getpid()


class AdapterRefStore:
    """Where rank 0 leaves the reference of the adapter for the other ranks: Ray counts references that pass through an actor, and
    loses count of those that pass through a torch process group."""

    def __init__(self) -> None:
        self.held: tuple[int, list[Any]] = (-1, [])

    def post(self, version: int, reference: list[Any]) -> None:
        self.held = version, reference

    def fetch(self, version: int) -> list[Any]:
        if self.held[0] != version:
            raise LookupError(f"the store holds adapter version {self.held[0]}, not {version}")
        return self.held[1]


@dataclass(frozen=True)
class ActorHandles:
    """Handles of a run's actors; the driver owns them, every learner rank uses them. timeouts: seconds, by role.
    resume: the command that goes on with the run, for errors."""

    actors: dict[str, tuple[Any, ...]]
    ref_store: Any
    timeouts: dict[str, float]
    resume: str


@dataclass(frozen=True)
class ActorSpec:
    """How the actors of one role are started. bundles: theirs in the placement group.  imports: see `RoleActor`."""

    role: str
    build: Callable[[], Any]
    resources: dict[str, float]
    num_threads: int
    bundles: Sequence[int]
    timeout_s: float
    imports: str | None = None


def start(specs: Sequence[ActorSpec], group: Any, with_ref_store: bool, resume: str) -> ActorHandles:
    """Start all actors in placement group `group`, which must be there. with_ref_store: the learner group has several ranks."""
    actors: dict[str, tuple[Any, ...]] = {}
    for spec in specs:
        options: dict[str, Any] = {
            "num_cpus": spec.resources.get("CPU", 0),
            "num_gpus": spec.resources.get("GPU", 0),
            "max_restarts": MAX_RESTARTS,
            "max_task_retries": 0,
            "max_concurrency": 1,
        }
        actors[spec.role] = tuple(
            ray.remote(RoleActor)
            .options(**options, scheduling_strategy=PlacementGroupSchedulingStrategy(group, bundle))
            .remote(index, spec.build, spec.num_threads, os.getcwd(), spec.imports)
            for index, bundle in enumerate(spec.bundles)
        )
    ref_store = ray.remote(AdapterRefStore).options(num_cpus=0).remote() if with_ref_store else None
    return ActorHandles(actors, ref_store, {s.role: s.timeout_s for s in specs}, resume)


def stop(actor_handles: ActorHandles) -> None:
    """End all actors, at once."""
    for handle in [h for handles in actor_handles.actors.values() for h in handles] + [actor_handles.ref_store]:
        if handle is not None:
            ray.kill(handle, no_restart=True)


@dataclass
class PendingCall:
    """Work in flight on actor `index`. result, work: references."""

    index: int
    result: Any
    work: Any


class ActorPool:
    """One learner rank's view of the actors of one role. warn: called with a line about every fault.  tell: about every return."""

    def __init__(
        self, role: str, actor_handles: ActorHandles, tell: Callable[[str], None], warn: Callable[[str], None]
    ) -> None:
        self.role, self.handles, self.tell, self.warn = role, actor_handles.actors[role], tell, warn
        self.timeout_s, self.resume = actor_handles.timeouts[role], actor_handles.resume
        self._away: dict[int, Any] = {}  # actors that died, each with a ping that waits for its restart
        self._gone: dict[int, str] = {}  # actors that will not come back, with the reason
        self._last_words = LastWords()

    def __len__(self) -> int:
        return len(self.handles)

    def submit(self, number: int, method: str, *args: Any) -> PendingCall:
        """Have one actor do it, number mod count first. A reference among `args` is resolved for the actor."""
        index = self._choose(number)
        result, work = self.handles[index].call.options(num_returns=2).remote(method, *args)
        return PendingCall(index, result, work)

    def ask_all(self, method: str) -> list[PendingCall]:
        """Ask every actor at once. One that dies over it is asked again, as often as it is started again."""
        refs = [h.call.options(num_returns=2, max_task_retries=-1).remote(method) for h in self.handles]
        return [PendingCall(index, *pair) for index, pair in enumerate(refs)]

    def answers(self, calls: Sequence[PendingCall], doing: str) -> list[tuple[Any, CallStats]]:
        """What they answer to `ask_all`; see `result`. An actor that hangs, perhaps since before this rank was started, is ended
        and asked again."""
        _, silent = ray.wait([call.work for call in calls], num_returns=len(calls), timeout=self.timeout_s)
        for call in calls:
            if call.work in silent:
                self.end(call.index, doing)
        return [self.result(call, doing) for call in calls]

    def result(self, call: PendingCall, doing: str) -> tuple[Any, CallStats]:
        """Wait for a call. Raises what the role raised; Interrupted if the actor is gone or silent."""
        try:
            return tuple(ray.get([call.result, call.work], timeout=self.timeout_s))  # type: ignore[return-value]
        except GetTimeoutError as error:
            raise self.failed(call.index, f"no answer within {self.timeout_s:g} s", doing) from error
        except LOST as error:
            raise self.failed(call.index, _reason(error), doing) from error
        except RayTaskError as error:
            raise self.raised(call.index, error, doing) from error

    def lost(self, index: int) -> None:
        """Take note that an actor died: it gets no work until it answers again."""
        if index in self._away or index in self._gone:
            return
        self._away[index] = self._ping(index)

    def end(self, index: int, doing: str) -> None:
        """Kill an actor that does not answer; Ray restarts it, and its work fails as if it had died."""
        self.warn(f"{self.role} {index}: no answer within {self.timeout_s:g} s while {doing}; it is restarted")
        ray.kill(self.handles[index], no_restart=False)

    def failed(self, index: int, what: str, doing: str, advice: str = "") -> Interrupted:
        fix = f"{advice}; then: {self.resume}" if advice else self.resume
        return Interrupted.at(f"{self.role} {index}", f"{what}, while {doing}", fix=fix)

    def raised(self, index: int, error: RayTaskError, doing: str) -> BaseException:
        """The exception that the role raised, as it was raised: its type and errno say what it is; Interrupted if it was for want
        of memory on its GPU, since the same work needs less of it under other settings."""
        cause = error.cause
        if gpu_memory_ran_out(cause):
            return self.failed(index, first_sentence(cause), doing, LESS_GPU_MEMORY)
        if not isinstance(cause, Exception) or isinstance(
            cause, RayError
        ):  # Ray's own, or in place of one that cannot be sent
            return error
        if not isinstance(cause, RlhfRayError):
            cause.add_note(f"in {self.role} {index}, while {doing}")
        return cause

    def exhausted(self, index: int, error: BaseException, doing: str) -> Interrupted:
        """The error for work that was lost in every attempt."""
        if said := self._last_words.of(self._id(index), error, TABLE_S):
            memory = memory_of(said) or _reason(error)
            return self.failed(index, f"out of memory in {ATTEMPTS} attempts ({memory})", doing, LESS_MEMORY)
        return self.failed(index, f"lost in {ATTEMPTS} attempts ({type(error).__name__})", doing)

    def kind(self, index: int, error: BaseException) -> str:
        """In a word, why actor `index` was lost."""
        return "out of memory" if self._last_words.of(self._id(index), error) else type(error).__name__

    def _id(self, index: int) -> str:
        return str(self.handles[index]._actor_id.hex())

    def _choose(self, number: int) -> int:
        """The first actor from number mod count on that is up; if none is, the first one that comes back."""
        deadline = time.monotonic() + RESTART_S
        while True:
            for offset in range(len(self)):
                index = (number + offset) % len(self)
                if self._is_up(index):
                    return index
            if len(self._gone) == len(self) or time.monotonic() > deadline:
                index = next(iter(self._gone), number % len(self))
                why = self._gone.get(index, f"not back within {RESTART_S:g} s")
                raise self.failed(index, f"no {self.role} is left: {why}", "waiting for a restart")
            ray.wait(list(self._away.values()), timeout=1.0)
            time.sleep(PAUSE_S)

    def _is_up(self, index: int) -> bool:
        if index in self._gone:
            return False
        if index not in self._away:
            return True
        ready, _ = ray.wait([self._away[index]], timeout=0)
        if not ready:
            return False
        try:
            pid = ray.get(ready[0])
        except ActorDiedError as error:
            del self._away[index]
            self._gone[index] = _reason(error)
            self.warn(f"{self.role} {index}: will not be restarted again ({self._gone[index]})")
            return False
        except LOST:
            self._away[index] = self._ping(index)
            return False
        del self._away[index]
        self.tell(f"{self.role} {index}: is back, pid {pid}")
        return True

    def _ping(self, index: int) -> Any:
        # Without retries of Ray's, which it tells the user of in many words; until the actor is there again, pings fail at once.
        return self.handles[index].ping.remote()


def put_adapter(tensors: dict[str, torch.Tensor]) -> tuple[Any, int]:
    """Put an adapter into the object store, once: its reference, and the bytes of its tensors. Arrays are read there without a
    copy by every process of a node."""
    arrays = {key: tensor.numpy() for key, tensor in tensors.items()}
    return ray.put(arrays), sum(a.nbytes for a in arrays.values())


def ask_ref_store(ref_store: Any, method: str, *args: Any) -> Any:
    try:
        return ray.get(getattr(ref_store, method).remote(*args), timeout=RESTART_S)
    except LOST as error:
        raise Interrupted.at("adapter store", f"{_reason(error)}, while {method}ing the adapter") from error


def _reason(error: BaseException) -> str:
    """One line of what Ray says of a death."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
