"""`serve deploy`: the application from a Serve config file on a running cluster, with keys, growing under load."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.servers import free_ports

from .conftest import HELLO

pytestmark = [pytest.mark.integration, pytest.mark.long]
CONFIG = Path(__file__).parents[3] / "cluster" / "serve.yaml"
BIN = Path(sys.executable).parent


ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_worker_niceness": "0",
}


@pytest.fixture
def dashboard() -> Iterator[str]:
    """A head node in a process group of its own, on ports of its own, with a token; the address of its dashboard."""
    ports = dict(zip(("port", "dashboard-port", "dashboard-agent-listen-port"), free_ports(3)))
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as scratch:  # a socket's path has room for 107 bytes
        command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", f"--temp-dir={scratch}"]
        command += ["--dashboard-host=127.0.0.1", *(f"--{name}={port}" for name, port in ports.items())]
        log = Path(scratch) / "start.log"
        with log.open("wb") as out:
            head = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True, env=ENVIRONMENT)
        try:
            yield f"http://127.0.0.1:{ports['dashboard-port']}"
        finally:
            head.send_signal(signal.SIGTERM)
            try:
                head.wait(30)
            finally:
                os.killpg(head.pid, signal.SIGKILL)


def serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "serve"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENVIRONMENT)


def test_deployed_with_keys_it_answers_and_grows_under_load(
    dashboard: str, tmp_path: Path, tiny_llama: Callable[..., Path], tiny_run: Callable[..., Path]
) -> None:
    import openai

    keys = str(tmp_path / "keys.json")
    command = [sys.executable, "-m", "rlhf_ray.cli", "api-key", keys, "--name", "alice"]
    key = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    base = tiny_llama()
    config: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    config["proxy_location"] = "HeadOnly"
    config["http_options"] |= {"host": "127.0.0.1", "port": free_ports(1)[0]}
    config["applications"][0]["args"] = {
        "output_dir": str(tmp_path / "serve"),
        "model_name_or_path": str(base),
        "template": "none",
        "adapters": {"helper": str(tiny_run(tmp_path / "run", base, stage="sft", template="none"))},
        "host": "0.0.0.0",
        "api_keys": keys,
        "replicas": {
            "min_replicas": 1,
            "max_replicas": 2,
            "target_ongoing_requests": 1,
            "num_cpus": 0.5,
            "num_threads": 1,
        },
    }
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    deadline = time.monotonic() + 180
    while (sent := serve("deploy", str(path), "-a", dashboard)).returncode != 0:
        assert time.monotonic() < deadline, sent.stderr[-2000:]
        time.sleep(1)
    url = f"http://127.0.0.1:{config['http_options']['port']}/v1"
    ai = openai.OpenAI(base_url=url, api_key=key, max_retries=2, timeout=60)
    while True:
        try:
            response = ai.chat.completions.create(model="helper", messages=HELLO, max_tokens=8)
            break
        except openai.APIError:
            assert time.monotonic() < deadline, serve("status", "-a", dashboard).stdout
            time.sleep(1)
    assert response.usage.completion_tokens == 8
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=url, api_key="wrong", max_retries=0).models.list()
    failed: list[str] = []
    grown = threading.Event()

    def ask() -> None:
        while not grown.is_set():
            try:
                ai.chat.completions.create(model="helper", messages=HELLO, max_tokens=128)
            except openai.APIError as error:
                failed.append(str(error))

    clients = [threading.Thread(target=ask) for _ in range(6)]
    for client in clients:
        client.start()
    try:
        while len(list((tmp_path / "serve" / "replicas").glob("*.json"))) < 2 and time.monotonic() < deadline + 60:
            time.sleep(0.5)
        count = len(list((tmp_path / "serve" / "replicas").glob("*.json")))
        time.sleep(2)
    finally:
        grown.set()
        for client in clients:
            client.join()
    assert count == 2 and failed == []
    assert serve("shutdown", "-a", dashboard, "-y").returncode == 0
