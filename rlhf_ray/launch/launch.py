"""Runs the body of a stage: in this process, or in a Ray Train worker group. Nothing else in the project starts Ray Train.

A body is a function `body(config, session) -> Run` that every rank runs. Ray places, starts and ends the group; what must be known
before anything waits (does any node have what a worker asks for?) is checked here first, because Ray Train would retry an
impossible request for ever.

Ray Train starts the group again where a process or node was lost, and the run goes on from its newest checkpoint. An error that the
same work would meet again is left in the channel instead (launch/channel.py), and raised here as it is.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_ray.config import JobFields
from rlhf_ray.config.pipeline import stages_of
from rlhf_ray.console import Console, FileConsole, Follower
from rlhf_ray.errors import DISK_FULL, Interrupted, Problem
from rlhf_ray.launch.begun import with_defaults_as_begun
from rlhf_ray.launch.channel import RunChannel, open_channel
from rlhf_ray.launch.engines import check_engine_here, check_engine_there
from rlhf_ray.launch.lost_peer import is_of_a_lost_peer
from rlhf_ray.launch.model_families import check_models
from rlhf_ray.launch.placement import Builder, check_cluster, cluster_total, default_threads, longest_answer_s, placed
from rlhf_ray.launch.preflight import check, check_this_machine
from rlhf_ray.launch.ray_cluster import at_hand, cluster
from rlhf_ray.launch.resources import ACCELERATOR, ResourceRequest, role_requests
from rlhf_ray.launch.shared_folder import check_all_see, unseen
from rlhf_ray.runtime.devices import LESS_GPU_MEMORY, first_sentence, gpu_memory_ran_out, memory_released
from rlhf_ray.runtime.imports import imported
from rlhf_ray.runtime.session import Session, enter, process_session, worker_session
from rlhf_ray.runtime.signals import Signals, Stop
from rlhf_ray.storage.run import Run
from rlhf_ray.storage.run_folder import check_place, is_run, resume_command

Body = str | Callable[[Any, Session], Run]
"""The function, or its name `package.module:function`, which spares this process and Ray Train's controller its imports."""

DISK_FAILS = frozenset({errno.EIO, errno.ESTALE, errno.EROFS})
"""Of an OSError: the disk, or the server behind it, has failed."""
MAX_FAILURES = 3
"""Times that a learner group is started again because a process died."""
MAX_PREEMPTIONS = 10
"""The same where a node was taken away, which is nobody's fault."""
START_FAILURES = 2
PREEMPTION_GRACE_S = 30.0
GROUP_TIMEOUT_S = 1800
"""Of torch's process group, at least: the longest that a rank waits for another one, loading included. The watchdog is quicker."""


def group_timeout_s(config: JobFields) -> int:
    """Seconds that a rank waits for another one: longer than that one may wait for a reward server, whose failure is then what ends
    the run, in one line, and not a rank that seems lost."""
    return max(GROUP_TIMEOUT_S, *(math.ceil(longest_answer_s(job)) for job in stages_of(config)))


def launch(
    body: Body,
    config: JobFields,
    console: Console,
    builders: Mapping[str, Builder] | None = None,
    seat: Any = None,
) -> Run:
    """Run `body` on every rank and return what rank 0 returns. A worker's error of ours is raised here as it is.

    builders: by role, for the actors of a split job.   seat: of a run in this process that shares it, and its base, with others."""
    resume = resume_command(config.output_dir)
    check_place(config.output_dir, config.resume)
    config = with_defaults_as_begun(config)
    for line in check_models(config):
        console.warn(line)
    check_engine_here(config)
    if config.template_date is None:
        from rlhf_ray.launch.template_date import with_template_date  # brings what reads adapters

        config = with_template_date(config)
    if config.learner.num_workers == 0:
        stop = Stop() if seat is None else seat.stop
        signals = Signals(stop, console, config.output_dir, resume, config.stop_grace_s)
        with signals, _with_the_way_on(config), memory_released():
            return imported(body)(config, process_session(console, config.learner.num_threads, stop, seat))
    check_this_machine(config)
    with open_channel(Path(config.output_dir).absolute().parent) as channel:
        signals = Signals(channel.stop(), console, config.output_dir, resume, config.stop_grace_s)
        with signals, cluster(resume) as own_ray:
            signals.install()  # ray.init takes SIGTERM
            requests = role_requests(config, cluster_total(), own_ray)
            check_cluster(requests)
            check_all_see(channel.path, requests[-1])
            check_engine_there(config, requests)
            with placed(config, requests, console, builders or {}) as actor_handles:
                return _fit(body, config, console, requests[-1], actor_handles, channel, own_ray)


@contextlib.contextmanager
def _with_the_way_on(config: JobFields) -> Iterator[None]:
    """An Interrupted ends with the command that goes on, if there is a run, also where it was raised by code that knows of none.
    What cannot be written is written when there is room: Interrupted as well, whoever meets it first; so is a GPU whose memory
    ran out, since the run goes on under settings that need less of it."""
    resume = resume_command(config.output_dir)
    try:
        yield
    except Interrupted as error:
        if not is_run(config.output_dir) or all(problem.fix.endswith(resume) for problem in error.problems):
            raise
        raise type(error)([_ending_with(resume, problem) for problem in error.problems]) from error
    except OSError as error:
        if error.errno not in DISK_FULL | DISK_FAILS:
            raise
        free = shutil.disk_usage(Path(config.output_dir).absolute().parent).free
        remedy = "free some space" if error.errno in DISK_FULL else "fix the disk"
        fix = f"{remedy}, then: {resume}"
        where = str(error.filename or config.output_dir)
        raise Interrupted.at(where, f"cannot be written: {error.strerror}", "", f"{free:,} bytes free", fix) from error
    except RuntimeError as error:
        if not gpu_memory_ran_out(error):
            raise
        again = f"; then: {resume}" if is_run(config.output_dir) else ""
        raise Interrupted.at("GPU memory", first_sentence(error), fix=LESS_GPU_MEMORY + again) from error


def _ending_with(resume: str, problem: Problem) -> Problem:
    if problem.fix.endswith(resume):
        return problem
    return replace(problem, fix=f"{problem.fix}; then: {resume}" if problem.fix else resume)


def placement_of(config: JobFields) -> dict[str, list[str]]:
    """Role -> node of each process, as `launch` would have it; empty for a job without Ray. Starts no Ray of its own.

    Raises ResourceError, as `launch` does, if the job can never be placed."""
    if config.learner.num_workers == 0:
        return {}
    with at_hand() as (resources, nodes, own_ray):
        return check(role_requests(config, resources, own_ray), nodes)


def _fit(
    body: Body,
    config: JobFields,
    console: Console,
    request: ResourceRequest,
    actor_handles: Any,
    channel: RunChannel,
    own_ray: bool,
) -> Run:
    import ray
    from ray.train.v2.api.config import (
        FailureConfig,
        RunConfig,
        ScalingConfig,
    )  # what ray.train exports by default
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from rlhf_ray.launch.train_group import TorchGroup, begin_coordinator

    if own_ray:
        begin_coordinator()

    job = {
        "body": body,
        "config": config,
        "cwd": os.getcwd(),
        "actor_handles": actor_handles,
        "channel": str(channel.path),
    }
    if actor_handles is not None:
        job["threads"] = default_threads(config)
    resources = {kind: amount for kind, amount in request.each.items() if not kind.startswith(ACCELERATOR)}
    uses_gpu = bool(resources.get("GPU"))
    trainer = DataParallelTrainer(
        _worker,
        train_loop_config=job,
        scaling_config=ScalingConfig(
            num_workers=config.learner.num_workers,
            use_gpu=uses_gpu,
            resources_per_worker=resources,
            accelerator_type=config.learner.accelerator_type,
            label_selector=request.labels or None,
        ),
        backend_config=TorchGroup(_backend(ray.nodes(), uses_gpu), group_timeout_s(config)),
        run_config=RunConfig(  # type: ignore[arg-type]
            name="group",
            storage_path=str(channel.path),
            failure_config=FailureConfig(
                max_failures=MAX_FAILURES,
                controller_failure_limit=START_FAILURES,
                max_preemption_failures=MAX_PREEMPTIONS,
                preemption_grace_s=PREEMPTION_GRACE_S,
            ),
            worker_runtime_env={"env_vars": {"RAY_CHDIR_TO_TRIAL_DIR": "0"}},
        ),
    )
    with Follower(channel.events, console):
        try:
            result = _beside_signals(trainer.fit)
        except Exception as error:
            raise channel.failure() or _translated(error, config) from error
    if (failure := channel.failure()) is not None:
        raise failure
    return Run.from_json(result.return_value)


def _beside_signals(work: Callable[[], Any]) -> Any:
    """`work` in a thread, so that this one handles signals as they come: Ray Train would take Ctrl-C for itself, and end this
    process without a word. An exception of either thread is raised here."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.extend((work(), None))
        except BaseException as error:
            outcome.extend((None, error))

    thread = threading.Thread(target=run, name="learner-group", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    result, error = outcome
    if error is not None:
        raise error
    return result


def _backend(nodes: list[dict[str, Any]], uses_gpu: bool) -> str:
    """NCCL between GPUs; gloo where GPUs are only declared: Ray knows no model of any of them."""
    real = any(kind.startswith(ACCELERATOR) for n in nodes if n.get("Alive") for kind in n["Resources"])
    return "nccl" if real and uses_gpu else "gloo"


def _worker(job: dict[Any, Any]) -> Any:
    """The train function: what every rank of the worker group runs, at its first start and after a restart."""
    import ray.train

    enter(job["cwd"])
    config: JobFields = job["config"]
    channel, context = RunChannel(Path(job["channel"])), ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    if not channel.path.is_dir():  # on a node that an autoscaler has added since the driver looked
        raise unseen(channel.path, ray.util.get_node_ip_address())
    attempt = channel.begin(rank)
    if channel.failure() is not None:  # not a fault that another start could mend: the driver tells it
        return None
    console = FileConsole(channel.events)
    if attempt:
        config = config.model_copy(update={"resume": "auto"})
        if rank == 0:
            console.warn(f"the learner group was lost; start {attempt + 1}, from the newest checkpoint")
    threads = config.learner.num_threads or job.get("threads")
    session = worker_session(console, threads, job["actor_handles"], channel.stop(), attempt)
    try:
        with _with_the_way_on(config):
            return imported(job["body"])(config, session).to_json()
    except Exception as error:
        if world_size > 1 and is_of_a_lost_peer(error):
            raise  # Ray Train starts the group again
        channel.fail(rank, error)
        if world_size > 1 and not channel.wait_for_others(world_size):
            raise  # the others wait for this rank: the group has to end
        return None


def _translated(error: BaseException, config: JobFields) -> BaseException:
    """One line of what Ray says of a group that could not go on."""
    from ray.exceptions import RayActorError

    from rlhf_ray.roles.out_of_memory import LESS_MEMORY, is_out_of_memory, memory_of

    resume = resume_command(config.output_dir)
    if is_out_of_memory(error):
        what = f"ran out, and Ray killed processes of this job: {memory_of(str(error)) or _first_line(error)}"
        return Interrupted.at("memory", what, fix=f"{LESS_MEMORY}; then: {resume}")
    failures = getattr(error, "worker_failures", None) or {}
    if failures:
        rank, first = next(iter(failures.items()))
        what = f"the learner group was lost {MAX_FAILURES + 1} times; the last time: {_first_line(first)}"
        return Interrupted.at(f"learner rank {rank}", what, fix=resume)
    if isinstance(error, RayActorError):
        return Interrupted.at("Ray Train", f"its controller died: {_first_line(error)}", fix=resume)
    if "Preemption" in type(error).__name__:
        return Interrupted.at("learner group", f"its node was taken away {MAX_PREEMPTIONS + 1} times", fix=resume)
    return error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
