"""Takes single items out of a checkpoint, to show that a run misses them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Drop = Callable[[Path], None]


def state(**fresh: Any) -> Drop:
    """Items of state.json as they are in a run that has not begun."""

    def drop(checkpoint: Path) -> None:
        path = checkpoint / "state.json"
        values = json.loads(path.read_text())
        assert all(values[name] != value for name, value in fresh.items()), "nothing would be lost"
        path.write_text(json.dumps({**values, **fresh}))

    return drop


def tensors(file: str, wanted: str) -> Drop:
    """Zeros for all tensors of `file` whose name holds `wanted`."""

    def drop(checkpoint: Path) -> None:
        found = load_file(checkpoint / file)
        names = [name for name in found if wanted in name]
        assert names and any(bool(found[name].any()) for name in names), "nothing would be lost"
        save_file(found | {name: torch.zeros_like(found[name]) for name in names}, checkpoint / file, {"format": "pt"})

    return drop
