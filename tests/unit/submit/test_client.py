"""Addresses, tokens, and what a cluster says before anything is sent to it. Real clusters: tests/integration/cluster."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_ray.errors import ConfigError, Interrupted, ResourceError
from rlhf_ray.submit import follow, nodes
from rlhf_ray.submit.client import AuthToken, check_address, connect, find_token, look
from rlhf_ray.submit.follow import _Lines, outcome
from rlhf_ray.submit.pack import Need
from rlhf_ray.submit.submission import Submitted


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "https://ray.example.com", "http://[::1]:8265/"])
def test_addresses_of_dashboards(address: str) -> None:
    assert check_address(address) == address.rstrip("/")


@pytest.mark.parametrize(
    "address",
    [
        "",
        "127.0.0.1:8265",
        "ray://head:10001",
        "auto",
        "http://",
        "http://user:secret@head:8265",
        "http://head:99999999",
    ]
    + ["http://head:8265?x=1", "file:///etc/passwd"],
)
def test_other_addresses_are_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="--address") as refused:
        check_address(address)
    assert "secret" not in str(refused.value)


def test_the_token_comes_from_where_ray_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_token({}) is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("home\n")
    (tmp_path / "other").write_text("other\n")
    assert find_token({}) == AuthToken("home", "~/.ray/auth_token")
    assert find_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "other")}) == AuthToken("other", str(tmp_path / "other"))
    assert find_token({"RAY_AUTH_TOKEN_PATH": "/none", "RAY_AUTH_TOKEN": "own"}) == AuthToken("own", "RAY_AUTH_TOKEN")
    with pytest.raises(ConfigError, match="cannot be read"):
        find_token({"RAY_AUTH_TOKEN_PATH": "/none"})
    with pytest.raises(ConfigError, match="contains no token"):
        find_token({"RAY_AUTH_TOKEN": "two lines\nX-Evil: 1"})
    assert "own" not in repr(AuthToken("own", "RAY_AUTH_TOKEN"))


@pytest.fixture
def server() -> Iterator[Callable[..., str]]:
    """server(status, location="") -> the address of a server that answers so, and notes the headers it was sent."""
    running: list[HTTPServer] = []

    def start(status: int, location: str = "") -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                made.seen.append(self.headers.get("Authorization"))  # type: ignore[attr-defined]
                self.send_response(status)
                if location:
                    self.send_header("Location", location)
                self.end_headers()

            def log_message(self, *arguments: Any) -> None:
                pass

        made = HTTPServer(("127.0.0.1", 0), Handler)
        made.seen = []  # type: ignore[attr-defined]
        running.append(made)
        threading.Thread(target=made.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{made.server_port}"

    start.running = running  # type: ignore[attr-defined]
    yield start
    for each in running:
        each.shutdown()


def test_a_token_does_not_follow_a_redirect(server: Any) -> None:
    other = server(200)
    first = server(302, f"{other}/api/jobs/")
    assert look(first, AuthToken("t", "here")).status == 302
    assert server.running[0].seen == []


def test_what_is_no_cluster_is_told_in_a_line(server: Any) -> None:
    with pytest.raises(
        ResourceError, match="does not answer as Ray does; expected a Ray dashboard; got HTTP status 404"
    ):
        connect(server(404), print)
    with pytest.raises(ResourceError, match=r"cannot be reached: .*refused; fix: is the cluster up\? .* ssh -L"):
        connect("http://127.0.0.1:9", print)


def test_a_port_of_another_protocol_and_a_proxy_are_told(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The port of Ray's control service, given in place of the dashboard's; a proxy of the environment that answers 404."""
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer() -> None:
            one, _ = other.accept()
            with one:
                one.recv(1000)
                one.sendall(b"\0\0\x18\x04\0\0\0\0\0\0\x04\0?\xff\xff\r\n")

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(ResourceError, match="what listens there does not speak HTTP"):
            connect(f"http://127.0.0.1:{other.getsockname()[1]}", print)
    monkeypatch.setenv("http_proxy", server(404))
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(ResourceError, match=r"got HTTP status 404; fix: name the port .*: NO_PROXY=head\.example"):
        connect("http://head.example:8265", print)


def test_this_machine_is_not_asked_through_a_proxy(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tunnel to the cluster, under proxy variables (issue 16, inputs 23): the proxy was asked, and sent the token."""
    import requests

    monkeypatch.setenv("NO_PROXY", "head.example")
    monkeypatch.setenv("no_proxy", "head.example")
    proxy, cluster = server(502), server(200)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, proxy)
    assert look(cluster, AuthToken("t", "here")).status == 200
    assert requests.get(cluster, timeout=5).status_code == 200  # as Ray's own client asks
    assert [made.seen for made in server.running] == [[], ["Bearer t", None]]
    assert os.environ["NO_PROXY"] == os.environ["no_proxy"] == "head.example,127.0.0.1"
    assert look("http://elsewhere.example:8265").status == 502
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(
        ResourceError, match=r"refused; fix: .* through a proxy; NO_PROXY=elsewhere\.example goes around"
    ):
        connect("http://elsewhere.example:8265", print)


# ---------------------------------------------------------------- the end of a job


def details(status: str, code: int | None = None, message: str = "", error_type: str | None = None) -> Any:
    told = {"driver_exit_code": code, "submission_id": "run-1", "message": message, "error_type": error_type}
    return SimpleNamespace(status=SimpleNamespace(value=status, is_terminal=lambda: True), **told)


def test_the_exit_code_is_the_jobs() -> None:
    assert outcome(details("SUCCEEDED", 0), "x") == 0
    assert [outcome(details("FAILED", code), "x") for code in (1, 2, 3, 4, 5, 75)] == [1, 2, 3, 4, 5, 75]
    for found in (details("STOPPED"), details("FAILED", -9), details("FAILED", 137)):
        with pytest.raises(Interrupted, match=r"to resume: rlhf-ray submit job\.yaml"):
            outcome(found, "rlhf-ray submit job.yaml")
    with pytest.raises(ResourceError, match="could not be started; got no room"):
        outcome(details("FAILED", None, "Traceback\nno room", "JOB_SUPERVISOR_ACTOR_UNSCHEDULABLE"), "x")
    node_died = details("FAILED", None, "The actor died because its node has died.", "JOB_SUPERVISOR_ACTOR_DIED")
    with pytest.raises(Interrupted, match=r"or its node did; got The actor died .*; fix: to resume: rlhf-ray submit j"):
        outcome(node_died, "rlhf-ray submit job.yaml")


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_quiet_job_is_followed_through_a_cut_and_a_lost_cluster_is_given_up(
    console: Any, monkeypatch: pytest.MonkeyPatch, comes_back: bool
) -> None:
    """What counts is for how long the cluster has not answered, not for how long the job has said nothing."""
    monkeypatch.setattr(follow, "LOST_S", 0.3)
    monkeypatch.setattr(follow, "RECONNECT_S", 0.02)

    class Cut:
        """Cut after a silence longer than LOST_S."""

        url, connections = "http://head:8265", 0

        async def tail(self, submission_id: str) -> AsyncIterator[str]:
            self.connections += 1
            if self.connections == 1:
                yield "one\n"
                await asyncio.sleep(0.5)
            if self.connections == 1 or not comes_back:
                raise ConnectionResetError("the tunnel was restarted")
            yield "one\ntwo\n"

        def details(self, submission_id: str) -> Any:
            return details("SUCCEEDED", 0)

    def followed() -> int | None:
        return follow.follow(Cut(), "run-1", console, "again", "rlhf-ray logs run-1")  # type: ignore[arg-type]

    if comes_back:
        assert followed() == 0
        assert [event["text"] for event in console.events if event["kind"] == "log"] == ["one", "two"]
    else:
        with pytest.raises(
            ResourceError, match=r"has not been reached for 0\.3 s; .*follow it again: rlhf-ray logs run-1"
        ):
            followed()


def test_progress_and_warnings_of_the_log_stay_what_they_are(console: Any) -> None:
    lines = _Lines(console)
    for piece in (
        "2026-11-21 20:42:14,704\tINFO job_manager.py:581 -- Runtime env is setting up.\nRunning entrypoint for job x\nsta",
        "ge 1 of 2: sft\nppo 3/40   reward/mean 0.51  kl/coef 1e-3   2.0 s left\n",
    ):
        lines.add(piece)
    lines.add("warning: slow\nerror: x: bad")
    lines.close()
    kinds = [event["kind"] for event in console.events]
    assert kinds == ["log", "progress", "warn", "log", "done"]
    assert console.events[1]["shown"] == {"reward/mean": 0.51, "kl/coef": 1e-3} and console.events[1]["total"] == 40


def test_rays_commands_are_quoted_and_name_no_token() -> None:
    lines = Submitted("run-1", "http://h:8265", True, "/shared/run").lines()
    assert lines[2] == "stop    RAY_AUTH_MODE=token ray job stop --address http://h:8265 run-1"


# ---------------------------------------------------------------- what the nodes say


def test_probes_of_some_time_ago_are_forgotten() -> None:
    """Not the one of just now, which Ray would list again, and no job of anybody's."""
    now = time.time() * 1000
    gone: list[str] = []
    listed = [
        ("rlhf-ray-probe-1", now - 100_000),
        ("rlhf-ray-probe-2", now - 1000),
        ("mine", 1.0),
        ("rlhf-ray-probe-3", None),
    ]
    jobs = [SimpleNamespace(submission_id=name, end_time=ended) for name, ended in listed]
    nodes._forget_old(SimpleNamespace(jobs=lambda: jobs, delete=gone.append))  # type: ignore[arg-type]
    assert gone == ["rlhf-ray-probe-1"]


def node(address: str = "10.0.0.1", **said: Any) -> dict[str, Any]:
    versions = dict.fromkeys(nodes.PACKAGES, "1")
    plain = {"address": address, "hostname": "h", "python": "3.11.9", "versions": versions, "read": {}, "modules": {}}
    return {**plain, "folder": "/shared", "writable": "", "shared": True, **said}


def test_all_that_nodes_lack_is_told_at_once() -> None:
    needs = [Need("sft", "folder", "/shared/sft"), Need("rewards[0].function", "module", "mine")]
    answers = [
        node(read={"/shared/sft": ""}, modules={"mine": True}),
        node("10.0.0.2", read={"/shared/sft": "No such file or directory"}, modules={"mine": False}, shared=False),
        node("10.0.0.3", error="it died"),
        node("10.0.0.4", versions={**node()["versions"], "peft": None}),
    ]
    with pytest.raises(ResourceError) as refused:
        nodes.judge(answers, needs, "/shared/run", print)
    told = [str(problem) for problem in refused.value.problems]
    assert len(told) == 5
    for part in ("10.0.0.3 (h): does not answer", "10.0.0.4 (h): lacks peft", "sft: node 10.0.0.2 (h) cannot read /shared/sft",
                 "has no module mine", "10.0.0.2 (h) cannot see it"):  # fmt: skip
        assert any(part in line for line in told), part


def test_nodes_that_lack_the_same_share_a_line() -> None:
    """Two nodes of one machine have one name; more than three are counted."""
    why = {"/m": "No such file or directory"}
    answers = [node(read=why), node(read=why), *(node(f"10.0.0.{n}", read=why) for n in range(2, 6)), node("10.0.0.9")]
    with pytest.raises(ResourceError) as refused:
        nodes.judge(answers, [Need("model_name_or_path", "folder", "/m")], "/shared/run", print)
    (told,) = refused.value.problems
    first = "model_name_or_path: node 10.0.0.1 (h) x 2, node 10.0.0.2 (h), node 10.0.0.3 (h) and 2 more cannot read /m: No such"
    assert str(told).startswith(first)


def test_a_folder_that_cannot_be_written_is_told_once() -> None:
    answers = [node(a, writable="Permission denied", shared=False) for a in ("10.0.0.1", "10.0.0.2")]
    with pytest.raises(ResourceError, match=r"cannot write in /shared: Permission denied") as refused:
        nodes.judge(answers, [], "/shared/run", print)
    assert len(refused.value.problems) == 1


def test_other_versions_are_a_warning() -> None:
    said: list[str] = []
    nodes.judge([node()], [], "/shared/run", said.append)
    assert any(line.startswith("torch is 1 on the cluster, ") for line in said)


def test_the_package_is_left_out_where_every_node_has_this_very_one() -> None:
    from rlhf_ray.submit.probe import package_sha256

    mine = package_sha256()
    assert nodes.has_package([node(package=mine)] * 2)
    assert not nodes.has_package([node(package=mine), node(package=None)])
