"""What the doctor makes of a machine, of what nodes say, and of models. Real clusters: tests/integration/cluster."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.cli import main
from rlhf_ray.doctor import cluster as there
from rlhf_ray.doctor import here, job
from rlhf_ray.doctor.checks import CheckResult, room, text, to_json
from rlhf_ray.plan.memory import GIB
from rlhf_ray.submit import client, nodes


def named(found: Any, name: str) -> CheckResult:
    (one,) = [f for f in found if f.name == name]
    return one


def test_this_machine_in_lines_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert code == (0 if told["healthy"] else 3)
    names = {f["name"]: f["status"] for f in told["findings"]}
    assert names["python"] == names["packages"] == "ok"
    assert {"GPU", "memory", "disk", "flash-attn", "bitsandbytes"} <= names.keys() or "GPU 0" in names


def test_a_failure_is_exit_code_3_and_names_its_fix(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(here, "PYTHONS", ())
    assert main(["doctor"]) == 3
    assert "fail  python" in (out := capsys.readouterr().out) and "fix: use Python 3.11 or 3.12" in out


def test_a_missing_or_other_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from packaging.specifiers import SpecifierSet

    monkeypatch.setattr(here, "_required", lambda: [("ray", SpecifierSet("==1.*")), ("no-such-thing", SpecifierSet())])
    found = named(here._python(), "packages")
    assert found.status == "fail" and "(needs ==1.*)" in found.said and "no-such-thing is missing" in found.said


def test_a_token_that_others_can_read_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = tmp_path / "token"
    token.write_text("x")
    token.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    assert named(here._token(), "token file").fix == f"chmod 600 {token}"
    token.chmod(0o600)
    assert named(here._token(), "token file").status == "ok"


@pytest.mark.parametrize(("free", "status"), [(0.4, "fail"), (2.0, "warn"), (9.0, "ok"), (None, "warn")])
def test_room(free: float | None, status: str) -> None:
    bytes_free = None if free is None else free * GIB
    assert room("x", "disk", bytes_free, 0.5 * GIB, 5 * GIB, "free some").status == status


def test_lines_show_the_fix_of_what_is_not_ok() -> None:
    found = [CheckResult("here", "a", "ok", "fine", "unused"), CheckResult("there", "b", "warn", "odd", "mend it")]
    assert text(found).splitlines() == [
        "here",
        "  ok    a  fine",
        "there",
        "  warn  b  odd; fix: mend it",
        "1 ok, 1 warn, 0 fail",
    ]
    assert to_json(found)["healthy"]


# ---------------------------------------------------------------- nodes


def node(address: str = "10.0.0.2", **said: Any) -> dict[str, Any]:
    mine = nodes.own_versions()
    plain: dict[str, Any] = {
        "address": address,
        "hostname": "h",
        "resources": {"CPU": 8.0, "GPU": 2.0},
        "labels": {},
        "python": mine["python"],
        "versions": mine,
        "user": 1000,
        "gpus": [{"name": "A100", "bytes": 80 * GIB, "driver": "570"}] * 2,
        **dict.fromkeys(("memory_free", "disk_free", "shm_free"), 50 * GIB),
        "listening": [],
        "folder": "/shared",
        "writable": "",
        "shared": True,
        "read": {},
    }
    return {**plain, **said}


class Cluster:
    url = "http://127.0.0.1:8265"

    def __init__(self, token: str | None = "t") -> None:
        self.token = token


def test_versions_stand_side_by_side_and_differences_of_ray_and_python_fail() -> None:
    other = {**nodes.own_versions(), "ray": "2.1.0", "torch": "2.0.0", "peft": None}
    found = list(there._versions([node(), node("10.0.0.3", versions=other, python="3.12.1")]))
    status = {f.name: f.status for f in found}
    assert (status["ray"], status["python"], status["torch"], status["peft"], status["datasets"]) == (
        *("fail", "fail", "warn", "fail", "ok"),
    )
    assert "10.0.0.3 2.1.0" in named(found, "ray").said and named(found, "ray").said.startswith("here ")


def test_declared_gpus_are_told_from_real_ones() -> None:
    assert named(there._node(node()), "node 10.0.0.2 GPU").status == "ok"
    found = named(there._node(node(gpus=[])), "node 10.0.0.2 GPU")
    assert (found.status, found.said) == ("warn", "Ray has 2 GPUs declared, nvidia-smi shows 0")
    assert "node 10.0.0.2 user" not in {f.name for f in there._node(node())}
    assert named(there._node(node(user=0)), "node 10.0.0.2 user").status == "warn"


@pytest.mark.parametrize(
    ("listening", "token", "status"),
    [
        ([], "t", "ok"),
        ([["all", 6379]], "t", "ok"),
        ([["all", 8265]], "t", "warn"),
        ([["one", 10001]], "t", "warn"),
        ([["all", 6379]], None, "fail"),
        ([["all", 22]], None, "ok"),
    ],
)
def test_open_ports(listening: list[Any], token: str | None, status: str) -> None:
    (found,) = there._ports([node(listening=listening)], Cluster(token))  # type: ignore[arg-type]
    assert found.status == status


def test_the_ports_of_this_very_cluster_are_known() -> None:
    (found,) = there._ports([node(listening=[["all", 6400]], gcs="10.0.0.2:6400")], Cluster())  # type: ignore[arg-type]
    assert found.said == "open beyond loopback: GCS 6400"


def test_nodes_of_one_machine_are_numbered() -> None:
    answers = [node(), node(), node("10.0.0.3")]
    there._name(answers)
    assert [there.called(n) for n in answers] == ["node 10.0.0.2", "node 10.0.0.2 #2", "node 10.0.0.3"]


def test_nothing_is_said_of_a_cluster_none_of_whose_nodes_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(there.ask_nodes, "ask", lambda *_: [{**node(), "error": "no worker started"}])
    talking, found = there.nodes(Cluster(), "/shared", ["/data"])  # type: ignore[arg-type]
    assert talking == [] and [f.status for f in found] == ["fail"] and "no worker started" in found[0].said


@pytest.mark.parametrize("status", [404, 500])
def test_what_is_no_ray_is_not_said_to_lack_authentication(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(there, "look", lambda url: client.HttpAnswer(status))
    monkeypatch.setattr(client, "look", lambda url, *rest: client.HttpAnswer(status))
    cluster, found = there.access("http://127.0.0.1:8265")
    assert cluster is None and {f.name: f.status for f in found} == {"address": "ok", "access": "fail"}
    assert f"got HTTP status {status}" in found[-1].said and str(found[-1]).count("fix:") == 1


def test_storage_that_is_not_shared_fails() -> None:
    apart = [node(), node("10.0.0.3", shared=False, read={"/m": "No such file or directory"})]
    found = list(there._storage(apart, "/shared/run", ["/m"]))
    assert [f.status for f in found] == ["fail", "fail"] and "10.0.0.3 (h) cannot see it" in found[0].said
    assert [f.status for f in there._storage([node()], "/shared/run", [])] == ["ok"]
    refused = list(there._storage([node(writable="Permission denied")], "/shared/run", []))
    assert [f.status for f in refused] == ["fail"] and "Permission denied" in refused[0].said


# ---------------------------------------------------------------- models


def test_tokens_of_a_sane_model(tiny_llama: Callable[..., Path]) -> None:
    found = list(job.tokens(str(tiny_llama()), None, "alpaca"))
    assert {f.status for f in found} == {"ok"} and [f.name for f in found] == [
        "model",
        "end tokens",
        "pad token",
        "template",
    ]


def test_pad_that_is_eos_is_replaced_and_told(tiny_llama: Callable[..., Path]) -> None:
    found = named(job.tokens(str(tiny_llama(pad="</s>")), None, None), "pad token")
    assert "its pad is its end token" in found.said


def test_what_is_no_model_or_template_is_told(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    (found,) = job.tokens(str(tmp_path), None, "alpaca")
    assert found.status == "fail" and found.name == "model"
    assert named(job.tokens(str(tiny_llama()), None, "chat"), "template").status == "fail"


def test_a_job_in_4_bits_needs_bitsandbytes(tiny_llama: Callable[..., Path]) -> None:
    from rlhf_ray.config.serve import ServeConfig

    config = ServeConfig(output_dir="x", model_name_or_path="y", load_in_4bit=True)
    missing = CheckResult("this machine", "bitsandbytes", "ok", "not installed; ...")
    works = CheckResult("this machine", "bitsandbytes", "ok", "0.50 works on the cpu")
    assert [f.status for f in job.quantised(config, missing)] == ["fail"] and not list(job.quantised(config, works))
