"""Real processes, really killed. Each test notes what it tried and what held in the fault table (tests/fault_table.py)."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.runs import lasting, lasting_rows

REWARD = '''
"""A reward with TRL's signature: the share of ASCII characters, and noise from every generator that it could draw from."""
import random

import numpy
import torch


def noise():
    return 1e-4 * (random.random() + numpy.random.rand() + float(torch.rand(())))


def score(prompts, completions, **columns):
    return [sum(c.isascii() for c in text) / max(len(text), 1) + noise() for text in completions]
'''


CHILD = """
import os, sys
log, cwd, argv, env = {log!r}, {cwd!r}, {argv!r}, {env!r}
fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
os.dup2(fd, 2); os.dup2(fd, 1)
os.chdir(cwd)
os.environ.update(env)
os.setpgrp()
from rlhf_ray.cli import main
code = main(argv)
sys.stderr.flush()
os._exit(code)
"""


class Child:
    """`rlhf-ray ARGV` in a process of its own. A fork of a process that has everything imported: it starts in a blink."""

    def __init__(self, context: Any, cwd: Path, log: Path, argv: list[str], env: dict[str, str]) -> None:
        self.log = log
        code = CHILD.format(log=str(log), cwd=str(cwd), argv=argv, env=env)
        self.process = context.Process(target=exec, args=(code, {}), daemon=True)
        self.process.start()

    @property
    def pid(self) -> int:
        return int(self.process.pid)

    @property
    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait(self, timeout: float = 240.0) -> int:
        """The exit code; of a killed process minus the signal."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            pytest.fail(f"still running after {timeout:g} s:\n{self.text}")
        return int(self.process.exitcode)


@pytest.fixture(scope="session")
def forks() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["rlhf_ray.cli", "rlhf_ray.ppo.loop", "deepspeed", "peft", "transformers.models.llama.modeling_llama"]
    )
    return context


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("fault")


class World:
    """A folder with a job in it, and the run of it that nobody touched."""

    def __init__(self, context: Any, folder: Path, fields: dict[str, Any]) -> None:
        self.context, self.folder, self.fields = context, folder, fields
        self._number = 0

    def job(self, name: str, **changes: Any) -> str:
        """A job file whose run is runs/NAME."""
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**self.fields, "output_dir": f"runs/{name}", **changes}))
        return path.name

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def start(self, *argv: str, fault: str = "", marks: Path | None = None, **env: str) -> Child:
        self._number += 1
        found = {"OMP_NUM_THREADS": "1", "RLHF_RAY_FAULT": fault, **env}
        if not fault:
            del found["RLHF_RAY_FAULT"]
        if marks is not None:
            marks.mkdir(exist_ok=True)
            found["RLHF_RAY_FAULT_MARKS"] = str(marks)
        return Child(self.context, self.folder, self.folder / f"child-{self._number}.log", list(argv), found)

    def kill(self, argv: Sequence[str], name: str, moment: float) -> None:
        """kill -9 of the job NAME `moment` seconds after its first metrics, or sooner on a machine that had ended it by then."""
        log = self.run(name) / "metrics.jsonl"
        while True:
            child = self.start(*argv)
            wait_for(lambda: log.exists() and log.stat().st_size, what=child.text)
            time.sleep(moment)
            with suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)
            if child.wait() == -signal.SIGKILL:
                return
            shutil.rmtree(self.run(name))
            moment /= 2

    def finish(self, name: str) -> str:
        """`rlhf-ray resume`, which must end well. What it said."""
        child = self.start("resume", f"runs/{name}")
        code = child.wait(600)
        assert code == 0, child.text
        return child.text

    def copy(self, name: str, to: str) -> Path:
        return Path(shutil.copytree(self.run(name), self.run(to)))


@pytest.fixture(scope="session")
def make_world(forks: Any) -> Callable[[Path, dict[str, Any]], World]:
    """make_world(folder, fields): jobs with these fields, in that folder."""
    return lambda folder, fields: World(forks, folder, fields)


def differences(a: Path, b: Path) -> list[str]:
    """Everything in which two finished runs differ, time, memory and faults aside."""
    found = []
    for name in ("adapter/adapter_model.safetensors", "value/adapter_model.safetensors", "samples.jsonl"):
        if (a / name).exists() != (b / name).exists():
            found.append(f"{name} is in one only")
        elif (a / name).exists() and (a / name).read_bytes() != (b / name).read_bytes():
            found.append(name)
    one, two = (lasting_rows(p) for p in (a, b))
    if [r["step"] for r in one] != [r["step"] for r in two]:
        found.append("steps of metrics.jsonl")
    found += [f"{k} at step {r['step']}" for r, s in zip(one, two) for k in r.keys() | s.keys() if r.get(k) != s.get(k)]
    totals = [json.loads((p / "summary.json").read_text())["metrics"] for p in (a, b)]
    first, second = ({k: v for k, v in t.items() if lasting(k)} for t in totals)
    found += [f"summary {k}" for k in first.keys() | second.keys() if first.get(k) != second.get(k)]
    return found


def wait_for(condition: Callable[[], Any], timeout: float = 120.0, what: str = "") -> Any:
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < deadline, f"timed out: {what}"
        time.sleep(0.02)
    return found


@pytest.fixture(scope="module")
def world(forks: Any, tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Path]) -> World:
    """A tiny PPO job in this process, with everything that a checkpoint must hold in play."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "mine.py").write_text(REWARD)
    rows = [{"instruction": f"Say something about number {i}.", "input": ""} for i in range(80)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    fields = {
        "model_name_or_path": str(tiny_llama()),
        "template": "none",
        "data": {"train": "prompts.jsonl", "eval_max_rows": 2},
        "rewards": [{"name": "ascii", "function": "mine.py:score"}],
        "learner": {"num_workers": 0, "num_threads": 1},
        "lora": {"r": 4, "lora_alpha": 8},
        "rollout_batch_size": 16,
        "rollout_chunk_size": 8,
        "num_mini_batches": 2,
        "num_ppo_epochs": 1,
        "per_device_train_batch_size": 8,
        "response_length": 6,
        "max_steps": 10,
        "eval_steps": 3,
        "save_steps": 1,
        "learning_rate": 1e-3,
        "kl_controller": "adaptive",
        "normalize_rewards": True,
        "report_to": [],
        "num_samples_logged": 2,
    }
    return World(forks, folder, fields)


@pytest.fixture(scope="module")
def untouched(world: World) -> Path:
    """The run of ten steps that nobody touched."""
    child = world.start("ppo", world.job("untouched"))
    assert child.wait() == 0, child.text
    return world.run("untouched")


@pytest.fixture(scope="module")
def stopped(world: Any) -> Path:
    """A run that was killed in its fourth step, with three checkpoints."""
    child = world.start("ppo", world.job("stopped"), fault="learner:update:step=4:kill")
    assert child.wait() == -signal.SIGKILL, child.text
    return Path(world.run("stopped"))


@pytest.fixture(autouse=True)
def _nothing_left(world: World) -> Iterator[None]:
    yield
    left = [p.name for p in (world.folder / "runs").glob(".rlhf-ray-*")] if (world.folder / "runs").exists() else []
    assert len(left) <= 1, left  # that of a driver that was killed last


@pytest.fixture
def same() -> Callable[[Path, Path], bool]:
    """same(a, b): two finished runs have equal adapters, value heads, samples and metrics; what differs is printed."""

    def same(a: Path, b: Path) -> bool:
        found = differences(a, b)
        print("\n".join(found))
        return not found

    return same


@pytest.fixture
def until() -> Callable[..., Any]:
    """until(condition, timeout): poll until it holds."""
    return wait_for


os.environ.setdefault("HF_HUB_OFFLINE", "1")
