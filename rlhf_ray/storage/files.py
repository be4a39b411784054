"""Atomic writes and hashes: a reader sees the old file or the new one, never half of either, and can tell which it has.

Every atomic write goes to a temporary file beside the target, is flushed to disk, and takes the target's name in one rename. Files
of a folder that takes its name as a whole (`atomic_replace_folder`, checkpoints) are written plainly, and flushed with the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from rlhf_ray.errors import ArtifactError
from rlhf_ray.storage.lock import check_owner

if (
    TYPE_CHECKING
):  # torch is imported where tensors are written or hashed: a command that is refused must not wait for it
    from torch import Tensor


def fsync_path(path: Path) -> None:
    """Flush a file, or the names inside a folder, to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def temporary_beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:12]}")


def atomic_write_bytes(path: Path | str, data: bytes) -> None:
    """Replace `path` by `data`, all or nothing. OSError (disk full, no permission) leaves the old file as it was."""
    path = Path(path)
    temporary = temporary_beside(path)
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        check_owner(path)
        os.replace(temporary, path)
        fsync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_text(path: Path | str, text: str) -> None:
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: Path | str, obj: Any) -> None:
    """Write `obj` as indented JSON. NaN and infinity, which JSON does not know, raise ValueError."""
    atomic_write_bytes(path, _json_bytes(obj))


def atomic_save_tensors(
    path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write `tensors` as safetensors, with "format": "pt" in its metadata, which transformers and peft ask for."""
    atomic_write_bytes(path, _tensor_bytes(tensors, metadata))


def write_json(path: Path, obj: Any) -> None:
    """As `atomic_write_json`, into a folder that takes its name as a whole."""
    path.write_bytes(_json_bytes(obj))


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """As `atomic_save_tensors`, into a folder that takes its name as a whole."""
    path.write_bytes(_tensor_bytes(tensors, None))


def _json_bytes(obj: Any) -> bytes:
    # A lone surrogate cannot be UTF-8; inside a JSON string its escape reads back as the same character.
    return (json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "backslashreplace")


def _tensor_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> bytes:
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    from safetensors.torch import save

    return save(plain, metadata={"format": "pt", **(metadata or {})})


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """What safetensors could not write to `path` as the OSError that it was, as against files that it cannot read."""
    try:
        yield
    except SafetensorError as error:
        if (found := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(number := int(found[1]), os.strerror(number), str(path)) from error


def atomic_replace_folder(temporary: Path, target: Path, flush: bool = True) -> None:
    """Give the finished folder `temporary` the name `target`, replacing a folder of that name.

    flush: to disk before; not where `target` lies in a folder that is flushed as a whole.
    There is no exchange of two folders in one call, so the old one steps aside first: a crash between the two renames leaves it
    complete, as `.<name>.old-*`, and never a mixture."""
    if flush:
        for file in sorted(temporary.rglob("*")):
            fsync_path(file)
        fsync_path(temporary)
    old = target.with_name(f".{target.name}.old-{uuid.uuid4().hex[:12]}")
    check_owner(target)
    if target.exists():
        os.rename(target, old)
    os.rename(temporary, target)
    if flush:
        fsync_path(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def read_json(path: Path | str) -> dict[str, Any]:
    """The JSON object in `path`. ArtifactError if it is missing, damaged or not an object."""
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError.at(str(path), "file is missing") from None
    except (OSError, ValueError, RecursionError) as e:
        raise ArtifactError.at(str(path), f"cannot be read as JSON: {e}") from e
    if not isinstance(value, dict):
        raise ArtifactError.at(str(path), "wrong content", "a JSON object", type(value).__name__)
    return value


def sha256_file(path: Path | str) -> str:
    """Hex digest of the file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def sha256_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Hex digest over names, dtypes, shapes and bytes, in the order of the names. Equal for equal tensors on any device."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{str(tensor.dtype).removeprefix('torch.')}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)  # without a copy
    return digest.hexdigest()


def describe_files(folder: Path | str, skip: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    """{relative path: {sha256, bytes}} of every file under `folder`, in order. ArtifactError on anything but plain files."""
    folder = Path(folder)
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ArtifactError.at(str(path), "only plain files belong in an artefact")
        if path.is_file() and name not in skip:
            found[name] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
    return found
