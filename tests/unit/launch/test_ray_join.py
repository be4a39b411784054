"""A Ray that is given and not there, or of another version, is told in one line, in seconds."""

from __future__ import annotations

import http.server
import os
import platform
import socket
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from rlhf_ray.errors import ConfigError, ResourceError
from rlhf_ray.launch.preflight import given_address
from rlhf_ray.launch.ray_cluster import NO_GRPC_PROXY, _on_loopback, _past_the_proxy, check_socket_paths
from rlhf_ray.launch.ray_join import ANSWER_S, cannot_join, check_is_there


@pytest.fixture
def web() -> Iterator[int]:
    """The port of something that listens and is no Ray."""
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    server.RequestHandlerClass.log_message = lambda *_: None  # type: ignore[method-assign, assignment]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def test_nobody_there() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"  # ours as long as the block lasts, and nobody listens
        with pytest.raises(ResourceError) as caught:
            check_is_there(("RAY_ADDRESS", address))
    assert caught.value.lines() == [
        f"error: RAY_ADDRESS: no Ray answers at {address}: Connection refused; expected a running cluster; "
        "fix: start it; or, to let the job start its own Ray, unset RAY_ADDRESS"
    ]
    with pytest.raises(ResourceError, match=r"no Ray answers at nobody.invalid:6379: "):
        check_is_there(("RAY_ADDRESS", "nobody.invalid:6379"))


def test_somebody_else_there(web: int) -> None:
    """It takes connections, and Ray would wait for an answer for minutes."""
    started = time.monotonic()
    with pytest.raises(
        ResourceError, match=f"what answers at 127.0.0.1:{web} is not Ray's control service; expected its"
    ):
        check_is_there(("RAY_ADDRESS", f"127.0.0.1:{web}"))
    assert time.monotonic() - started < ANSWER_S + 5


def test_the_address_of_a_dashboard() -> None:
    with pytest.raises(ConfigError, match=r"address of a dashboard; .*rlhf-ray submit JOB --address http://head:8265"):
        check_is_there(("RAY_ADDRESS", "http://head:8265"))


@pytest.mark.parametrize("address", ["auto", "local", "ray://head:10001"])
def test_what_only_ray_can_tell(address: str) -> None:
    check_is_there(("RAY_ADDRESS", address))


def test_a_cluster_that_ended_without_ray_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its address is still on this machine, and Ray would believe it."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    file = tmp_path / "ray" / "ray_current_cluster"
    file.parent.mkdir()
    file.write_text("127.0.0.1:1")
    assert given_address() == (str(file), "127.0.0.1:1")
    with pytest.raises(ResourceError, match=r"ray_current_cluster: no Ray answers at 127.0.0.1:1: .*run `ray stop`"):
        check_is_there(given_address())
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.7:6379")
    assert given_address() == ("RAY_ADDRESS", "10.0.0.7:6379")


def test_another_version_of_ray_or_python_is_refused_with_both_side_by_side() -> None:
    """Fault 62, in the words with which Ray itself refuses."""
    import ray
    from ray._private.utils import check_version_info

    with pytest.raises(RuntimeError) as caught:
        check_version_info({"ray_version": "2.9.3", "python_version": "3.8.18"}, "node 10.0.0.7")
    told = cannot_join(caught.value)
    ours = f"Ray {ray.__version__}, Python {platform.python_version()}"
    assert isinstance(told, ConfigError) and told.lines() == [
        "error: ray: the cluster runs other versions than this process; expected Ray 2.9.3, Python 3.8.18; "
        f"got {ours}; fix: run this command in the cluster's environment, or start the cluster from this one"
    ]
    assert cannot_join(RuntimeError("something else")) is None


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_temporary_folder_with_a_long_name_is_told_before_ray_starts(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """Issue 16, inputs 22: it was 'a bug in rlhf_ray: OSError'. The boundary is Ray's own."""
    from ray._private.utils import validate_socket_filepath

    session = f"ray/session_{datetime.now():%Y-%m-%d_%H-%M-%S_%f}_{os.getpid()}/sockets/plasma_store"
    longest = next(n for n in range(107, 0, -1) if len(os.path.join("x" * n, session)) <= 107)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv(variable, "x" * longest)
    check_socket_paths()
    validate_socket_filepath(os.path.join("x" * longest, session))
    monkeypatch.setenv(variable, "x" * (longest + 1))
    with pytest.raises(ResourceError, match=f"{variable}: too long: .* at most {longest} letters; got {longest + 1}"):
        check_socket_paths()
    with pytest.raises(OSError, match="AF_UNIX"):
        validate_socket_filepath(os.path.join("x" * (longest + 1), session))


@pytest.mark.parametrize("given", [None, "corp"])
def test_what_our_own_ray_needs_of_the_environment_ends_with_it(
    given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(NO_GRPC_PROXY, raising=False)
    if given is not None:
        monkeypatch.setenv(NO_GRPC_PROXY, given)
    before = dict(os.environ)
    with _past_the_proxy(), _on_loopback():
        assert "127.0.0.1" in os.environ[NO_GRPC_PROXY].split(",") and os.environ != before
    assert dict(os.environ) == before
