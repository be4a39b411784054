"""The service as a user starts it: `rlhf-ray serve` in a process of its own, two replicas, a registry with two versions to come."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.servers import free_ports

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DEAD_PROXY = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
"""As where the user's proxy is not there any more: nothing on this machine may be asked through it."""
HELLO = [{"role": "user", "content": "Name a bird."}]


@pytest.fixture(scope="module")  # while it lives, no event loop can be run on this thread
def browser() -> Iterator[Any]:
    """A headless Chromium; skips, saying so, where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        try:
            made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield made
        made.close()


@dataclass
class Service:
    """A running `rlhf-ray serve`."""

    process: subprocess.Popen[bytes]
    url: str
    folder: Path
    log: Path
    registry: Path
    runs: list[Path]

    def client(self, **options: Any) -> Any:
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", **{"max_retries": 2, "timeout": 60, **options})

    def replicas(self) -> dict[str, dict[str, Any]]:
        found = {}
        for path in (self.folder / "replicas").glob("*.json"):
            try:
                found[path.stem] = json.loads(path.read_text())
            except (OSError, ValueError):
                continue
        return found

    def wait(self, what: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            time.sleep(0.2)

    @property
    def metrics_url(self) -> str:
        found = re.search(r"metrics +(http\S+)", self.log.read_text())
        assert found
        return found[1]


def start(folder: Path, environment: Mapping[str, str] | None = None, **fields: Any) -> Service:
    """fields: of the job, over those that every service here has.   environment: more than this process's."""
    (port,) = free_ports(1)
    job = {"output_dir": str(folder / "serve"), "template": "none", "port": port, "poll_interval_s": 0.2, **fields}
    (folder / "serve.yaml").write_text(yaml.safe_dump(job))
    log = folder / "serve.log"
    with log.open("wb") as out:
        command = [sys.executable, "-m", "rlhf_ray.cli", "serve", str(folder / "serve.yaml")]
        where: Any = {"cwd": folder, "env": {**os.environ, **(environment or {})}}
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, **where)
    service = Service(process, f"http://127.0.0.1:{port}", folder / "serve", log, folder / "registry", [])
    try:
        service.wait(lambda: "Ctrl-C" in log.read_text(), 600)
    except BaseException:
        stop(service)
        raise
    return service


def stop(service: Service) -> None:
    if service.process.poll() is None:
        service.process.send_signal(signal.SIGINT)
        try:
            service.process.wait(90)
        except subprocess.TimeoutExpired:
            os.killpg(service.process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def service(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Path], tiny_run: Callable[..., Path]
) -> Iterator[Service]:
    from rlhf_ray.registry import Registry

    folder, base = tmp_path_factory.mktemp("service"), tiny_llama()
    runs = [tiny_run(folder / f"run{i}", base, stage="sft", seed=i, template="none") for i in range(3)]
    judge = tiny_run(folder / "judge", base, stage="reward", seed=7, template="none")
    registry = Registry(folder / "registry")
    registry.promote(str(runs[0]), "helper", force=True, reason="nothing was measured")
    limits = {"max_tokens": 200, "max_batch_rows": 8, "max_waiting_rows": 8, "request_timeout_s": 60}
    replicas = {"min_replicas": 2, "num_threads": 1}
    made = start(
        folder,
        DEAD_PROXY,
        model_name_or_path=str(base),
        registry=str(folder / "registry"),
        adapters={"judge": str(judge)},
        limits=limits,
        replicas=replicas,
    )
    made.runs = runs
    yield made
    stop(made)
    for path in (folder / "registry" / "adapters").glob("*"):
        path.chmod(0o755)
