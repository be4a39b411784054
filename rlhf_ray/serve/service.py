"""`rlhf-ray serve`: start Ray Serve with the application, print its addresses, and run until Ctrl-C, which drains and stops."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rlhf_ray.config.serve import ServeConfig, is_loopback
from rlhf_ray.console import Console, LocalConsole, counted
from rlhf_ray.errors import ConfigError, ResourceError
from rlhf_ray.launch.engines import check_service_engine
from rlhf_ray.launch.model_families import check_models
from rlhf_ray.launch.ray_cluster import cluster
from rlhf_ray.runtime.imports import vllm_version
from rlhf_ray.runtime.session import usable_cores
from rlhf_ray.serve import admission
from rlhf_ray.serve.status_files import read_statuses, remove_stale, stamps

POLL_S = 0.5
LISTED = 20
"""Names in the header."""
RAY_ENVIRONMENT = {
    admission.CALLBACK_VARIABLE: admission.CALLBACK,
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
}
"""For Serve on a Ray of our own; the files under cluster/ set the same. A proxy is restarted after three health checks without a
response, and until then no request is answered: with Serve's default of 10 s between checks, for half a minute. A replica that
answers no health check is ended at once: Serve's default waits for it to end its requests, which a frozen one never does."""
LOGGING = {"log_level": "WARNING", "enable_access_log": False}


def run_service(
    config: ServeConfig, console: Console | None = None, on_ready: Callable[[str], None] | None = None
) -> None:
    """Serve until SIGINT or SIGTERM.   on_ready: called with the URL once requests are answered.

    Raises ConfigError, ResourceError (the port is taken), ArtifactError for a base or adapter that does not fit."""
    console = console or LocalConsole()
    config = _resolve(config)
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with (
        cluster("start the service again", loopback=is_loopback(config.host) and not config.expose_metrics) as own_ray,
        _stop_signals() as stopping,
    ):  # in this order: ray.init takes SIGTERM
        from ray import serve

        from rlhf_ray.serve.app import APP_NAME, application

        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # the header says what it starts and deletes
        started = time.monotonic()
        serve.start(
            proxy_location="HeadOnly",
            http_options={
                "host": config.host,
                "port": config.port,
                "request_timeout_s": config.limits.request_timeout_s + 15,
            },
            logging_config=LOGGING,
        )
        try:
            target = serve.RunTarget(application(config, own_ray), APP_NAME, "/", logging_config=LOGGING)
            serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
            if _wait_until_running(config, console, stopping):
                url = f"http://{_url_host(config.host)}:{config.port}"
                console.header("serve", _header_lines(config, url, time.monotonic() - started))
                if on_ready is not None:
                    on_ready(url)
                _log_changes(Path(config.output_dir) / "replicas", console, stopping)
            console.log("serve: stopping; requests that are being answered are finished first")
            _drain(config.limits.request_timeout_s + 15)
        finally:
            if own_ray or not set(serve.status().applications) - {APP_NAME}:  # a cluster may serve others as well
                serve.shutdown()
    console.log("serve: stopped")


def _resolve(config: ServeConfig) -> ServeConfig:
    """The config with absolute paths and thread counts. Whatever can be refused before Ray starts is refused here."""
    from rlhf_ray.serve.api_keys import ApiKeys

    if config.api_keys is not None:
        ApiKeys(config.api_keys)
    if not config.adapters and config.registry is None:
        LocalConsole().warn("neither registry nor adapters is set: the base alone is served")
    if not is_loopback(config.host):
        LocalConsole().warn(
            f"host: {config.host} can be reached from other machines. Put nginx with cluster/nginx.conf in front of it: TLS, and"
            " bounds on headers, idle connections and paths, which Ray's proxy leaves open"
        )
    if config.engine == "vllm":
        check_service_engine()
    if config.registry is not None and not Path(config.registry).is_dir():
        raise ConfigError.at("registry", "no such folder", "a folder that rlhf-ray promote has made", config.registry)
    with socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            where = f"{config.host}:{config.port}"
            raise ResourceError.at(
                "port", f"cannot listen on {where}: {error.strerror}", "a free port", fix="port=8001"
            ) from None
    for line in check_models(config):
        LocalConsole().warn(line)
    folder = Path(config.output_dir)
    (folder / "replicas").mkdir(parents=True, exist_ok=True)
    for old in (folder / "replicas").glob("*.json"):
        old.unlink()
    absolute = {
        name: os.path.abspath(value)
        for name in ("output_dir", "registry", "api_keys")
        if (value := getattr(config, name)) is not None
    }
    if os.path.isdir(config.model_name_or_path):
        absolute["model_name_or_path"] = os.path.abspath(config.model_name_or_path)
    threads = config.replicas.num_threads or max(usable_cores() // config.replicas.min_replicas, 1)
    replicas = config.replicas.model_copy(update={"num_threads": threads})
    adapters = {name: os.path.abspath(spec) for name, spec in config.adapters.items()}
    return config.model_copy(update={**absolute, "replicas": replicas, "adapters": adapters})


def _drain(seconds: float) -> None:
    """Delete the application: replicas finish their requests, and accept no new ones. `serve.shutdown` alone would cut
    connections."""
    from ray import serve

    from rlhf_ray.serve.app import APP_NAME

    deleting = threading.Thread(target=lambda: serve.delete(APP_NAME), daemon=True)
    deleting.start()
    deleting.join(seconds)


def _wait_until_running(config: ServeConfig, console: Console, stopping: threading.Event) -> bool:
    """False if a signal comes first. ResourceError with the reason of the replica if it cannot start."""
    from ray import serve

    from rlhf_ray.serve.app import APP_NAME

    while not stopping.is_set():
        application = serve.status().applications.get(APP_NAME)
        state = str(application.status.value) if application is not None else "NOT_STARTED"
        if state == "RUNNING":
            return True
        if state in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise _startup_error(application)
        stopping.wait(POLL_S)
    return False


def _startup_error(application: Any) -> Exception:
    """The RlhfRayError of a replica, in one line; else the last line of Ray's message."""
    messages = [d.message for d in application.deployments.values() if d.message] or [application.message]
    lines = [line.strip() for line in "\n".join(messages).splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("rlhf_ray.errors.")]
    reason = ours[-1].partition(": ")[2] if ours else (lines[-1] if lines else "unknown")
    return ResourceError.at("serve", "the service cannot start", got=reason)


def _header_lines(config: ServeConfig, url: str, seconds: float) -> list[str]:
    statuses = _statuses(config)
    names = ["base"] if all(status.get("serves_base", True) for status in statuses) else []
    names += sorted({name for status in statuses for name in status.get("live", {})})
    count = len(names) + max((status.get("unread", 0) for status in statuses), default=0)
    who = f"keys of {config.api_keys}" if config.api_keys is not None else "no key; this machine only"
    return [
        f"page       {url}/",
        f"OpenAI     {url}/v1   (base_url of any OpenAI client)",
        f"models     {', '.join(names[:LISTED])}{_more(count)}",
        f"access     {who}",
        f"metrics    {_metrics_address()}",
        *([f"engine     vLLM {vllm_version()}"] if config.engine == "vllm" else []),
        f"replicas   {config.replicas.min_replicas}, {counted(config.replicas.num_threads or 1, 'thread')} each; up after"
        f" {seconds:.0f} s",
        "stop       Ctrl-C",
    ]


def _more(count: int) -> str:
    return f", and {count - LISTED} more" if count > LISTED else ""


def _metrics_address() -> str:
    """Where Prometheus finds this node's metrics; Ray does not print it by itself."""
    import ray

    ports = [node["MetricsExportPort"] for node in ray.nodes() if node.get("Alive") and node.get("MetricsExportPort")]
    return f"http://127.0.0.1:{ports[0]}/metrics" if ports else "none"


def _url_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _statuses(config: ServeConfig) -> list[dict[str, Any]]:
    return list(read_statuses(Path(config.output_dir) / "replicas").values())


def _log_changes(folder: Path, console: Console, stopping: threading.Event) -> None:
    """Until the service stops, log every change of what the replicas serve, as their status files say."""
    seen = stamps(folder)  # before what they stand for is read: what is written in between is read again
    before = read_statuses(folder)
    while not stopping.wait(POLL_S):
        remove_stale(folder, before)
        if seen == (now_seen := stamps(folder)):
            continue
        seen = now_seen
        now = read_statuses(folder)
        for replica, status in now.items():
            old = before.get(replica, {"live": {}, "refused": {}})
            for name, version in status["live"].items():
                # What was only read is no change.
                if old["live"].get(name) != version and (name in old["live"] or not old.get("unread")):
                    console.log(f"replica {replica}: {name} is now {version['id']} (sha256 {version['sha256'][:12]})")
            for version, reason in status["refused"].items():
                if version not in old["refused"]:
                    console.warn(f"replica {replica}: refused {version}: {reason}")
        for replica in before.keys() - now.keys():
            console.log(f"replica {replica}: gone")
        before = now


@contextlib.contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; a second SIGINT raises KeyboardInterrupt."""
    stopping = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return

    def stop(number: int, frame: Any) -> None:
        if stopping.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stopping.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
