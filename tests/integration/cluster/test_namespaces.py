"""Three Ray nodes with addresses of their own, in network namespaces on this machine: split PPO across them, and a cable is cut.

Needs root and iproute2; skipped, saying so, where namespaces cannot be made."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from .conftest import clean_environment

pytestmark = [pytest.mark.integration, pytest.mark.long]
SUBNET = "10.207.83"
RAY = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
HEALTH = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
"""A node that is cut off is given up after some 5 s, not half a minute."""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=30)


@dataclass
class Machines:
    """name: of the bridge and the beginning of all other names.  processes: what runs on the nodes."""

    name: str
    folder: Path
    environment: dict[str, str]
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def namespace(self, number: int) -> str:
        return f"{self.name}n{number}"

    def address(self, number: int) -> str:
        return f"{SUBNET}.{number + 1}"

    def start(self, number: int, *words: str, log: str, **options: Any) -> subprocess.Popen[bytes]:
        with (self.folder / log).open("wb") as out:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace(number), *words],
                **{
                    "stdout": out,
                    "stderr": subprocess.STDOUT,
                    "env": self.environment,
                    "start_new_session": True,
                    **options,
                },
            )
        self.processes.append(process)
        return process

    def head(self, *options: str) -> None:
        """Start Ray's head on node 0."""
        place = [f"--node-ip-address={self.address(0)}", f"--temp-dir={self.folder}/ray", "--include-dashboard=false"]
        self._ray(0, [*RAY, "--head", "--port=6379", *place, *options])

    def join(self, number: int, *options: str, disk: Path | None = None) -> None:
        """Start Ray on another node, after those before: two that start at once choose the same names for their sockets.

        disk: a folder where the node has a disk of its own."""
        place = [f"--address={self.address(0)}:6379", f"--node-ip-address={self.address(number)}"]
        mount = [] if disk is None else ["sh", "-c", f'mount -t tmpfs none {disk} && exec "$@"', "sh"]
        self._ray(number, [*mount, *RAY, *place, *options])

    def _ray(self, number: int, words: list[str]) -> None:
        self.start(number, *words, "--object-store-memory=150000000", log=f"{number}.log")
        log, deadline = self.folder / f"{number}.log", time.monotonic() + 240
        while "Ray runtime started" not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)

    def drive(self, *words: str, cwd: Path) -> subprocess.Popen[bytes]:
        """`rlhf-ray WORDS` on node 0. What it says is in driver.log."""
        self.environment["RAY_ADDRESS"] = f"{self.address(0)}:6379"
        return self.start(0, sys.executable, "-m", "rlhf_ray.cli", *words, log="driver.log", cwd=cwd)

    def cut(self, number: int) -> None:
        """Pull the node's cable."""
        ip("link", "set", f"{self.name}v{number}", "down")


@pytest.fixture
def machines() -> Iterator[Machines]:
    name = f"rr{os.getpid() % 100000}"
    folder = Path(tempfile.mkdtemp(prefix="rn", dir="/tmp"))
    token = folder / "token"
    token.write_text("5" * 64)
    token.chmod(0o600)
    auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    made = Machines(name, folder, clean_environment() | auth | HEALTH)
    try:
        ip("link", "add", name, "type", "bridge")
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"network namespaces cannot be made here: {error}")
    try:
        ip("link", "set", name, "up")
        for number in range(3):
            space, ours, theirs = made.namespace(number), f"{name}v{number}", f"{name}p{number}"
            ip("netns", "add", space)
            ip("link", "add", ours, "type", "veth", "peer", "name", theirs)
            ip("link", "set", ours, "master", name, "up")
            ip("link", "set", theirs, "netns", space)
            ip("-n", space, "addr", "add", f"{made.address(number)}/24", "dev", theirs)
            ip("-n", space, "link", "set", theirs, "up")
            ip("-n", space, "link", "set", "lo", "up")
        yield made
    finally:
        family = []
        for process in made.processes:
            if process.poll() is None:
                family += [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for process in family:
            process.terminate()
        for process in psutil.wait_procs(family, timeout=20)[1]:
            process.kill()
        for number in range(3):
            subprocess.run(["ip", "netns", "delete", made.namespace(number)], capture_output=True, check=False)
        subprocess.run(["ip", "link", "delete", name], capture_output=True, check=False)
        subprocess.run(["rm", "-rf", str(folder)], check=False)


def steps(run: Path) -> int:
    try:
        return max(
            (int(json.loads(line)["step"]) for line in (run / "metrics.jsonl").read_text().splitlines()), default=0
        )
    except (OSError, ValueError):
        return 0


def test_a_generator_node_is_cut_off_in_the_middle_of_a_run(machines: Machines, chain: Path, tmp_path: Path) -> None:
    """The learner's node and two nodes of generators; when one of them is cut off, the other does all chunks, and the run ends."""
    machines.head("--num-cpus=3", "--labels=place=learner")
    for number in (1, 2):
        machines.join(number, "--num-cpus=1", "--labels=place=rollouts")

    job = yaml.safe_load(chain.read_text())
    apart = {"num_threads": 1, "num_cpus": 1, "num_gpus": 0.0, "label_selector": {"place": "rollouts"}}
    here = {"num_threads": 1, "num_gpus": 0.0, "label_selector": {"place": "learner"}}
    ppo = {
        **job["ppo"],
        "placement": "split",
        "max_steps": 20,
        "wait_for_resources": 60,
        "lora": {"r": 4, "lora_alpha": 8},
    }
    ppo |= {"generator": {**apart, "num_actors": 2, "timeout_s": 60}, "scorer": {**here, "num_cpus": 1}}
    shared = {k: job[k] for k in ("model_name_or_path", "template", "report_to")}
    run = tmp_path / "runs" / "split"
    text = yaml.safe_dump({**shared, **ppo, "output_dir": str(run), "learner": {**here, "num_workers": 1}})
    (tmp_path / "ppo.yaml").write_text(text)
    driver = machines.drive("ppo", "ppo.yaml", cwd=tmp_path)
    log = machines.folder / "driver.log"

    deadline = time.monotonic() + 300
    while steps(run) < 4:
        assert driver.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.2)
    addresses = set(re.findall(r"generator \d.*? on ([\d.]+) ", log.read_text()))
    assert addresses == {machines.address(1), machines.address(2)}, log.read_text()
    machines.cut(2)
    at = steps(run)
    assert driver.wait(timeout=400) == 0, log.read_text()[-4000:]
    assert steps(run) == 20 and at < 20
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum(row.get("faults/retries", 0) for row in rows) >= 1, "the chunk that was away was done again"
    late = (run / "roles.log").read_text().splitlines()[-1]
    assert "generator" in late, late


def test_a_run_folder_that_another_node_does_not_see(machines: Machines, chain: Path, tmp_path: Path) -> None:
    """Fault 55: a learner that may come to a node with a disk of its own is refused before it starts, with the node's name."""
    own = tmp_path / "own"
    own.mkdir()
    machines.head("--num-cpus=2")
    machines.join(1, "--num-cpus=1", "--labels=place=far", disk=own)
    job = yaml.safe_load(chain.read_text())
    shared = {k: job[k] for k in ("model_name_or_path", "template", "report_to")}
    learner = {"num_workers": 1, "num_threads": 1, "label_selector": {"place": "far"}}
    (tmp_path / "sft.yaml").write_text(
        yaml.safe_dump({**shared, **job["sft"], "output_dir": "own/run", "learner": learner})
    )
    driver = machines.drive("sft", "sft.yaml", cwd=tmp_path)
    code, said = driver.wait(timeout=240), (machines.folder / "driver.log").read_text()
    assert code == 2, said
    node = re.escape(machines.address(1))
    assert re.search(
        rf"^error: output_dir: {own} is not visible on node {node} \(node \w+\); expected .*; fix: ", said, re.M
    )
    assert not list(own.iterdir())
