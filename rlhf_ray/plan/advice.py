"""What fits which card, and the smallest change to a job that fits a smaller one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rlhf_ray.config import EvaluateConfig, JobFields, PPOConfig
from rlhf_ray.console import counted
from rlhf_ray.plan.estimate import Estimator, changed
from rlhf_ray.plan.memory import CARDS, GIB, Process, gpus, most_on_one, smallest_card
from rlhf_ray.sampler.engine import MOST_ROWS

MOST_CHANGES = 12
LEAST_CHUNK = 16
REACH = 0.9
"""Share of what passes hold that smaller passes can save."""


@dataclass(frozen=True)
class Option:
    """One way to place the job. name: in words.  settings: what to set for it.  peaks: role -> bytes of one process.
    fullest: bytes on the most loaded GPU.  gpus: GPUs in all."""

    name: str
    settings: str
    peaks: dict[str, int]
    fullest: int
    gpus: int

    @property
    def card(self) -> int | None:
        return smallest_card(self.fullest)


def as_written(job: JobFields, estimator: Estimator) -> Option:
    return option("as written", "", estimator.processes(job))


def options(job: PPOConfig, estimator: Estimator) -> Iterator[Option]:
    """Both placements at every ZeRO stage that the job can have, roles on whole GPUs; two learner workers where they share."""
    for placement in ("colocate", "split"):
        for stage in range(4):
            workers = max(job.learner.num_workers, 2 if stage else 1)
            fields: dict[str, Any] = {"placement": placement, "learner__zero_stage": stage}
            fields |= {"learner__num_workers": workers, "learner__num_gpus": 1}
            if placement == "split":
                fields |= {"generator__num_gpus": 1, "scorer__num_gpus": 1}
            else:
                fields["max_staleness"] = 0
            try:
                other = changed(job, **fields)
            except ValueError:  # a stage that this optimizer or this base cannot have
                continue
            name = f"{placement}, ZeRO {stage}, {counted(workers, 'learner')}"
            yield option(name, _settings(fields), estimator.processes(other))


def option(name: str, settings: str, processes: list[Process]) -> Option:
    """What these processes take, as one way among others."""
    peaks = {p.role: p.total for p in processes}
    return Option(name, settings, peaks, most_on_one(processes), len(gpus(processes)))


def _settings(fields: dict[str, Any]) -> str:
    def shown(value: Any) -> str:
        return str(value).lower() if isinstance(value, bool) else str(value)

    return " ".join(f"{name.replace('__', '.')}={shown(value)}" for name, value in fields.items())


@dataclass(frozen=True)
class SuggestedChange:
    """Settings under which the job fits, and the bytes on its fullest GPU then."""

    settings: str
    fullest: int


def smallest_change(job: JobFields, estimator: Estimator, room: int) -> SuggestedChange | None:
    """The first change that fits `room` bytes per GPU, the mildest tried first: recomputed activations, smaller passes, fewer
    replies at once, a GPU for each role, quantised bases. None if none does."""
    made: dict[str, Any] = {}
    for _ in range(MOST_CHANGES):
        processes = estimator.processes(job)
        if most_on_one(processes) <= room:
            return SuggestedChange(_settings(made), most_on_one(processes))
        step = _next(job, processes, room)
        if step is None:
            return None
        job, made = changed(job, **step), made | step
    return None


def _next(job: JobFields, processes: list[Process], room: int) -> dict[str, Any] | None:
    """The next thing to change: passes, as long as what they hold is more than what is too much; else the bases."""
    shared = gpus(processes)
    roles = [role for role, count in shared[0].on_it for _ in range(count)] if shared else [processes[0].role]
    crowd = [p for role in roles for p in processes if p.role == role]
    excess = sum(p.total for p in crowd) - room
    if excess < REACH * sum(map(_movable, crowd)):
        for process in sorted(crowd, key=_movable, reverse=True):
            mild = _smaller_passes(job, process)
            if mild is not None:
                return mild
    return _fewer_bytes(job, shares_gpu=len(crowd) > 1)


def _movable(process: Process) -> int:
    """Bytes beyond those that loading takes."""
    return process.total - sum(process.phases["load"].values())


def _smaller_passes(job: JobFields, worst: Process) -> dict[str, Any] | None:
    """Less at a time, in the phase that needs most."""
    if worst.phase == "update" and job.gradient_checkpointing is False:
        return {"gradient_checkpointing": True}
    if worst.phase == "sampling":
        name, least = "rollout_chunk_size", LEAST_CHUNK
    elif isinstance(job, EvaluateConfig) or (worst.phase == "evaluation" and not isinstance(job, PPOConfig)):
        name, least = "per_device_eval_batch_size", 1
    elif isinstance(job, PPOConfig) and job.tokens_per_microbatch is not None:
        name, least = "tokens_per_microbatch", 1
    else:
        name, least = "per_device_train_batch_size", 1
    size = int(getattr(job, name))
    return {name: max(size // 2, least)} if size > least else None


def _fewer_bytes(job: JobFields, shares_gpu: bool) -> dict[str, Any] | None:
    """Fewer or smaller bases on a GPU."""
    if isinstance(job, PPOConfig) and shares_gpu:
        return {"generator__num_gpus": 1, "scorer__num_gpus": 1}
    if (
        isinstance(job, PPOConfig) and job.rollout.engine == "vllm"
    ):  # it has a base of its own, and that is not quantised
        return {"rollout__engine": "builtin"}
    zero = job.learner.zero_stage
    if not (job.load_in_8bit or job.load_in_4bit) and zero < 3:
        return {"load_in_8bit": True}
    if job.load_in_8bit:
        return {"load_in_8bit": False, "load_in_4bit": True}
    return None


def recommendation(job: JobFields, estimator: Estimator, card: float | None) -> str:
    """One sentence. card: GiB of the GPUs there are (None: whichever fits)."""
    written = as_written(job, estimator)
    needs = f"{written.fullest / GIB:.1f} GiB"
    if card is not None:
        if written.fullest <= card * GIB:
            return f"run it as it is: its fullest GPU needs {needs} of {card:g}{more_rows(job, estimator, card)}"
        change = smallest_change(job, estimator, int(card * GIB))
        if change is None:
            return f"it does not fit {card:g} GiB ({needs}), and no smaller setting does: take larger GPUs or a smaller base"
        return f"set {change.settings}: {change.fullest / GIB:.1f} GiB in place of {needs}, which {card:g} do not hold"
    if written.card is None:
        change = smallest_change(job, estimator, int(max(CARDS.values()) * GIB))
        way = f"set {change.settings}: {change.fullest / GIB:.1f} GiB" if change else "take a smaller base"
        return f"no single card holds it ({needs} on its fullest GPU): {way}"
    sentence = f"GPUs of {written.card} GB, the smallest that hold the job as it is ({needs} of {CARDS[written.card]})"
    smaller = max((c for c in CARDS if c < written.card), default=None)
    change = smallest_change(job, estimator, int(CARDS[smaller] * GIB)) if smaller is not None else None
    if change is None:
        return sentence
    return f"{sentence}; {smaller} GB do with {change.settings} ({change.fullest / GIB:.1f} GiB)"


def more_rows(job: JobFields, estimator: Estimator, card: float) -> str:
    """What lets more replies be written at the same time, if there is room for them; empty if there is not, or if the job says how
    many. A GPU takes little longer for a step of 256 rows than for one of 64."""
    if estimator.device != "cuda" or not isinstance(job, PPOConfig) or job.sampler_rows is not None:
        return ""
    rows = min(MOST_ROWS["cuda"], job.rollout_batch_size)
    while rows > job.rollout_chunk_size:
        fullest = most_on_one(estimator.processes(changed(job, rollout_chunk_size=rows)))
        if fullest <= card * GIB:
            return f"; it decodes faster with rollout_chunk_size={rows} ({fullest / GIB:.1f} GiB)"
        rows //= 2
    return ""


def warnings(job: JobFields, processes: list[Process], estimator: Estimator) -> Iterator[str]:
    """What works and yet is not what one would want."""
    if not isinstance(job, PPOConfig) or job.learner.zero_stage == 0:
        return
    stage, workers = job.learner.zero_stage, max(job.learner.num_workers, 1)
    if workers == 1:
        yield f"ZeRO {stage} with 1 worker saves nothing: there is no other worker to share with"
    if stage == 3 and job.placement == "colocate":
        yield "ZeRO 3 gathers the whole base again for every token that is decoded: placement=split decodes with a base of its own"
    if stage == 3:
        yield "ZeRO 3 divides the base after each worker has loaded it whole: the base must still fit one GPU"
