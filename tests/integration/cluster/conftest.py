"""A Ray cluster as `ray start` makes it, with token authentication, on ports and in a folder of its own, and `submit` to it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.servers import free_ports

CANARIES = {
    "HF_TOKEN": "hf_" + "canary1234567890canary1234567890",
    "OPENAI_API_KEY": "sk-canary-openai-0987654321-abcdefgh",
    "WANDB_API_KEY": "canarywandb0123456789",
    "AWS_SECRET_ACCESS_KEY": "canary/aws+secret/0123456789",
}
"""Secrets in the environment of everybody who submits."""
NODE_CANARIES = {
    "HF_TOKEN": "hf_" + "nodes1234567890nodes1234567890nodes",
    "OPENAI_API_KEY": "sk-nodes-0987654321-abcdefghijkl",
}
"""Secrets that live on the nodes, where jobs find them."""


@dataclass
class RayCluster:
    """url: of its dashboard.  token: file of it.  folder: Ray's own.  environment: of who may submit."""

    url: str
    token: Path
    folder: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        return clean_environment() | CANARIES | {"RAY_AUTH_TOKEN_PATH": str(self.token)}

    def api(self, path: str) -> Any:
        request = urllib.request.Request(f"{self.url}{path}")
        request.add_header("Authorization", f"Bearer {self.token.read_text().strip()}")
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.loads(answer.read())

    def logs(self) -> Path:
        return self.folder / "session_latest" / "logs"


def clean_environment() -> dict[str, str]:
    """Without what would lead Ray, or us, elsewhere; with the interpreter of these tests as `python`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k not in CANARIES}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])
    return kept | {"PATH": path, "RAY_worker_niceness": "0", "OMP_NUM_THREADS": "1", "HOME": "/nonexistent"}


def start_cluster(num_cpus: int = 4, options: tuple[str, ...] = ()) -> RayCluster:
    """End it with `end`. Its folder has a short path: Ray puts sockets there."""
    folder = Path(tempfile.mkdtemp(prefix="rc", dir="/tmp"))
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    gcs, dashboard, client, agent, grpc, metrics = free_ports(6)
    made = RayCluster(f"http://127.0.0.1:{dashboard}", token, folder)
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
        *(f"--port={gcs}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"),
        *(f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"),
        *(f"--dashboard-agent-grpc-port={grpc}", f"--metrics-export-port={metrics}", "--node-ip-address=127.0.0.1"),
        *(f"--num-cpus={num_cpus}", f"--temp-dir={folder}", "--object-store-memory=200000000", *options),
    ]
    # As the files of cluster/ set it.
    callback = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "rlhf_ray.serve.admission.middlewares"}
    environment = clean_environment() | NODE_CANARIES | callback
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    log = (folder / "start.log").open("wb")
    made.processes.append(
        subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd="/", start_new_session=True
        )
    )
    deadline = time.monotonic() + 300
    while True:
        try:
            made.api("/api/jobs/")
            return made
        except OSError:
            if made.processes[0].poll() is not None or time.monotonic() > deadline:
                said = (folder / "start.log").read_text()
                end(made)
                raise AssertionError(said[-3000:]) from None
            time.sleep(0.5)


def end(cluster: RayCluster) -> None:
    """End what was started here, and its descendants; nothing else."""
    family = []
    for process in cluster.processes:
        if process.poll() is None:
            family += [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for process in cluster.processes:
        process.terminate()
    _, alive = psutil.wait_procs(family, timeout=6)
    for left in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()
    shutil.rmtree(cluster.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    made = start_cluster()
    try:
        yield made
    finally:
        end(made)


@pytest.fixture
def start_submit(cluster: RayCluster, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """start_submit("job.yaml", ..., env={...}) -> `rlhf-ray submit` to the cluster, under way. Its words go to a pipe."""

    def run(*words: str, **options: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "rlhf_ray.cli", "submit", *words, "--address", cluster.url]
        return subprocess.Popen(
            command,
            **{
                "env": cluster.environment,
                "cwd": tmp_path,
                "stdin": subprocess.DEVNULL,
                "stdout": subprocess.PIPE,
                "stderr": subprocess.STDOUT,
                "text": True,
                **options,
            },
        )

    return run


@pytest.fixture
def submit(start_submit: Callable[..., subprocess.Popen[str]]) -> Callable[..., tuple[int, str]]:
    """submit("job.yaml", ...) -> (exit code, what was said)."""

    def run(*words: str, **options: Any) -> tuple[int, str]:
        process = start_submit(*words, **options)
        try:
            said, _ = process.communicate(timeout=400)
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(process.communicate()[0][-4000:]) from None
        return process.returncode, said

    return run


REWARD = '''
"""Longer is better. While a file SLOWLY is there it takes its time."""
import time
from pathlib import Path

from scale import SCALE


def score(prompts, completions, **columns):
    time.sleep(0.3 if Path("SLOWLY").exists() else 0)
    return [SCALE * len(text) for text in completions]
'''
ANIMALS = ("wren", "toad", "carp", "moth", "crab", "lark", "newt", "hare", "mole", "swan")


@pytest.fixture
def chain(tmp_path: Path, tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pipeline's job file of relative paths, in the current folder, with data and a reward function beside it."""
    monkeypatch.chdir(tmp_path)
    asked = [f"{verb} the {animal}." for animal in ANIMALS for verb in ("Name", "Draw", "Feed", "Find", "Greet")]
    (tmp_path / "data").mkdir()
    rows = [{"instruction": text, "input": "", "output": "yes"} for text in asked]
    (tmp_path / "data" / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my_reward.py").write_text(REWARD.replace("SLOWLY", str(tmp_path / "slowly")))
    (tmp_path / "scale.py").write_text("SCALE = 0.1\n")
    (tmp_path / ".env").write_text("HF_TOKEN=never\n")
    small = {"train_batch_size": 8, "per_device_train_batch_size": 8, "max_steps": 2, "max_length": 96}
    job = {
        "output_dir": "runs/all",
        "model_name_or_path": str(tiny_llama(context=128)),
        "template": "alpaca_short",
        "learner": {"num_workers": 1, "num_threads": 1},
        "report_to": [],
        "stages": ["sft", "ppo"],
        "sft": {"data": {"train": "data/sft.jsonl"}, "lora": {"r": 4, "lora_alpha": 16}, **small},
        "ppo": {
            "data": {"train": "data/sft.jsonl"},
            "rewards": [{"name": "long", "function": "my_reward.py:score"}],
            **{"rollout_batch_size": 16, "rollout_chunk_size": 8, "num_mini_batches": 2, "num_ppo_epochs": 1},
            **{"per_device_train_batch_size": 8, "response_length": 8, "max_steps": 48, "save_steps": 2},
            **{"eval_steps": 8, "learning_rate": 1e-2},
        },
    }
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump(job))
    return tmp_path / "chain.yaml"
