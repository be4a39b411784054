from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.console import Console


class RecordingConsole(Console):
    """Keeps every event; `text` is all that was said."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def emit(self, event: dict[str, Any]) -> None:
        self.events.append(event)

    @property
    def text(self) -> str:
        said = [[e.get("title", ""), *e.get("lines", []), e.get("text", "")] for e in self.events]
        return "\n".join(line for lines in said for line in lines if line)

    @property
    def warnings(self) -> list[str]:
        return [e["text"] for e in self.events if e["kind"] == "warn"]


@pytest.fixture
def console() -> RecordingConsole:
    return RecordingConsole()


@pytest.fixture
def four_cpus(ray_of: Callable[..., Any]) -> Any:
    """A Ray for jobs of two workers."""
    return ray_of(num_cpus=4)


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[[str, Iterable[dict[str, Any]]], str]:
    """write_jsonl(name, rows) -> path of a new data file."""

    def write(name: str, rows: Iterable[dict[str, Any]]) -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def supervised_job(
    tiny_llama: Callable[..., Path], tmp_path: Path, write_jsonl: Callable[[str, Iterable[dict[str, Any]]], str]
) -> Callable[..., Any]:
    """supervised_job(SFTConfig, "sft", rows, data={...}, field=value) -> a job of four short steps on `rows`, in this process.
    data: fields beside `train`.  model: folder of the base."""

    def make(
        kind: Callable[..., Any],
        name: str,
        rows: Iterable[dict[str, Any]],
        *,
        data: dict[str, Any] | None = None,
        model: str | None = None,
        **values: Any,
    ) -> Any:
        fixed: dict[str, Any] = {
            "output_dir": str(tmp_path / name),
            "model_name_or_path": model or str(tiny_llama()),
            "template": "none",
            "data": {"train": write_jsonl(f"{name}.jsonl", rows), **(data or {})},
            "learner": {"num_workers": 0, "num_threads": 1},
            "max_length": 64,
            "train_batch_size": 16,
            "per_device_train_batch_size": 16,
            "max_steps": 4,
            "eval_steps": 2,
            "learning_rate": 1e-2,
            "report_to": [],
        }
        return kind(**{**fixed, **values})

    return make


@pytest.fixture
def run_without_us(tmp_path: Path) -> Callable[..., Any]:
    """run_without_us(code, *args) -> the JSON that `code` prints, run by a fresh interpreter that must not import rlhf_ray."""

    def run(code: str, *args: str) -> Any:
        guard = "import sys\nsys.modules['rlhf_ray'] = None\n"
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", guard + code, *args], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.strip().splitlines()[-1])

    return run
