"""What each role of a job asks Ray for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rlhf_ray.config import ActorsConfig, JobFields, LearnerConfig, PipelineConfig, PPOConfig
from rlhf_ray.runtime.session import usable_cores

ACCELERATOR = "accelerator_type:"
"""Ray gives a node with such a GPU one unit of a resource of this name; a request takes a thousandth of it."""


@dataclass(frozen=True)
class ResourceRequest:
    """`count` processes of a role, `each` of them in one piece on one node. labels: Ray's label selector."""

    role: str
    count: int
    each: dict[str, float]
    labels: dict[str, str] = field(default_factory=dict)

    def total(self, kind: str) -> float:
        return self.count * self.each.get(kind, 0.0)

    def __str__(self) -> str:
        return f"{self.role} {self.count} x ({described(self.each)})"


@dataclass(frozen=True)
class Node:
    """A machine, by what it has (not by what is free)."""

    name: str
    resources: dict[str, float]
    labels: dict[str, str] = field(default_factory=dict)


def described(resources: Mapping[str, float]) -> str:
    """`1 CPU, 0.5 GPU`; an accelerator type by its name alone."""
    parts = [
        kind.removeprefix(ACCELERATOR) if kind.startswith(ACCELERATOR) else f"{amount:g} {kind}"
        for kind, amount in resources.items()
    ]
    return ", ".join(parts) or "nothing"


def split_job(config: JobFields) -> PPOConfig | None:
    """The PPO stage of a job, if its generators and scorers are actors."""
    if isinstance(config, PipelineConfig):
        if config.ppo.get("placement") != "split":
            return None
        try:
            stage = config.stage_config("ppo")
        except ValueError:  # the pipeline's own checks say what is wrong with it
            return None
        return stage if isinstance(stage, PPOConfig) else None
    return config if isinstance(config, PPOConfig) and config.placement == "split" else None


def processes(config: JobFields) -> int:
    """Learner workers, generators and scorers together."""
    split = split_job(config)
    actors = split.generator.num_actors + split.scorer.num_actors if split is not None else 0
    return max(config.learner.num_workers, 1) + actors


def role_requests(config: JobFields, total: Mapping[str, float], own_ray: bool) -> list[ResourceRequest]:
    """Of the learner, and of generators and scorers where they are actors; generators and scorers first.

    Where there are GPUs, every role of which the job does not say otherwise asks for one: never the CPU by accident. The job is
    refused (preflight.py) where they are too few.

    total: the cluster's resources.   own_ray: Ray was started for this job alone, so CPUs are only shares that always fit; threads
    are set by each process itself."""
    split = split_job(config)
    roles: list[tuple[str, int, LearnerConfig | ActorsConfig]] = []
    if split is not None:
        roles += [(n, getattr(split, n).num_actors, getattr(split, n)) for n in ("generator", "scorer")]
    roles.append(("learner", config.learner.num_workers, config.learner))
    share = min(1.0, total.get("CPU", 1.0) / (processes(config) + 1))
    gpu = _default_gpus({name: (count, role.num_gpus) for name, count, role in roles}, total.get("GPU", 0.0))
    requests = []
    for name, count, role in roles:
        cpus = role.num_cpus if isinstance(role, ActorsConfig) else None
        if cpus is None:
            cpus = share if own_ray else float(role.num_threads or 1)
        gpus = gpu[name] if role.num_gpus is None else role.num_gpus
        # a placement group has no empty bundles
        each = {"CPU": cpus if cpus or gpus else 0.001} | ({"GPU": gpus} if gpus else {})
        if role.accelerator_type is not None:
            each[ACCELERATOR + role.accelerator_type] = 0.001
        requests.append(ResourceRequest(name, count, each, dict(role.label_selector)))
    return requests


def _default_gpus(roles: Mapping[str, tuple[int, float | None]], total: float) -> dict[str, float]:
    """GPUs of each process of the roles whose job leaves them open: one, or none on a cluster without GPUs. Generators and scorers
    share what the learner leaves, equally many on each, if there is not one for each of them and at least one is left.

    roles: processes, and what the job says of each.

    >>> _default_gpus({"generator": (1, None), "scorer": (1, None), "learner": (1, None)}, 2.0)
    {'generator': 0.5, 'scorer': 0.5, 'learner': 1.0}
    """
    if total <= 0.0:
        return dict.fromkeys(roles, 0.0)
    taken = sum(
        n * (1.0 if asked is None else asked) for name, (n, asked) in roles.items() if name == "learner" or asked
    )
    shared = sum(n for name, (n, asked) in roles.items() if name != "learner" and asked is None)
    left = int(total - taken)
    on_each = -(-shared // left) if 1 <= left < shared else 1
    share = int(10_000 / on_each) / 10_000  # Ray counts in ten-thousandths
    return {name: 1.0 if name == "learner" else share for name in roles}


def this_machine() -> Node:
    """What a Ray that is started here would find. Without torch, whose import alone takes seconds."""
    return Node("this machine", {"CPU": float(usable_cores()), "GPU": float(_gpus())})


def _gpus() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([d for d in visible.split(",") if d.strip() and d.strip() != "-1"])
    cards = Path("/proc/driver/nvidia/gpus")
    return len(list(cards.iterdir())) if cards.is_dir() else 0
