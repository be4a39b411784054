"""A Ray to run on: the one there is, or one of our own that ends with the job."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from rlhf_ray.errors import Interrupted, ResourceError
from rlhf_ray.launch.placement import cluster_nodes, cluster_total
from rlhf_ray.launch.preflight import given_address, is_given_a_cluster, nodes_of
from rlhf_ray.launch.ray_join import cannot_join, check_is_there
from rlhf_ray.launch.resources import Node, this_machine

GCS_GONE_S = 20
"""After so many seconds without Ray's control service the processes of a Ray of our own end."""
GIVEN_GONE_S = 45.0
"""The same of a cluster that the job was given, whose service may come back; Ray itself gives up after a minute."""
SOCKET_PATH = 107
"""Bytes of a Unix socket's path, without the NUL that ends it."""
SESSION_SOCKET = "/ray/session_2026-01-31_09-00-00_000000_/sockets/plasma_store"
"""What Ray puts behind its temporary folder, without the number of the process."""
PREEMPTION_WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
"""Ray Train's variable."""
ADDRESS_OF_ITS_OWN = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray's variable. Without it a node is 127.0.0.1, as by default on macOS, and its processes listen there alone. (An address that is
given to `ray.init` does not do that: Ray replaces a loopback one by the machine's.)"""
NO_GRPC_PROXY = "no_grpc_proxy"
"""gRPC's variable, which it reads in place of no_proxy where it is set."""
POLL_S = 2.0
AGENTS = 2
"""Of a node: that of the dashboard and that of runtime environments."""
REAPER = r"""
while read -r line; do agents=$line; done
[ "$agents" = end ] && exit
sleep 10
for pid in $agents; do grep -qs "^ray::.*Agent" "/proc/$pid/cmdline" && kill -9 "$pid"; done
"""
"""Ray's agents would go on for a minute after a kill -9 of the driver: they wait for a control service that is gone."""


@contextlib.contextmanager
def at_hand() -> Iterator[tuple[Mapping[str, float], list[Node], bool]]:
    """What a job could be placed on: resources, nodes, and whether Ray would be our own. A Ray that is there is asked, none is
    started for it."""
    import ray

    if not ray.is_initialized() and not is_given_a_cluster():
        machine = this_machine()
        yield machine.resources, [machine], True
        return
    with cluster("") as own_ray:
        yield cluster_total(), cluster_nodes() or nodes_of(ray.nodes()), own_ray


def check_socket_paths() -> None:
    """ResourceError if the sockets of a Ray of our own would have longer paths than a Unix socket can (107 bytes): it keeps them in
    a folder of its session below RAY_TMPDIR, else TMPDIR, else /tmp."""
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    folder = os.environ.get(name, "/tmp")
    longest = SOCKET_PATH - len(SESSION_SOCKET) - len(str(os.getpid()))
    if len(os.fsencode(folder)) > longest:
        raise ResourceError.at(
            name,
            "too long: the paths of Ray's sockets begin with it",
            f"at most {longest} letters",
            f"{len(os.fsencode(folder))}: {folder}",
            "RAY_TMPDIR=/tmp, for Ray alone",
        )


@contextlib.contextmanager
def cluster(again: str, loopback: bool = False) -> Iterator[bool]:
    """A Ray to run on: the one this process or its environment is connected to, else one of our own for the length of the job.

    again: the command that goes on where this one ends, should Ray be lost.   loopback: a Ray of our own can be reached from this
    machine alone, its metrics, which ask nobody for a token, included.  Yields whether the Ray is our own."""
    import ray

    if ray.is_initialized():
        yield False
        return
    os.environ.setdefault("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", "1800")
    # Ray lowers its workers' priority to 15: beside a busy process of this machine they would get a thirtieth of a core, and a job
    # that takes a minute does not end in ten. 0 leaves them the priority of the command that the user gave.
    os.environ.setdefault("RAY_worker_niceness", "0")
    given = is_given_a_cluster()  # ray.init finds it by itself
    if given:
        check_is_there(given_address())
    else:
        check_socket_paths()
        # Nobody starts the control service of our own Ray again: workers that have lost it end after 20 s, not after a minute.
        os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", str(GCS_GONE_S))
    options: dict[str, Any] = {} if given else {"include_dashboard": False}
    with contextlib.ExitStack() as environment:
        if not given:
            environment.enter_context(_past_the_proxy())
        if loopback and not given:
            environment.enter_context(_on_loopback())
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
        except Exception as error:
            if (known := cannot_join(error)) is None:
                raise
            raise known from error
        _protect_token()
        try:
            with _watched(again, GIVEN_GONE_S) if given else _one_end(again):
                yield not given
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _past_the_proxy() -> Iterator[None]:
    """Processes of a Ray of our own tell each other of their metrics by gRPC, which would ask the user's proxy for this machine."""
    import ray

    before = os.environ.get(NO_GRPC_PROXY)
    known = next(filter(None, map(os.environ.get, (NO_GRPC_PROXY, "no_proxy", "NO_PROXY"))), "")
    own = ("localhost", "127.0.0.1", "::1", ray.util.get_node_ip_address())
    os.environ[NO_GRPC_PROXY] = ",".join(dict.fromkeys([*filter(None, known.split(",")), *own]))
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(NO_GRPC_PROXY, None)
        else:
            os.environ[NO_GRPC_PROXY] = before


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """A Ray that is started meanwhile listens on 127.0.0.1 alone, unless the user has set Ray's variable himself."""
    from ray._private import ray_constants

    if ADDRESS_OF_ITS_OWN in os.environ:
        yield
        return
    before = ray_constants.ENABLE_RAY_CLUSTER
    os.environ[ADDRESS_OF_ITS_OWN] = "0"  # for the processes that Ray starts
    ray_constants.ENABLE_RAY_CLUSTER = False  # here it has been read
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        os.environ.pop(ADDRESS_OF_ITS_OWN, None)


@contextlib.contextmanager
def _no_preemption() -> Iterator[None]:
    """Nobody takes a node of our own Ray away: Ray Train starts no process that looks."""
    before = os.environ.get(PREEMPTION_WATCHER)
    os.environ.setdefault(PREEMPTION_WATCHER, "0")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(PREEMPTION_WATCHER, None)


@contextlib.contextmanager
def _one_end(again: str) -> Iterator[None]:
    """The processes of a Ray of our own end with this one, however it ends; and this one tells where it has lost its Ray."""
    # A shell that reads from a pipe to this process learns of any end of it, kill -9 included.
    with subprocess.Popen(
        ["sh", "-c", REAPER], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True, text=True
    ) as reaper:
        try:
            with _no_preemption(), _watched(again, GCS_GONE_S / 2, reaper.stdin):
                yield
        finally:
            with contextlib.suppress(OSError):
                print("end", file=reaper.stdin, flush=True)


@contextlib.contextmanager
def _watched(again: str, gone_s: float, reaper: Any = None) -> Iterator[None]:
    """This process tells where it has lost its Ray. gone_s: seconds without its control service until it does.

    reaper: is told what to end with this process."""
    import ray

    address = str(ray.get_runtime_context().gcs_address)
    ended = threading.Event()
    watching = threading.Thread(target=_watch, args=(address, again, ended, gone_s, reaper), daemon=True)
    watching.start()
    try:
        yield
    finally:
        ended.set()
        watching.join()


def _watch(address: str, again: str, ended: threading.Event, gone_s: float, reaper: Any) -> None:
    """Tell the reaper what to end. Then look after Ray's control service: where it is gone, Ray would abort this process a while
    later without a word."""
    host, _, port = address.rpartition(":")
    seen, agents = time.monotonic(), list[int]()
    while not ended.wait(POLL_S):
        if reaper is not None and len(agents) < AGENTS and (agents := _agents()):
            with contextlib.suppress(OSError):
                print(*agents, file=reaper, flush=True)
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=POLL_S).close()
            seen = time.monotonic()
        except OSError:
            if time.monotonic() - seen < gone_s:
                continue
            error = Interrupted.at(
                "Ray", "its control service (gcs_server) has ended, and all its work with it", fix=again
            )
            print(*error.lines(), sep="\n", file=sys.stderr, flush=True)
            os._exit(error.exit_code)  # nothing can be asked to end in order any more


def _agents() -> list[int]:
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if re.match(r"ray::\w+Agent", " ".join(child.cmdline())):
                found.append(child.pid)
    return found


def _protect_token() -> None:
    """Ray writes its token readable for everybody; one token is full code execution."""
    token = Path.home() / ".ray" / "auth_token"
    with contextlib.suppress(OSError):
        if token.is_file() and token.stat().st_uid == os.getuid():
            token.chmod(0o600)
