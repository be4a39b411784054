"""Hashes of large files, kept between processes, each of which would hash the base that it loads: 10 to 25 seconds for 13 GB.

One small file for each hash, in the user's cache folder. It says of which path, size, time of change and inode it is, and holds for
exactly that.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

from rlhf_ray.config.paths import user_cache
from rlhf_ray.errors import ArtifactError
from rlhf_ray.storage.files import atomic_write_json, read_json, sha256_file, sha256_text

LARGE = 64 * 2**20
"""Bytes from which a hash is worth keeping; smaller files are hashed in the time that looking it up takes."""
SETTLED_S = 2.0
"""A file that was changed less long ago may change again within one tick of its file system's clock: its hash is not kept."""


def cached_sha256(path: Path) -> str:
    """Hex digest of the file's bytes. Where the cache cannot be read or written the file is hashed."""
    path = path.resolve()
    if path.stat().st_size < LARGE:
        return sha256_file(path)
    state, entry = _state(path), _entry(path)
    if entry is not None:
        with suppress(ArtifactError):
            kept = read_json(entry)
            digest = kept.pop("sha256", "")
            if kept == state and isinstance(digest, str) and len(digest) == 64:
                return digest
    digest = sha256_file(path)
    if entry is not None and _state(path) == state and time.time() - path.stat().st_mtime > SETTLED_S:
        with suppress(OSError):
            entry.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            atomic_write_json(entry, {**state, "sha256": digest})
    return digest


def _entry(path: Path) -> Path | None:
    """Where the hash of the file as it is now would be kept; None without a home."""
    try:
        return user_cache("sha256") / f"{sha256_text(repr(_state(path)))[:32]}.json"
    except RuntimeError:
        return None


def _state(path: Path) -> dict[str, object]:
    found = path.stat()
    return {"path": str(path), "bytes": found.st_size, "mtime_ns": found.st_mtime_ns, "inode": found.st_ino}
