"""What a stage knows of where it runs: its rank, its device, its console, and how to meet the other ranks.

A stage sees Ray only through this. Two backends make a `Session`: a worker of a Ray Train group, which has its process group
already, and a plain process, which makes one of world size 1 and keeps it for the life of the process (tearing it down between
two DeepSpeed engines breaks the second).
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_ray.console import Console
from rlhf_ray.runtime.devices import group_backend, own_device
from rlhf_ray.runtime.signals import Stop

if TYPE_CHECKING:
    import torch

PREEMPTION_POLL_S = 5.0


class Preemption:
    """Whether the cluster is about to take a node of this group away. ask: tells, or None; all ranks must call it equally often."""

    def __init__(self, ask: Callable[[], Any] | None = None) -> None:
        self.ask, self.told, self._asked_at = ask, False, time.monotonic()

    def is_due(self) -> bool:
        return self.ask is not None and not self.told and time.monotonic() - self._asked_at > PREEMPTION_POLL_S

    def is_near(self) -> bool:
        """True once: the first time that the cluster says so."""
        self._asked_at = time.monotonic()
        self.told = self.ask is not None and self.ask() is not None
        return self.told


@dataclass(frozen=True)
class Session:
    """rank, world_size: place in the learner group.  device: where this rank computes.  num_threads: torch's CPU threads.

    pools: handles of the generator and scorer actors (roles/actor_pool.py), None where every rank plays all roles.
    where: process, node and GPU of a Ray worker, for people.  stop: who asked this run to end.  attempt: starts of the learner
    group before this one, because a process or node was lost.
    seat: among the runs that share this process and its base (`Seat` in roles/turns.py), None for a run that has both to itself."""

    rank: int
    world_size: int
    device: torch.device
    num_threads: int
    console: Console
    actor_handles: Any = None
    where: str = ""
    stop: Stop = field(default_factory=Stop)
    attempt: int = 0
    preemption: Preemption = field(default_factory=Preemption)
    seat: Any = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        import torch.distributed as dist

        if self.world_size > 1:
            dist.barrier()

    def gather(self, mine: Any) -> list[Any]:
        """Every rank's object, in rank order, on every rank. Tensors in it must be on the CPU."""
        import torch.distributed as dist

        if self.world_size == 1:
            return [mine]
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, mine, group=cpu_group())
        return everyone

    def from_main(self, value: Any) -> Any:
        """Rank 0's object on every rank."""
        return self.gather(value if self.is_main else None)[0]

    def on_main(self, work: Callable[[], Any]) -> Any:
        """What `work` returns on rank 0, on every rank; and what it raises there, so that nobody waits for a rank that has left."""
        if self.world_size == 1:
            return work()
        found: tuple[Any, Exception | None] = None, None
        if self.is_main:
            try:
                found = work(), None
            except Exception as error:
                found = None, error
        value, failed = self.from_main(found)
        if failed is not None:
            raise failed
        return value

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over ranks, in float64."""
        import torch
        import torch.distributed as dist

        if self.world_size == 1:
            return [float(v) for v in values]
        total = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(total, group=cpu_group())
        return [float(v) for v in total]

    def must_stop(self) -> str:
        """What asked the run to end, the same answer on every rank; empty if nothing did. Every rank calls it."""
        reason = self.stop.asked()
        if self.highest(int(bool(reason))) == 0:
            return ""
        return next(filter(None, self.gather(reason)))

    def is_preempted(self) -> bool:
        """True once, on all ranks: a node of the group goes soon, so what there is should be saved now. Every rank calls it."""
        if self.preemption.ask is None:
            return False
        return bool(self.highest(int(self.is_main and self.preemption.is_due()))) and self.preemption.is_near()

    def highest(self, value: int) -> int:
        """The largest of all ranks' numbers."""
        import torch
        import torch.distributed as dist

        if self.world_size == 1:
            return value
        found = torch.tensor(value)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=cpu_group())
        return int(found)


_groups: dict[str, Any] = {}


def cpu_group() -> Any:
    """The group for CPU objects: the default one under gloo, a second one beside NCCL."""
    import torch.distributed as dist

    if dist.get_backend() == "gloo":
        return dist.group.WORLD
    if "cpu" not in _groups:
        _groups["cpu"] = dist.new_group(backend="gloo")
    return _groups["cpu"]


def enter(folder: str) -> None:
    """Go to the driver's working folder, so that relative paths of a job mean the same in every process. A submitted job has its
    node's own copy of that folder, where Ray has put this process already; nodes may keep it under other paths."""
    if not os.path.isdir(folder):
        import ray

        if ray.get_runtime_context().runtime_env.get("working_dir"):
            return
    os.chdir(folder)


CPU_LIMITS = ("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")
"""Files of a control group, second and first version, that hold microseconds of CPU time and in how many they may be used."""


def usable_cores(control_group: str = "/sys/fs/cgroup") -> int:
    """Cores that this process may run on, and no more than the CPU time that its container has comes to (docker's --cpus, limits of
    a pod), whole ones, as Ray counts them: more threads would only wait for each other."""
    cores = len(os.sched_getaffinity(0))
    for files in CPU_LIMITS:
        try:
            time, period = " ".join(Path(control_group, file).read_text() for file in files).split()
            return max(min(cores, int(time) // int(period)), 1) if int(time) > 0 else cores
        except (OSError, ValueError):  # no such group, or `max`: no limit
            continue
    return cores


def process_session(
    console: Console, num_threads: int | None = None, stop: Stop | None = None, seat: Any = None
) -> Session:
    """A session of world size 1 in this very process."""
    import torch.distributed as dist

    device = own_device()
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(
            name, value
        )  # DeepSpeed asks for them, also where somebody else (vLLM) has made the group
    if not dist.is_initialized():
        dist.init_process_group(group_backend(device), store=dist.HashStore(), rank=0, world_size=1)
    return _prepared(Session(0, 1, device, num_threads or usable_cores(), console, stop=stop or Stop(), seat=seat))


def worker_session(console: Console, num_threads: int | None, actor_handles: Any, stop: Stop, attempt: int) -> Session:
    """The session of the Ray Train worker that calls this."""
    import ray.train

    context = ray.train.get_context()
    device = own_device()
    threads = num_threads or max(usable_cores() // context.get_local_world_size(), 1)
    gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU") or ()
    on = f"GPU {', '.join(gpus)}" if gpus else "no GPU"
    node = f"{ray.util.get_node_ip_address()} (node {ray.get_runtime_context().get_node_id()[:6]})"
    where = f"pid {os.getpid()} on {node}, {on}"
    preemption = Preemption(ray.train.get_preemption_info)
    rank, world = context.get_world_rank(), context.get_world_size()
    return _prepared(Session(rank, world, device, threads, console, actor_handles, where, stop, attempt, preemption))


def _prepared(session: Session) -> Session:
    """Ray gives a worker of one CPU a single thread, so every session sets its own number. It also writes cuda:0 as accelerate's
    device where GPUs are only declared."""
    import torch

    os.environ["ACCELERATE_TORCH_DEVICE"] = str(session.device)
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if session.device.type == "cuda" else "cpu")
    torch.set_num_threads(session.num_threads)
    return session


def peak_memory(device: torch.device) -> dict[str, float]:
    """Bytes of this process and of its GPU, under the names of metrics.py."""
    import resource

    import torch

    unit = 1 if sys.platform == "darwin" else 1024
    found = {"memory/process_peak": float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)}
    if device.type == "cuda":
        found["memory/device_peak"] = float(torch.cuda.max_memory_allocated(device))
    return found


def seed_everything(seed: int) -> None:
    """Seed the generators that libraries use for initialisation; sampling and schedules have counter-based randomness."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextlib.contextmanager
def kept_generators() -> Iterator[None]:
    """The global generators of Python, NumPy and torch (CPU) are afterwards as they were before."""
    import numpy
    import torch

    before = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        numpy.random.set_state(before[1])
        torch.set_rng_state(before[2])


_seeded = threading.RLock()


@contextlib.contextmanager
def global_generators(seed: int) -> Iterator[None]:
    """Code that we do not know finds the global generators of Python, NumPy and torch (CPU) seeded with `seed`; they are afterwards
    as they were before. One thread at a time."""
    import numpy
    import torch

    with _seeded, kept_generators():
        random.seed(seed)
        numpy.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        yield
