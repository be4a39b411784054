"""Runs the body of a stage: in this process, or in a Ray Train worker group. Nothing else in the project starts Ray Train.

A body is a function `body(config, session) -> Run` that every rank runs. Ray places, starts and ends the group; what must be known
before anything waits (does any node have what a worker asks for?) is checked here first, because Ray Train would retry an
impossible request for ever.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rlhf_ray.config import JobFields
from rlhf_ray.console import Console, FileConsole, Follower
from rlhf_ray.errors import Interrupted, Problem, ResourceError, RlhfRayError
from rlhf_ray.run import Run
from rlhf_ray.session import Session, process_session, worker_session

Body = Callable[[Any, Session], Run]


def launch(body: Body, config: JobFields, console: Console) -> Run:
    """Run `body` on every rank and return what rank 0 returns. A worker's error of ours is raised here as it is."""
    if config.learner.num_workers == 0:
        return body(config, process_session(console, config.learner.num_threads))
    with interruptible(), _cluster(config) as on_own_ray:
        return _fit(body, config, console, on_own_ray)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ray Train answers Ctrl-C with a handler of its own that aborts the group and then ends this process without a word. Here it
    becomes the KeyboardInterrupt that it is, and the handler that was there before comes back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        raise KeyboardInterrupt from error
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _cluster(config: JobFields) -> Iterator[bool]:
    """A Ray to run on: the one this process or its environment is connected to, else one of our own for the length of the job.

    Yields whether the Ray is our own."""
    import ray

    if ray.is_initialized():
        yield False
        return
    os.environ.setdefault("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", "1800")
    given = os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"address": given} if given else {"include_dashboard": False}
    ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    _protect_token()
    try:
        yield not given
    finally:
        ray.shutdown()


def _protect_token() -> None:
    """Ray writes its token readable for everybody; one token is full code execution."""
    token = Path.home() / ".ray" / "auth_token"
    with contextlib.suppress(OSError):
        if token.is_file() and token.stat().st_uid == os.getuid():
            token.chmod(0o600)


def worker_resources(config: JobFields, cluster: dict[str, float], own_ray: bool) -> dict[str, float]:
    """What one learner worker asks Ray for. On our own Ray the CPUs asked for always fit; threads are set by the worker itself."""
    learner = config.learner
    gpus = (
        learner.num_gpus
        if learner.num_gpus is not None
        else (1.0 if cluster.get("GPU", 0) >= learner.num_workers else 0.0)
    )
    if own_ray:
        cpus = min(1.0, cluster.get("CPU", 1.0) / (learner.num_workers + 1))
    else:
        cpus = float(learner.num_threads or 1)
    return {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}


def check_resources(num_workers: int, per_worker: dict[str, float], nodes: list[dict[str, Any]]) -> None:
    """ResourceError unless `num_workers` bundles of `per_worker` fit on the nodes, each bundle on one node.

    nodes: as `ray.nodes()` gives them; dead ones are left out."""
    alive = [n["Resources"] for n in nodes if n.get("Alive")]
    problems = []
    for kind, amount in per_worker.items():
        largest = max((r.get(kind, 0.0) for r in alive), default=0.0)
        if amount > largest:
            problems.append(
                Problem(
                    f"learner.num_{'gpus' if kind == 'GPU' else 'threads'}",
                    f"no node has {amount:g} {kind}",
                    f"{amount:g} {kind} on one node",
                    f"largest node has {largest:g}",
                    "ask for less per worker, or use a larger cluster",
                )
            )
    if not problems:
        places = sum(
            min(int(r.get(kind, 0.0) / amount + 1e-9) for kind, amount in per_worker.items() if amount) for r in alive
        )
        if places < num_workers:
            asked = ", ".join(f"{amount:g} {kind}" for kind, amount in per_worker.items())
            problems.append(
                Problem(
                    "learner.num_workers",
                    f"the cluster has room for {places} workers of {asked}",
                    f"room for {num_workers}",
                    f"{places}",
                    f"set learner.num_workers={max(places, 1)}, or use a larger cluster",
                )
            )
    ResourceError.raise_all(problems)


def _fit(body: Body, config: JobFields, console: Console, own_ray: bool) -> Run:
    import ray
    from ray.train import ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import FailureConfig, RunConfig  # what `ray.train` exports under its default, Train v2

    resources = worker_resources(config, ray.cluster_resources(), own_ray)
    check_resources(config.learner.num_workers, resources, ray.nodes())
    beside = Path(config.output_dir).absolute().parent
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".rlhf-ray-", dir=beside) as scratch:
        events = Path(scratch) / "events.jsonl"
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"body": body, "config": config, "events": str(events), "cwd": os.getcwd()},
            scaling_config=ScalingConfig(
                num_workers=config.learner.num_workers,
                use_gpu=bool(resources.get("GPU")),
                resources_per_worker=resources,
            ),
            torch_config=TorchConfig(timeout_s=1800),
            run_config=RunConfig(  # type: ignore[arg-type]
                name="group",
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=2),
                worker_runtime_env={"env_vars": {"RAY_CHDIR_TO_TRIAL_DIR": "0"}},
            ),
        )
        with Follower(events, console):
            try:
                result = trainer.fit()
            except Exception as error:
                raise _translated(error, config) from error
    return Run.from_json(result.return_value)  # type: ignore[attr-defined]


def _worker(job: dict[Any, Any]) -> Any:
    """The train function: what every rank of the worker group runs."""
    os.chdir(job["cwd"])
    config: JobFields = job["config"]
    session = worker_session(FileConsole(Path(job["events"])), config.learner.num_threads)
    return job["body"](config, session).to_json()


def _translated(error: BaseException, config: JobFields) -> BaseException:
    """The error of ours that made a worker fail, or one line of what Ray says."""
    failures = getattr(error, "worker_failures", None) or {}
    for cause in [*failures.values(), error.__cause__, error]:
        while cause is not None:
            if isinstance(cause, RlhfRayError):
                return cause
            inner = getattr(cause, "_base_exc", None) or getattr(cause, "cause", None)
            cause = inner if isinstance(inner, BaseException) else cause.__cause__
    if not failures:
        return error
    rank, first = next(iter(failures.items()))
    if "ActorDied" in type(first).__name__ or "ActorDied" in str(first):
        return Interrupted.at(
            f"learner rank {rank}", "the worker process died", fix=f"rlhf-ray resume {config.output_dir}"
        )
    return first
