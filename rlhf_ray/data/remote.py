"""Data on an object store: a file that a URI names is fetched once to this machine, and read like any other.

`s3://bucket/rows.jsonl`, `gs://`, `abfs://`, `hdfs://`, `file:///`: what pyarrow knows. Credentials come from the environment.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import shutil
import urllib.parse
import uuid
from pathlib import Path

from rlhf_ray.config.paths import user_cache
from rlhf_ray.config.uris import has_credentials
from rlhf_ray.errors import DataError

PIECE = 1 << 20


def path_of(uri: str) -> str:
    """The path within the store: its suffix tells the format."""
    return urllib.parse.urlsplit(uri).path


def fetch(uri: str) -> Path:
    """Where the file lies here. It is fetched again when its size or time of change are others than those of the copy there is.

    Raises DataError: credentials in the URI, a store that is unknown or does not answer, no such file."""
    from pyarrow import ArrowException, fs

    if has_credentials(uri):
        raise DataError.at(
            _bare(uri), "has credentials in it", fix="put them into the environment, which is not logged"
        )
    try:
        store, path = fs.FileSystem.from_uri(uri)
        info = store.get_file_info(path)
        if info.type != fs.FileType.File:
            raise DataError.at(uri, "no such file" if info.type == fs.FileType.NotFound else "is a folder, not a file")
        key = hashlib.sha256(f"{uri}\n{info.size}\n{info.mtime_ns}".encode()).hexdigest()[:24]
        target = user_cache("data") / key / posixpath.basename(path)
        if not target.is_file():
            _copy(store.open_input_stream(path, compression=None), target, info.size)
    except (ArrowException, OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        known = "s3://, gs://, abfs://, hdfs:// or file:///"
        raise DataError.at(uri, f"cannot be read: {' '.join(str(error).split())[:200]}", known) from error
    return target


def _copy(source: object, target: Path, size: int) -> None:
    """Whole or not at all, however many processes of a node do it at once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        with source as stream, open(part, "wb") as out:  # type: ignore[attr-defined]
            shutil.copyfileobj(stream, out, PIECE)
        if part.stat().st_size != size:
            raise OSError(f"{part.stat().st_size:,} of {size:,} bytes received")
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _bare(uri: str) -> str:
    parts = urllib.parse.urlsplit(uri)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
