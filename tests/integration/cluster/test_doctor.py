"""`rlhf-ray doctor` at a real cluster with a token, and at one without; the figures of a run on the metrics port."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.servers import free_ports

from .conftest import CANARIES, clean_environment

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[3]


def doctor(*words: str, environment: dict[str, str]) -> tuple[int, dict[tuple[str, str], dict[str, str]]]:
    """Exit code, and (about, name) -> finding."""
    command = [sys.executable, "-m", "rlhf_ray.cli", "doctor", "--json", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout, done.stderr
    return done.returncode, {(f["about"], f["name"]): f for f in json.loads(done.stdout)["findings"]}


def test_a_cluster_and_a_job(cluster: Any, chain: Path, tmp_path: Path) -> None:
    code, found = doctor("chain.yaml", "--address", cluster.url, environment=cluster.environment)
    failed = [f for f in found.values() if f["status"] == "fail"]
    assert code == 0 and not failed, failed
    told = {name: f["said"] for (about, name), f in found.items() if about == "cluster"}
    assert told["authentication"] == "on: GET /api/jobs/ without a token answers 401"
    assert "is accepted" in told["access"] and told["ray"].endswith(" everywhere")
    assert any(name.startswith("head ") and name.endswith(" memory") for name in told)
    assert told["storage"].startswith("every node can write and see ")
    job = {name: f["status"] for (about, name), f in found.items() if about == "job"}
    assert job["placement"] == job["model"] == job["pad token"] == job["template"] == "ok"


@pytest.mark.long
def test_without_a_token_it_fails_closed(cluster: Any, chain: Path) -> None:
    environment = {k: v for k, v in cluster.environment.items() if k != "RAY_AUTH_TOKEN_PATH"}
    code, found = doctor("--address", cluster.url, environment=environment)
    assert code == 3 and found["cluster", "access"]["status"] == "fail"
    assert "asks for a token" in found["cluster", "access"]["said"]


@pytest.mark.long
def test_the_script_of_local_nodes(chain: Path, tmp_path: Path) -> None:
    """Two nodes with a declared GPU each, from the script as it is; the doctor sees both; `stop` ends all of it."""
    import psutil

    port, dashboard, agent = free_ports(3)
    folder = Path(f"/tmp/rl{os.getpid()}")
    environment = clean_environment() | {
        "RLHF_RAY_CLUSTER": str(folder),
        "PORT": str(port),
        "DASHBOARD_PORT": str(dashboard),
        "AGENT_PORT": str(agent),
    }
    script = str(ROOT / "cluster" / "local_nodes.sh")
    try:
        started = subprocess.run(
            ["bash", script, "start", "2", "1"], env=environment, capture_output=True, text=True, timeout=200
        )
        assert started.returncode == 0, started.stderr
        assert len(list((folder / "pids").iterdir())) == 2 and (folder / "token").stat().st_mode & 0o077 == 0
        ours = clean_environment() | CANARIES | {"RAY_AUTH_TOKEN_PATH": str(folder / "token")}
        code, found = doctor("--address", f"http://127.0.0.1:{dashboard}", environment=ours)
        gpus = [f for (_, name), f in found.items() if name.endswith(" GPU")]
        assert code == 0 and len(gpus) >= 1, [f for f in found.values() if f["status"] == "fail"]
        assert (
            all("Ray has 1 GPUs declared, nvidia-smi shows 0" in f["said"] for f in gpus)
            or "1 GPU for Ray" in gpus[0]["said"]
        )
    finally:
        subprocess.run(["bash", script, "stop"], env=environment, capture_output=True, timeout=100)
    left = [p for p in psutil.process_iter(["cmdline", "status"]) if str(folder) in " ".join(p.info["cmdline"] or ())]
    assert not [p for p in left if p.info["status"] != psutil.STATUS_ZOMBIE], left
    subprocess.run(["rm", "-rf", str(folder)], check=False)


@pytest.mark.long
def test_a_runs_figures_are_on_the_metrics_port(cluster: Any, chain: Path, start_submit: Any, tmp_path: Path) -> None:
    """Scraped while it runs, where Ray tells Prometheus to look."""
    import time

    process = start_submit(
        "chain.yaml", "run_name=watched", "ppo.max_steps=4000", "output_dir=runs/watched", "--no-check"
    )
    wanted = {"reward", "kl_per_response", "phase_seconds", "tokens_per_second"}  # of PPO: SFT, before it, has others
    deadline, seen, names = time.monotonic() + 300, "", set[str]()
    while not wanted <= names:
        assert time.monotonic() < deadline and process.poll() is None, seen[-2000:]
        time.sleep(2)
        seen = ""
        services = json.loads((cluster.folder / "prom_metrics_service_discovery.json").read_text())
        targets = [target for service in services for target in service["targets"]]
        for target in targets:  # two of them are fixed ports, which another Ray of this machine may have
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
                seen += (
                    "\n".join(line for line in answer.read().decode().splitlines() if 'run="watched"' in line) + "\n"
                )
        names = set(re.findall(r"^ray_rlhf_ray_run_(\w+)\{", seen, re.M))
    jobs = [j for j in cluster.api("/api/jobs/") if j["type"] == "SUBMISSION" and j["status"] == "RUNNING"]
    words = ["ray", "job", "stop", "--address", cluster.url, jobs[0]["submission_id"]]
    subprocess.run(words, env=cluster.environment | {"RAY_AUTH_MODE": "token"}, capture_output=True, timeout=120)
    assert process.wait(timeout=120) == 75
