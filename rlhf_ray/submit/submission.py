"""`rlhf-ray submit`: check, pack, ask the nodes, send, follow."""

from __future__ import annotations

import re
import shlex
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_ray.config import JobFields
from rlhf_ray.config.load import load_any
from rlhf_ray.config.sections import RUN_NAME
from rlhf_ray.config.serve import ServeConfig, is_loopback
from rlhf_ray.console import Console
from rlhf_ray.errors import ConfigError
from rlhf_ray.submit import nodes as ask_nodes
from rlhf_ray.submit.client import Cluster, connect
from rlhf_ray.submit.follow import follow
from rlhf_ray.submit.pack import JOB, LIMIT_BYTES, Parcel, make

MODULE = "rlhf_ray.cli"
TIME = "%Y%m%d-%H%M%S"
FOLLOW = "logs --follow"


@dataclass(frozen=True)
class Submitted:
    """A job that the cluster has.   exit_code: how it ended; None where it was not followed to its end."""

    id: str
    url: str
    with_token: bool
    output_dir: str
    exit_code: int | None = None

    def lines(self) -> list[str]:
        """Ray's own commands for it."""
        words = {"logs": FOLLOW, "status": "status", "stop": "stop"}
        return [f"{name:<8}{_rays(self.url, self.with_token, word, self.id)}" for name, word in words.items()]


def _rays(url: str, with_token: bool, words: str, submission_id: str) -> str:
    """A command of Ray's for a job. Its clients send a token only if they are told so."""
    mode = "RAY_AUTH_MODE=token " if with_token else ""
    return f"{mode}ray job {words} --address {shlex.quote(url)} {shlex.quote(submission_id)}"


def submit(
    job: str,
    overrides: Sequence[str] = (),
    *,
    address: str | None,
    console: Console,
    stage: str | None = None,
    storage: str | None = None,
    name: str | None = None,
    limit_bytes: int = LIMIT_BYTES,
    check_nodes: bool = True,
    detach: bool = False,
    debug: bool = False,
) -> Submitted:
    """Send job file `job` to the cluster at `address`, and follow it to its end unless `detach`.

    storage: the folder that relative paths of the job mean on the cluster; default: the working folder.   name: the submission's;
    default: from the job's.   check_nodes: ask every node first whether it has what the job needs.   debug: the job
    tells tracebacks.

    Raises ConfigError (the job, a secret in it, the token), ResourceError (the cluster, a node), Interrupted if it was stopped."""
    command, config = load_any(job, overrides, stage, check_files=False)
    parcel = make(command, config, storage, limit_bytes)
    cluster = connect(address, console.warn)
    _must_be_free(cluster, parcel)
    with_package, found = True, "not asked"
    if check_nodes:
        read = [need.path for need in parcel.needs if need.kind != "module"]
        modules = [need.path for need in parcel.needs if need.kind == "module"]
        answers = ask_nodes.ask(cluster, read, parcel.output_dir, modules)
        ask_nodes.judge(answers, parcel.needs, parcel.output_dir, console.warn)
        with_package = not ask_nodes.has_package(answers)
        found = f"{len(answers)}, {sum(len(a.get('gpus', ())) for a in answers)} GPUs; all can read what the job names"
    submission_id = _name(name, parcel)
    options = [*(["--stage", stage] if stage else []), *(["--storage", storage] if storage else [])]
    options += ["--max-package", f"{limit_bytes / 1e6:g}"] if limit_bytes != LIMIT_BYTES else []
    again = shlex.join(["rlhf-ray", "submit", job, *overrides, *options, "--address", cluster.url])
    size = _send(cluster, parcel, submission_id, with_package, debug)
    done = Submitted(submission_id, cluster.url, cluster.token is not None, parcel.output_dir)
    console.header(
        f"submit  {submission_id}",
        [
            *_where(command, config, parcel),
            f"sent       {size:,} bytes: {', '.join(_contents(parcel, with_package))}",
            f"nodes      {found}",
            *done.lines(),
        ],
    )
    if detach:
        return done
    code = follow(cluster, submission_id, console, again, _rays(done.url, done.with_token, FOLLOW, done.id))
    return Submitted(done.id, done.url, done.with_token, done.output_dir, code)


def _where(command: str, config: JobFields | ServeConfig, parcel: Parcel) -> list[str]:
    if not isinstance(config, ServeConfig):
        return [f"job        {command}, run folder {parcel.output_dir} (resumed if it exists already)"]
    told, port = [f"job        {command}, folder {parcel.output_dir}"], config.port
    if is_loopback(config.host):
        told.append(
            f"service    port {port} of the head node, for itself alone; from here: ssh -L {port}:127.0.0.1:{port} HEAD"
        )
    return told


def _must_be_free(cluster: Cluster, parcel: Parcel) -> None:
    """Two jobs must not have one run folder; the run's own lock would say so later, and on the cluster."""
    for other in cluster.jobs():
        if (other.metadata or {}).get("output_dir") == parcel.output_dir and not other.status.is_terminal():
            to_follow, to_stop = (
                _rays(cluster.url, cluster.token is not None, word, other.submission_id) for word in (FOLLOW, "stop")
            )
            fix = f"to follow it: {to_follow}; to stop it: {to_stop}"
            raise ConfigError.at(
                "output_dir", f"{parcel.output_dir} is being written by job {other.submission_id}", fix=fix
            )


def _send(cluster: Cluster, parcel: Parcel, submission_id: str, with_package: bool, debug: bool) -> int:
    """Upload and submit; the size of what was packed."""
    entrypoint = shlex.join(["python", "-m", MODULE, parcel.command, JOB, *(["--debug"] if debug else [])])
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(parcel.stop_s), "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "1800"}
    metadata = {"rlhf_ray": parcel.command, "output_dir": parcel.output_dir}
    with tempfile.TemporaryDirectory(prefix="rlhf-ray-") as scratch:
        package = Path(scratch) / "job.zip"
        size = parcel.write(package, with_package)
        cluster.submit(entrypoint, submission_id, {"working_dir": str(package), "env_vars": variables}, metadata)
    return size


def _contents(parcel: Parcel, with_package: bool) -> list[str]:
    return ["the job", *parcel.files, *(["rlhf_ray (the nodes have another one, or none)"] if with_package else [])]


def _name(given: str | None, parcel: Parcel) -> str:
    """Becomes the name of a log file on the cluster."""
    if given is not None:
        if not RUN_NAME.fullmatch(given):
            rule = "1 to 64 letters, digits, '.', '_' or '-', starting with a letter or digit"
            raise ConfigError.at("--name", "cannot be a submission's name", rule, given)
        return given
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", parcel.name).lstrip("._-")[:40] or parcel.command
    return f"{plain}-{time.strftime(TIME, time.gmtime())}"
