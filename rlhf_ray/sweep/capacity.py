"""What a trial asks Ray for, and how many trials fit at once: Tune does not see the workers that a trial starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rlhf_ray.config import JobFields
from rlhf_ray.launch.preflight import check, place
from rlhf_ray.launch.resources import ACCELERATOR, Node, ResourceRequest, role_requests, split_job
from rlhf_ray.runtime.session import usable_cores

DRIVER = {"CPU": 0.01}
"""What the process of a trial asks for that starts workers of its own; Ray refuses a request for nothing."""
MOST = 64


@dataclass(frozen=True)
class Capacity:
    """in_process: the trial's own process does the work.  each: what it asks for.  threads: of it.  at_once: trials that fit.
    is_here: that process is this one, without Ray."""

    in_process: bool
    each: dict[str, float]
    threads: int
    at_once: int
    is_here: bool = False


def capacity(jobs: Sequence[JobFields], total: Mapping[str, float], nodes: Sequence[Node], own_ray: bool) -> Capacity:
    """For the most demanding of `jobs`. ResourceError if a trial alone does not fit.   total: of the cluster."""
    in_process = all(split_job(job) is None and job.learner.num_workers <= 1 for job in jobs)
    found = []
    for job in {(job.learner.model_dump_json(), split_job(job) is None): job for job in jobs}.values():
        requests = (
            [own_process(job, total)]
            if in_process
            else [*role_requests(job, total, own_ray), ResourceRequest("trial", 1, DRIVER)]
        )
        check(requests, nodes)
        found.append((at_once(requests, nodes), requests[0].each, int(requests[0].each.get("CPU", 1))))
    fits, each, threads = min(found, key=lambda f: f[0])
    return Capacity(in_process, each if in_process else DRIVER, max(threads, 1), fits)


def here(jobs: Sequence[JobFields]) -> Capacity:
    """Of this process, for trials that share a base in it (learner.num_workers 0)."""
    return Capacity(True, {}, max(job.learner.num_threads or usable_cores() for job in jobs), 1, is_here=True)


def own_process(job: JobFields, total: Mapping[str, float]) -> ResourceRequest:
    """A trial that trains in its own process: its threads as CPUs (one by default), and a GPU or the share of one that it names."""
    learner, cpus, gpus = job.learner, total.get("CPU", 1.0), total.get("GPU", 0.0)
    gpu = (1.0 if gpus >= 1.0 else 0.0) if learner.num_gpus is None else learner.num_gpus
    beside = max(int(gpus / gpu), 1) if gpu else int(cpus)
    threads = float(learner.num_threads or max(int(cpus / beside), 1))
    each = {"CPU": threads} | ({"GPU": gpu} if gpu else {})
    if learner.accelerator_type is not None:
        each[ACCELERATOR + learner.accelerator_type] = 0.001
    return ResourceRequest("trial", 1, each, dict(learner.label_selector))


def at_once(requests: Sequence[ResourceRequest], nodes: Sequence[Node]) -> int:
    """How many times all of `requests` fit."""
    count = 1
    while count < MOST and place([replace(ask, count=ask.count * (count + 1)) for ask in requests], nodes) is not None:
        count += 1
    return count
