"""Bytes of a job's processes: what ZeRO does to them, what comes on top of tensors, which GPU they share and which card holds that.

Pure arithmetic on the peaks that plan/meta_tracker.py counts. n: trained parameters.  W: learner workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

GIB = 2**30

Device = Literal["cpu", "cuda"]

PARTS = ("bases", "adapters", "optimizer", "gradients", "activations", "kv cache", "logits", "other")
"""What memory is for. Optimizer: moments and what ZeRO keeps beside them. Other: contexts, libraries, reserves."""

Parts = dict[str, int]
Phases = dict[str, Parts]
"""Phase (load, sampling, scoring, evaluation, update) -> part -> bytes at that phase's peak."""

CUDA_CONTEXT = int(0.6 * GIB)
"""Of each process on a GPU: driver context, loaded kernels, cuBLAS workspace. An allowance, not a measurement."""
CUDA_FRAGMENTS = 0.05
"""Share of activations, logits and key-value cache that torch's CUDA allocator holds beside them. An allowance."""
CPU_BESIDES = 64 * 2**20
"""Of each process on the CPU: tokenizer, rows, engine, thread buffers (measured: 53 to 79 MiB)."""
CPU_IMPORTS = 560 * 2**20
"""Resident after torch, transformers, peft, deepspeed and ray are imported (measured)."""

CARDS = {16: 14.6, 24: 22.0, 40: 39.4, 48: 44.4, 80: 79.1, 141: 139.8}
"""GB a card is sold as -> GiB that a process finds on the smallest of them: T4, A10G, A100-40, L40S, A100-80, H200."""


@dataclass(frozen=True)
class Zero:
    """DeepSpeed's ZeRO as the learner runs it; the last four are DeepSpeed's own defaults, in elements.

    trained: n.  base: weights of the frozen bases.  bucket: gradients reduced together (the learner asks for n at most).
    overlap: two such buckets."""

    stage: int
    workers: int
    trained: int
    base: int
    bucket: int = 500_000_000
    overlap: bool | None = None
    live: int = 1_000_000_000
    prefetch: int = 50_000_000

    @classmethod
    def of(cls, stage: int, workers: int, trained: int, base: int, settings: Mapping[str, object]) -> Zero:
        """settings: `zero_optimization` of the user's DeepSpeed file."""
        zero = cls(stage, workers, trained, base, bucket=min(cls.bucket, trained))
        names = {"bucket": "reduce_bucket_size", "live": "stage3_max_live_parameters"}
        names |= {"prefetch": "stage3_prefetch_bucket_size"}
        given = {ours: int(float(str(settings[name]))) for ours, name in names.items() if name in settings}
        overlap = settings.get("overlap_comm")
        return replace(zero, **given, overlap=overlap if isinstance(overlap, bool) else None)

    def buckets(self, device: Device) -> int:
        """Bytes of the gradient buckets. DeepSpeed makes them whole; memory of the CPU is taken only where it is written."""
        size = min(self.bucket, self.trained) if device == "cpu" else self.bucket
        doubled = self.overlap if self.overlap is not None else False
        return 4 * size * (2 if doubled and self.stage < 3 else 1)

    def applied(self, phases: Phases, device: Device) -> Phases:
        """`phases` of one worker at stage 0, as they are at this stage with these workers.

        0: a flat copy of the gradients where there is somebody to send it to. 1: moments / W, and 4 n / W for a master copy; a
        bucket in updates, and 4 n / W for the step's flat gradient. 2: gradients / W as well. 3: bases and adapters / W as well,
        with up to `live` + `prefetch` base weights gathered meanwhile, and the bucket for good; loading takes the bases whole."""
        return {name: self._phase(name, dict(parts), device) for name, parts in phases.items()}

    def _phase(self, name: str, parts: Parts, device: Device) -> Parts:
        n, w, update = self.trained, self.workers, name == "update"
        gradients = parts.get("gradients", 0)
        if self.stage == 0:
            if update and w > 1:
                parts["gradients"] = gradients + 4 * min(n, 500_000_000)
            return parts
        parts["optimizer"] = (parts.get("optimizer", 0) + 4 * n) // w
        if update:
            kept = gradients if self.stage == 1 else gradients // w
            parts["gradients"] = kept + 4 * n // w + self.buckets(device)
        if self.stage == 3:
            if not update:
                parts["gradients"] = parts.get("gradients", 0) + self.buckets(device)
            whole = parts.get("bases", 0)
            gathered = min(self.live + self.prefetch, self.base) * whole // max(self.base, 1)
            parts["bases"] = whole if name == "load" else whole // w + gathered
            parts["adapters"] = parts.get("adapters", 0) // w
        return parts


@dataclass(frozen=True)
class Process:
    """One of `count` like processes. gpus: how much of a GPU each asks for.  phases: peaks, what comes on top included."""

    role: str
    count: int
    gpus: float
    phases: Phases
    bases: tuple[str, ...] = ()

    @property
    def phase(self) -> str:
        """The one that needs most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def parts(self) -> Parts:
        """Of that phase, in the order of PARTS."""
        found = self.phases[self.phase]
        return {part: found.get(part, 0) for part in PARTS}

    @property
    def total(self) -> int:
        return sum(self.phases[self.phase].values())


def with_overhead(phases: Phases, device: Device) -> Phases:
    """`other`: what tensors do not account for."""
    found = {}
    for name, parts in phases.items():
        moving = sum(parts.get(part, 0) for part in ("activations", "logits", "kv cache"))
        extra = CPU_BESIDES if device == "cpu" else CUDA_CONTEXT + int(CUDA_FRAGMENTS * moving)
        found[name] = {**parts, "other": parts.get("other", 0) + extra}
    return found


@dataclass(frozen=True)
class Gpu:
    """One GPU of a job and who is on it: (role, processes)."""

    on_it: tuple[tuple[str, int], ...]
    total: int


def gpus(processes: Sequence[Process]) -> list[Gpu]:
    """Who shares a GPU with whom, as Ray packs fractions: largest first, into the fullest GPU that has room. Most loaded first."""
    pieces = sorted((p for p in processes for _ in range(p.count) if p.gpus > 0), key=lambda p: -p.gpus)
    packed: list[_Packed] = []
    for piece in pieces:
        room = [g for g in packed if g.left + 1e-6 >= piece.gpus]
        if not room:
            packed.append(room_ := _Packed(max(1.0, piece.gpus)))
            room = [room_]
        min(room, key=lambda g: g.left).add(piece)
    found = [Gpu(tuple((r, g.roles.count(r)) for r in dict.fromkeys(g.roles)), g.total) for g in packed]
    return sorted(found, key=lambda g: -g.total)


@dataclass
class _Packed:
    left: float
    roles: list[str] = field(default_factory=list)
    total: int = 0

    def add(self, piece: Process) -> None:
        self.left -= piece.gpus
        self.roles.append(piece.role)
        self.total += piece.total


def most_on_one(processes: Sequence[Process]) -> int:
    """Bytes on the most loaded GPU; of the largest process where none asks for a GPU."""
    found = gpus(processes)
    return found[0].total if found else max(p.total for p in processes)


def smallest_card(needed: int) -> int | None:
    """The smallest of CARDS that holds `needed` bytes; None if none does."""
    return next((card for card, room in CARDS.items() if needed <= room * GIB), None)
