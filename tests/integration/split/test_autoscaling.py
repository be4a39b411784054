"""A cluster that grows: Ray's own autoscaler (v2, as under KubeRay) with its fake provider: its nodes are raylets on this machine.

A head of 1 CPU, and up to two nodes of 2 CPU and 1 GPU, none of which is up."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlhf_ray.config import PPOConfig
from rlhf_ray.config.resolved import dump_yaml
from tests.servers import free_ports

pytestmark = [pytest.mark.integration, pytest.mark.long]
HEAD = "f" * 51 + "00000"
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"


def settings(address: str) -> dict[str, Any]:
    """A cluster file as `ray up` would hand it over. Its provider makes nodes that join `address`."""
    kinds: dict[str, Any] = {
        "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
        "gpu": {
            "resources": {"CPU": 2, "GPU": 1, "object_store_memory": 10**8},
            "node_config": {},
            "min_workers": 0,
            "max_workers": 2,
        },
    }
    provider = {"type": "external", "module": PROVIDER, "gcs_address": address, "head_node_id": HEAD}
    empty: dict[str, Any] = {name: {} for name in ("auth", "docker", "file_mounts")}
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return {
        "cluster_name": "growing",
        "max_workers": 2,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 5,
        "provider": {**provider, "launch_multiple": True, "disable_node_updaters": True},
        "head_node_type": "ray.head.default",  # the fake provider knows it by this name
        "available_node_types": kinds,
        **empty,
        **{f"{name}_commands": [] for name in commands},
        **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
        "file_mounts_sync_continuously": False,
    }


@pytest.fixture
def growing() -> Iterator[dict[str, str]]:
    """The environment of a command that is to run on such a cluster, which has a token of its own."""
    folder = tempfile.mkdtemp(prefix="ray")  # short: sockets lie under it
    host, (port, agent) = socket.gethostbyname(socket.gethostname()), free_ports(2)
    if host.startswith("127."):
        import ray

        host = ray.util.get_node_ip_address()
    client = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "OMP_NUM_THREADS": "1"}
    server = {**client, "RAY_enable_autoscaler_v2": "1", "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    server |= {"RAY_CLOUD_INSTANCE_ID": HEAD, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD}
    server |= {"RAY_TMPDIR": folder, "TMPDIR": folder}  # nobody else's Ray shall find this one
    Path(folder, "cluster.json").write_text(json.dumps(settings(f"{host}:{port}")))
    ray_command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}"]
    options = [f"--autoscaling-config={folder}/cluster.json", f"--temp-dir={folder}", f"--node-ip-address={host}"]
    options += ["--num-cpus=1", "--num-gpus=0", "--object-store-memory=200000000", "--include-dashboard=false"]
    options += ["--min-worker-port=0", "--max-worker-port=0", f"--dashboard-agent-listen-port={agent}"]
    with open(Path(folder, "said"), "w") as said:
        head = subprocess.Popen([*ray_command, *options], env=server, stdout=said, stderr=said)
    try:
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in Path(folder, "said").read_text():
            assert head.poll() is None and time.monotonic() < deadline, Path(folder, "said").read_text()[-2000:]
            time.sleep(0.5)
        yield {**client, "RAY_ADDRESS": f"{host}:{port}"}
    finally:
        for process in [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        head.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def test_a_job_gets_the_node_it_needs_and_one_that_is_too_large_is_refused(
    growing: dict[str, str], split_job: Callable[..., PPOConfig], tmp_path: Path
) -> None:
    def run(name: str, *overrides: str, **changes: Any) -> tuple[subprocess.CompletedProcess[str], float]:
        job = split_job(name, max_steps=1, eval_on_start=False, **changes)
        path = tmp_path / f"{name}.yaml"
        path.write_text(dump_yaml(job.model_dump(mode="json", exclude_unset=True)))
        started = time.monotonic()
        command = [sys.executable, "-m", "rlhf_ray.cli", "ppo", str(path), "--wait-for-resources", "240", *overrides]
        done = subprocess.run(command, env=growing, capture_output=True, text=True, timeout=500)
        return done, time.monotonic() - started

    too_large, seconds = run(
        "large", learner={"num_workers": 3, "num_gpus": 1.0, "num_threads": 1}, placement="colocate"
    )
    assert too_large.returncode == 3, too_large.stderr
    assert "learner: they do not fit even if the cluster grows as far as it may (learner 3 x (1 CPU, 1 GPU))" in (
        too_large.stderr
    )
    assert seconds < 120, "told when the autoscaler says so, not at the end of the wait"

    actor = {"num_actors": 1, "num_gpus": 0.5, "num_cpus": 0.5, "num_threads": 1}
    fits, _ = run("fits", learner={"num_workers": 1, "num_gpus": 0.0, "num_threads": 1}, generator=actor, scorer=actor)
    assert fits.returncode == 0, fits.stderr
    assert "waiting for generator 1 x (0.5 CPU, 0.5 GPU)" in fits.stderr and "free now:" in fits.stderr
    assert (tmp_path / "fits" / "adapter" / "adapter_model.safetensors").is_file()
