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
from rlhf_ray.errors import Interrupted, RlhfRayError
from rlhf_ray.plan.asks import ACCELERATOR, Ask, role_asks
from rlhf_ray.plan.preflight import check, check_this_machine, is_given_a_cluster
from rlhf_ray.run import Run
from rlhf_ray.session import Session, process_session, worker_session
from rlhf_ray.stages.placement import default_threads, nodes_to_be, placed

Body = Callable[[Any, Session], Run]


def launch(body: Body, config: JobFields, console: Console) -> Run:
    """Run `body` on every rank and return what rank 0 returns. A worker's error of ours is raised here as it is."""
    if config.learner.num_workers == 0:
        return body(config, process_session(console, config.learner.num_threads))
    check_this_machine(config)
    with interruptible(), cluster() as own_ray:
        import ray

        asks = role_asks(config, ray.cluster_resources(), own_ray)
        check(asks, nodes_to_be())
        with placed(config, asks, console) as pools:
            return _fit(body, config, console, asks[-1], pools)


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
def cluster() -> Iterator[bool]:
    """A Ray to run on: the one this process or its environment is connected to, else one of our own for the length of the job.

    Yields whether the Ray is our own."""
    import ray

    if ray.is_initialized():
        yield False
        return
    os.environ.setdefault("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", "1800")
    # Ray lowers its workers' priority to 15: beside a busy process of this machine they would get a thirtieth of a core, and a job
    # that takes a minute does not end in ten. 0 leaves them the priority of the command that the user gave.
    os.environ.setdefault("RAY_worker_niceness", "0")
    given = is_given_a_cluster()  # ray.init finds it by itself
    options: dict[str, Any] = {} if given else {"include_dashboard": False}
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


def _fit(body: Body, config: JobFields, console: Console, ask: Ask, pools: Any) -> Run:
    import ray
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import (
        FailureConfig,
        RunConfig,
        ScalingConfig,
    )  # what ray.train exports by default

    job = {"body": body, "config": config, "cwd": os.getcwd(), "pools": pools}
    if pools is not None:
        job["threads"] = default_threads(config)
    resources = {kind: amount for kind, amount in ask.each.items() if not kind.startswith(ACCELERATOR)}
    beside = Path(config.output_dir).absolute().parent
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".rlhf-ray-", dir=beside) as scratch:
        events = Path(scratch) / "events.jsonl"
        trainer = TorchTrainer(
            _worker,
            train_loop_config={**job, "events": str(events)},
            scaling_config=ScalingConfig(
                num_workers=config.learner.num_workers,
                use_gpu=bool(resources.get("GPU")),
                resources_per_worker=resources,
                accelerator_type=config.learner.accelerator_type,
                label_selector=ask.labels or None,
            ),
            torch_config=TorchConfig(backend=_backend(ray.nodes()), timeout_s=1800),
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


def _backend(nodes: list[dict[str, Any]]) -> str | None:
    """Train's own choice, NCCL between GPUs; gloo where GPUs are only declared: Ray knows no model of any of them."""
    real = any(kind.startswith(ACCELERATOR) for n in nodes if n.get("Alive") for kind in n["Resources"])
    return None if real else "gloo"


def _worker(job: dict[Any, Any]) -> Any:
    """The train function: what every rank of the worker group runs."""
    os.chdir(job["cwd"])
    config: JobFields = job["config"]
    threads = config.learner.num_threads or job.get("threads")
    session = worker_session(FileConsole(Path(job["events"])), threads, job["pools"])
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
