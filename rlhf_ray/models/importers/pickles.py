"""Tensors out of pickled checkpoints, by the one reader that runs no code of theirs, torch's weights-only unpickler; and the
folder that an import writes, whole or not at all."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from rlhf_ray.errors import ArtifactError, ConfigError
from rlhf_ray.storage.files import temporary_beside


def new_folder(output_dir: Path | str) -> Path:
    """The folder to write, which must not hold anything. Raises ConfigError."""
    folder = Path(output_dir).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError.at("output_dir", f"{output_dir} exists and is not empty", "a new folder")
    return folder


@contextlib.contextmanager
def filled_at_once(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its name when the block ends well, and vanishes if it does not."""
    temporary = temporary_beside(target)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    temporary.mkdir()
    try:
        yield temporary
        if target.exists():
            target.rmdir()
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_pickled_tensors(path: Path) -> dict[str, Tensor]:
    """A flat state dict, on the CPU. ArtifactError for anything else, and for a pickle that wants more than tensors."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ArtifactError.at(str(path), "no such file", "a pickled state dict") from error
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise ArtifactError.at(str(path), f"is not a pickle of plain tensors: {first}") from error
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ArtifactError.at(
            str(path), "is not a flat state dict", "a mapping of names to tensors", type(found).__name__
        )
    return {str(name): tensor for name, tensor in found.items()}
