"""What a job will take: memory of every process and GPU, what fits which card, and whether it can be placed here.

Nothing is loaded: the job's own code runs on models that have shapes and no weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf_ray.config import JobFields, PipelineConfig, PPOConfig
from rlhf_ray.errors import ResourceError
from rlhf_ray.launch.launch import placement_of
from rlhf_ray.launch.model_families import check_models
from rlhf_ray.plan.advice import Option, as_written, options, recommendation, warnings
from rlhf_ray.plan.estimate import Estimator, with_stages
from rlhf_ray.plan.memory import CARDS, CPU_IMPORTS, GIB, PARTS, Device, Process, gpus
from rlhf_ray.runtime.devices import free_memory


@dataclass(frozen=True)
class StagePlan:
    """One stage. tokens: of the widest prompt and reply, None for supervised stages."""

    stage: str
    about: str
    processes: list[Process]
    written: Option
    options: list[Option]
    advice: str
    warnings: list[str]


@dataclass(frozen=True)
class Plan:
    """A job's plan. placement: what the job's own check says of this machine or cluster; placed: whether it fits.
    room: bytes of one GPU (or of memory, on the CPU) that there are, None where unknown."""

    device: Device
    stages: list[StagePlan]
    placement: str
    placed: bool
    room: int | None = None
    here: str = ""
    fits: bool = field(init=False, default=True)

    def __post_init__(self) -> None:
        if self.room is not None:
            needed = max(self.needed(stage) for stage in self.stages)
            object.__setattr__(self, "fits", needed <= self.room)

    def needed(self, stage: StagePlan) -> int:
        """Bytes of the fullest GPU; on the CPU of all processes together, libraries included."""
        if self.device == "cuda":
            return stage.written.fullest
        return sum(p.count * (p.total + CPU_IMPORTS) for p in stage.processes)

    def to_json(self) -> dict[str, Any]:
        """For --json. Sizes in bytes."""
        return {
            "device": self.device,
            "fits": self.fits,
            "room_bytes": self.room,
            "placement": {"fits": self.placed, "detail": self.placement},
            "cards_gib": {str(card): room for card, room in CARDS.items()},
            "stages": [_stage_json(stage, self) for stage in self.stages],
        }


def _stage_json(stage: StagePlan, plan: Plan) -> dict[str, Any]:
    return {
        "stage": stage.stage,
        "needed_bytes": plan.needed(stage),
        "processes": [
            {
                "role": p.role,
                "count": p.count,
                "gpus": p.gpus,
                "bases": list(p.bases),
                "peak_bytes": p.total,
                "peak_phase": p.phase,
                "parts": p.parts,
                "phases": {name: sum(parts.values()) for name, parts in p.phases.items()},
            }
            for p in stage.processes
        ],
        "options": [
            {
                "name": o.name,
                "settings": o.settings,
                "peaks": o.peaks,
                "fullest_gpu_bytes": o.fullest,
                "gpus": o.gpus,
                "card_gb": o.card,
            }
            for o in ([stage.written, *stage.options] if plan.device == "cuda" else ())
        ],
        "recommendation": stage.advice,
        "warnings": stage.warnings,
    }


def plan(
    job: JobFields,
    device: Literal["auto", "cuda", "cpu"] = "auto",
    gpu_gib: float | None = None,
    prompt_tokens: int | None = None,
) -> Plan:
    """Estimate every stage of `job`. gpu_gib: memory of the GPUs to fit; default: of those here, if there are any.

    Raises ConfigError if a model's config.json cannot be had or is of a kind that does not work here, ArtifactError if it cannot
    be read."""
    untried = check_models(job)
    chosen = _device(job) if device == "auto" else device
    estimator = Estimator(chosen, prompt=prompt_tokens)
    if isinstance(job, PipelineConfig):
        estimator = with_stages(job, estimator)
    gib, here = room_here(chosen) if gpu_gib is None else (gpu_gib, f"GPUs of {gpu_gib:g} GiB")
    stages = [_stage(name, config, estimator, gib) for name, config in estimator.stages(job)]
    stages[0].warnings[:0] = untried
    placed, where = _placement(job)
    return Plan(chosen, stages, where, placed, None if gib is None else int(gib * GIB), here)


def _stage(name: str, job: JobFields, estimator: Estimator, gib: float | None) -> StagePlan:
    processes = estimator.processes(job)
    on_gpu = estimator.device == "cuda"
    others = list(options(job, estimator)) if on_gpu and isinstance(job, PPOConfig) else []
    advice = recommendation(job, estimator, gib) if on_gpu else _cpu_advice(processes, gib)
    told = [*estimator.notes(job), *warnings(job, processes, estimator)]
    return StagePlan(name, estimator.about(job), processes, as_written(job, estimator), others, advice, told)


def _cpu_advice(processes: list[Process], gib: float | None) -> str:
    needed = sum(p.count * (p.total + CPU_IMPORTS) for p in processes) / GIB
    told = f"{needed:.1f} GiB of memory for all processes, {CPU_IMPORTS / GIB:.2f} each of them for libraries"
    if gib is None or needed <= gib:
        return told if gib is None else f"run it as it is: {told}; {gib:.1f} are free"
    return f"it does not fit: {told}; {gib:.1f} are free: lower per_device_train_batch_size or rollout_chunk_size"


def _device(job: JobFields) -> Device:
    """A GPU, unless the job says that it has none, or runs in this process on a machine without one."""
    if job.learner.num_gpus is not None:
        return "cuda" if job.learner.num_gpus > 0 else "cpu"
    import torch

    return "cpu" if job.learner.num_workers == 0 and not torch.cuda.is_available() else "cuda"


def room_here(device: Device) -> tuple[float | None, str]:
    """GiB of the smallest GPU here, or of free memory (in a container of what its limit leaves), and that in words."""
    import torch

    if device == "cuda":
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        if not found:
            return None, "no GPU here"
        least = min(found, key=lambda p: p.total_memory)
        return least.total_memory / GIB, f"{len(found)} x {least.name}, {least.total_memory / GIB:.1f} GiB"
    free = free_memory() / GIB
    return free, f"{free:.1f} GiB of memory free"


def _placement(job: JobFields) -> tuple[bool, str]:
    try:
        found = placement_of(job)
    except ResourceError as error:
        return False, "; ".join(f"{p.where}: {p.what}" for p in error.problems)
    if not found:
        return True, "runs in this process, without Ray"
    return True, "; ".join(f"{role} on {', '.join(dict.fromkeys(nodes))}" for role, nodes in found.items())


def text(found: Plan) -> str:
    """The plan as a person reads it."""
    lines: list[str] = []
    for stage in found.stages:
        lines += [f"{stage.stage}: {stage.about}", *_process_table(stage.processes)]
        if found.device == "cuda":
            lines += _gpu_lines(stage), "", *_card_table(stage)
        lines += ["", *(f"note: {w}" for w in stage.warnings), f"recommended: {stage.advice}", ""]
    verdict = "can be placed" if found.placed else "cannot be placed"
    lines.append(f"placement here ({found.here or 'unknown memory'}): {verdict}: {found.placement}")
    return "\n".join(lines)


def _process_table(processes: list[Process]) -> list[str]:
    used = [part for part in PARTS if any(p.parts[part] for p in processes)]
    rows = [["GiB per process", *used, "peak", "at"]]
    for p in processes:
        sizes = [f"{p.parts[part] / GIB:.2f}" for part in used]
        rows.append([f"{p.count} x {p.role}", *sizes, f"{p.total / GIB:.2f}", p.phase])
    return _aligned(rows)


def _gpu_lines(stage: StagePlan) -> str:
    shown = []
    for gpu in gpus(stage.processes):
        who = " + ".join(role if count == 1 else f"{count} {role}s" for role, count in gpu.on_it)
        shown.append(f"{who} {gpu.total / GIB:.1f}")
    same = {line: shown.count(line) for line in shown}
    return "GiB per GPU: " + "; ".join(line if n == 1 else f"{n} x ({line})" for line, n in same.items())


def _card_table(stage: StagePlan) -> list[str]:
    rows = [["what fits a card of", "GPUs", "GiB", *(f"{card} GB" for card in CARDS)]]
    for option in (stage.written, *stage.options):
        marks = ["yes" if option.fullest <= room * GIB else "-" for room in CARDS.values()]
        rows.append([option.name, str(option.gpus), f"{option.fullest / GIB:.1f}", *marks])
    return _aligned(rows)


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip()
        for row in rows
    ]
