"""What tests read of runs, and the pairs that several of them learn from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_ray.metrics import NON_DETERMINISTIC, read_metrics
from rlhf_ray.storage.run import Run

if TYPE_CHECKING:
    import torch  # tests whose own process needs no model come up without it


def lasting(name: str) -> bool:
    """Whether a metric repeats bit for bit."""
    return name.split("/")[0] not in NON_DETERMINISTIC


def folder_of(run: Run | str | Path) -> Path:
    return Path(run.run_dir if isinstance(run, Run) else run)


def lasting_rows(run: Run | str | Path) -> list[dict[str, Any]]:
    """metrics.jsonl of a run, less what does not repeat."""
    return [{k: v for k, v in row.items() if lasting(k)} for row in read_metrics(folder_of(run) / "metrics.jsonl")]


def weights(run: Run | str | Path, name: str = "adapter") -> dict[str, torch.Tensor]:
    """Tensors of a run's adapter; name: adapter, value, or a checkpoint's checkpoints/step_000004/adapter."""
    from safetensors.torch import load_file

    return load_file(folder_of(run) / name / "adapter_model.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """The same tensors, bit for bit."""
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def yes_or_no(count: int) -> list[dict[str, str]]:
    """Pairs: the better reply says "yes", the worse one "no", at random lengths; who is longer says nothing."""
    return [
        {
            "user_input": f"Is {i} a number?",
            "completion_a": "yes" * (1 + i % 3),
            "completion_b": "no" * (1 + (i // 3) % 4),
        }
        for i in range(count)
    ]
