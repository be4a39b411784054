"""`rlhf-ray submit` against a real cluster with token authentication: what runs, how it stops, goes on and fails, what is told."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from rlhf_ray.submit.nodes import PROBE
from tests.servers import free_ports

from .conftest import CANARIES, NODE_CANARIES

pytestmark = pytest.mark.integration
Submit = Callable[..., tuple[int, str]]


def adapter(run: Path) -> str:
    """sha256 of a run's adapter."""
    found = json.loads((run / "manifest.json").read_text())["files"]
    return next(entry["sha256"] for name, entry in found.items() if name.endswith("adapter_model.safetensors"))


def secret_values(cluster: Any) -> list[str]:
    """Of the submitter's environment, of the nodes', and the cluster's token."""
    return [*CANARIES.values(), *NODE_CANARIES.values(), cluster.token.read_text().strip()]


def no_secret_in(cluster: Any, *folders: Path) -> int:
    """Files looked at. Fails if one of them holds a secret, or if the job API tells one."""
    seen, values = 0, secret_values(cluster)
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file() and path != cluster.token:
                try:
                    content = path.read_bytes()
                except FileNotFoundError:  # of Ray's temporary ones
                    continue
                seen += 1
                for value in values:
                    assert value.encode() not in content, (value, path)
    told = json.dumps(cluster.api("/api/jobs/"))
    assert not any(secret in told for secret in (*values, *CANARIES))
    return seen


def no_secret_in_argv(cluster: Any) -> int:
    """Processes of the cluster looked at."""
    family = [p for root in cluster.processes for p in psutil.Process(root.pid).children(recursive=True)]
    for process in family:
        with contextlib.suppress(psutil.Error):
            words = " ".join(process.cmdline())
            assert not any(value in words for value in secret_values(cluster)), words
    return len(family)


def test_a_pipeline_stopped_by_ctrl_c_goes_on_when_it_is_submitted_again(
    cluster: Any, chain: Path, start_submit: Callable[..., Any], tmp_path: Path
) -> None:
    """Same adapter, byte for byte, as the same job file run here in one process."""
    run, log = tmp_path / "runs" / "all", tmp_path / "said.txt"
    ours, theirs = os.openpty()
    (tmp_path / "slowly").touch()  # so that it is not through before it is stopped
    with log.open("w") as said:
        process = start_submit("chain.yaml", "--no-check", stdin=theirs, stdout=said, start_new_session=True)
        wait(lambda: steps(run) >= 3, process, log)
        process.send_signal(signal.SIGINT)
        wait(lambda: "[s]top it" in log.read_text(), process, log)
        os.write(ours, b"s\n")
        code = process.wait(timeout=240)
    (tmp_path / "slowly").unlink()
    text = log.read_text()
    assert code == 75, text
    assert "SIGTERM; step" in text and 3 <= steps(run) < 48
    last = text.splitlines()[-1]
    command = re.search(r"was stopped; fix: to resume: rlhf-ray (submit .*)$", last)
    assert command, text
    sent = re.search(r"sent +([\d,]+) bytes: (.*)", text)
    assert sent and int(sent[1].replace(",", "")) < 1_000_000
    assert all(name in sent[2] for name in ("my_reward.py", "scale.py", "data/sft.jsonl", "rlhf_ray (")), sent[2]
    assert ".env" not in sent[2]

    words = shlex.split(command[1])
    again = subprocess.run(
        [sys.executable, "-m", "rlhf_ray.cli", *words],
        **{"env": cluster.environment, "cwd": tmp_path, "capture_output": True, "text": True, "timeout": 400},
    )
    assert again.returncode == 0, again.stderr
    assert "stage 2 of 2: ppo" in again.stderr and "ppo 48/48" in again.stderr
    here = subprocess.run(
        [
            sys.executable,
            "-m",
            "rlhf_ray.cli",
            "pipeline",
            "chain.yaml",
            "output_dir=runs/here",
            "learner.num_workers=0",
        ],
        **{"env": os.environ | {"OMP_NUM_THREADS": "1"}, "cwd": tmp_path, "capture_output": True, "text": True},
    )
    assert here.returncode == 0, here.stderr
    for stage in ("sft", "ppo"):
        assert adapter(run / stage) == adapter(tmp_path / "runs" / "here" / stage), stage
    names = [job["submission_id"] for job in cluster.api("/api/jobs/") if job["type"] == "SUBMISSION"]
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name) for name in names)


def steps(run: Path) -> int:
    try:
        lines = (run / "ppo" / "metrics.jsonl").read_text().splitlines()
        return max((int(json.loads(line)["step"]) for line in lines), default=0)
    except (OSError, ValueError):
        return 0


def wait(what: Callable[[], bool], process: Any, log: Path, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.2)


def test_the_nodes_are_asked_first(cluster: Any, chain: Path, submit: Submit) -> None:
    """A path that no node can read, a folder that none can write, a module that none has: told at once, nothing is submitted."""
    before = submitted(cluster)
    code, said = submit(
        *("chain.yaml", "model_name_or_path=/no/such/model", "output_dir=/proc/nothing/run"),
        'ppo.rewards=[{name: far, function: "no_such_module_here:score"}]',
    )
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 3 and len(lines) == 3, said
    assert re.search(r"model_name_or_path: node [\d.]+ ", said) and "cannot read /no/such/model: No such file" in said
    assert "has no module no_such_module_here" in said and "output_dir: node" in said
    assert submitted(cluster) == before, "the job was not submitted"
    time.sleep(3.0)  # Ray's own look at the job, beyond its end
    probes = [job for job in cluster.api("/api/jobs/") if str(job["submission_id"]).startswith(PROBE)]
    assert probes and {job["status"] for job in probes} == {"SUCCEEDED"}, probes


def submitted(cluster: Any) -> set[str]:
    return {j["submission_id"] for j in cluster.api("/api/jobs/") if not str(j["submission_id"]).startswith(PROBE)}


def test_a_missing_and_a_wrong_token_are_one_line(cluster: Any, chain: Path, submit: Submit, tmp_path: Path) -> None:
    none = {k: v for k, v in cluster.environment.items() if k != "RAY_AUTH_TOKEN_PATH"}
    code, said = submit("chain.yaml", env=none)
    assert (code, len(said.splitlines())) == (2, 1), said
    assert "requires a token, and none was found here; fix: copy ~/.ray/auth_token" in said
    wrong = tmp_path / "wrong"
    wrong.write_text("f" * 64)
    code, said = submit("chain.yaml", env=none | {"RAY_AUTH_TOKEN_PATH": str(wrong)})
    assert (code, len(said.splitlines())) == (2, 1), said
    assert f"refuses the token of {wrong}" in said and "ffff" not in said
    code, said = submit("chain.yaml", env=none | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")})
    assert code == 2 and "RAY_AUTH_TOKEN_PATH: cannot be read: No such file" in said


@pytest.mark.long
def test_exit_codes_are_those_of_the_job(cluster: Any, chain: Path, submit: Submit, tmp_path: Path) -> None:
    """A malformed row stops the job on the cluster with 4, and its line is shown."""
    rows = (tmp_path / "data" / "sft.jsonl").read_text().splitlines()
    (tmp_path / "data" / "sft.jsonl").write_text("\n".join([*rows[:3], '{"instruction": 7}', *rows[4:]]) + "\n")
    code, said = submit("chain.yaml", "output_dir=runs/bad")
    assert code == 4 and "error: data/sft.jsonl:4: " in said, said


@pytest.mark.long
def test_detached_with_rays_own_commands(cluster: Any, chain: Path, submit: Submit, tmp_path: Path) -> None:
    """And a second job on the same run folder is refused while the first one runs."""
    code, said = submit("chain.yaml", "output_dir=runs/alone", "ppo.max_steps=100000", "--detach", "--json")
    assert code == 0
    told = json.loads(said.splitlines()[-1])
    commands = dict(re.findall(r"^  (logs|status|stop) +(RAY_AUTH_MODE=token ray job .*)$", said, re.M))
    assert set(commands) == {"logs", "status", "stop"} and all(told["id"] in c for c in commands.values())
    code, again = submit("chain.yaml", "output_dir=runs/alone")
    assert code == 2 and f"is being written by job {told['id']}" in again and commands["stop"] in again, again
    for word, expected in (("status", "RUNNING|PENDING"), ("stop", "stopped|Attempting")):
        done = subprocess.run(
            ["bash", "-c", commands[word]], env=cluster.environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0 and re.search(expected, done.stdout + done.stderr), done.stderr


@pytest.mark.long
def test_a_sweep_is_submitted(cluster: Any, chain: Path, submit: Submit, tmp_path: Path) -> None:
    job = yaml.safe_load(chain.read_text())
    ppo = {**job["ppo"], "max_steps": 2, "eval_steps": 1, "lora": {"r": 4, "lora_alpha": 8}}
    shared = {k: job[k] for k in ("model_name_or_path", "template", "learner", "report_to")}
    sweep = {**shared, "output_dir": "runs/sweep", "ppo": ppo, "seeds": [0], "space": {"kl_coef": [0.0, 0.1]}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    code, said = submit("sweep.yaml")
    chosen = json.loads((tmp_path / "runs" / "sweep" / "sweep.json").read_text())["choice"]
    assert code == 0 and chosen["conclusion"] in said, said
    assert (tmp_path / "runs" / "sweep" / "report.html").is_file()
    code, said = submit("sweep.yaml")
    assert code == 0 and "is finished; nothing to do" in said


@pytest.mark.long
def test_a_service_is_submitted(cluster: Any, chain: Path, start_submit: Callable[..., Any], tmp_path: Path) -> None:
    """It answers, and Ray's own `stop` lets it drain."""
    import urllib.request

    (port,) = free_ports(1)
    base = yaml.safe_load(chain.read_text())["model_name_or_path"]
    job = {"output_dir": "runs/serve", "model_name_or_path": base, "port": port, "template": "none", "adapters": {}}
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(job))
    log = tmp_path / "said.txt"
    with log.open("w") as said:
        process = start_submit("serve.yaml", stdout=said)
        wait(lambda: "page       http://" in log.read_text(), process, log)
        body = json.dumps({"model": "base", "prompt": "Hello", "max_tokens": 4}).encode()
        ask = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(ask, timeout=60) as answer:
            assert json.loads(answer.read())["choices"]
            assert "x-rlhf-ray-places" not in answer.headers, (
                "admission control runs in Serve's proxy, and removes the header"
            )
        assert no_secret_in_argv(cluster) > 5
        (name,) = re.findall(r"^submit  (\S+)$", log.read_text(), re.M)
        subprocess.run(
            ["ray", "job", "stop", "--address", cluster.url, name],
            **{"env": cluster.environment | {"RAY_AUTH_MODE": "token"}, "capture_output": True, "timeout": 120},
        )
        assert process.wait(timeout=120) == 75
    assert "serve: stopped" in log.read_text()


def test_no_secret_is_anywhere(cluster: Any, tmp_path: Path) -> None:
    """Last in this module: run folders, Ray's logs, and what the job API tells of all the jobs above."""
    assert no_secret_in(cluster, cluster.folder, tmp_path.parent) > 50


@pytest.mark.long
def test_no_secret_of_a_sweep_or_a_service_is_anywhere(cluster: Any, tmp_path: Path) -> None:
    """The same after the long jobs."""
    assert no_secret_in(cluster, cluster.folder, tmp_path.parent) > 50
    assert list(tmp_path.parent.glob("test_a_service_is_submitted*/runs/serve")), "it was among them"
