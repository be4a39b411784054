"""Hashes of large files that outlive the process: of exactly the file that was hashed, or not at all."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from rlhf_ray.config.paths import user_cache
from rlhf_ray.models.sources import weights_sha256
from rlhf_ray.storage import hash_cache
from rlhf_ray.storage.files import sha256_file
from rlhf_ray.storage.hash_cache import cached_sha256

OLD = time.time() - 3600


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """The files that are hashed, not looked up; files of 4 bytes are large."""
    seen: list[Path] = []

    def counted(path: Path) -> str:
        seen.append(path)
        return sha256_file(path)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hash_cache, "LARGE", 4)
    monkeypatch.setattr(hash_cache, "sha256_file", counted)
    return seen


def a_file(path: Path, data: bytes, changed: float = OLD) -> Path:
    path.write_bytes(data)
    os.utime(path, (changed, changed))
    return path


def test_a_large_file_is_hashed_once(hashed: list[Path], tmp_path: Path) -> None:
    file = a_file(tmp_path / "model.safetensors", b"weights")
    assert cached_sha256(file) == cached_sha256(file) == sha256_file(file)
    assert hashed == [file]
    (entry,) = user_cache("sha256").iterdir()
    assert entry.is_relative_to(tmp_path / "cache") and json.loads(entry.read_text())["path"] == str(file)


def test_another_file_of_the_same_name_is_another_file(hashed: list[Path], tmp_path: Path) -> None:
    """Size, time and inode count, also where two of them agree."""
    file = a_file(tmp_path / "m", b"weights")
    before = cached_sha256(file)
    assert cached_sha256(a_file(file, b"longer weights")) != before
    assert cached_sha256(a_file(file, b"WEIGHTS", OLD + 5)) != before
    other = a_file(tmp_path / "other", b"weighty")
    os.replace(other, file)  # same size, same time
    assert cached_sha256(file) == sha256_file(file) and len(hashed) == 4


def test_a_small_or_fresh_file_is_hashed_every_time(hashed: list[Path], tmp_path: Path) -> None:
    small, fresh = a_file(tmp_path / "s", b"abc"), a_file(tmp_path / "f", b"weights", time.time())
    for _ in range(2):
        cached_sha256(small), cached_sha256(fresh)
    assert hashed == [small, fresh] * 2 and not user_cache("sha256").exists()


@pytest.mark.parametrize("damage", ["{", "[]", '{"sha256": "00"}', ""])
def test_a_damaged_entry_is_no_entry(hashed: list[Path], tmp_path: Path, damage: str) -> None:
    file = a_file(tmp_path / "m", b"weights")
    cached_sha256(file)
    (entry,) = user_cache("sha256").iterdir()
    entry.write_text(damage)
    assert cached_sha256(file) == sha256_file(file) and len(hashed) == 2
    assert json.loads(entry.read_text())["sha256"] == sha256_file(file)


def test_where_nothing_can_be_kept_files_are_hashed(
    hashed: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file")
    file = a_file(tmp_path / "m", b"weights")
    assert cached_sha256(file) == sha256_file(file)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert cached_sha256(file) == sha256_file(file)


def test_the_hash_of_a_base_is_kept(hashed: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process of a job loads the base, and says which one by its hash."""
    file = a_file(tmp_path / "model.safetensors", b"weights")
    first = weights_sha256(tmp_path)
    monkeypatch.setattr("rlhf_ray.models.sources._weights_seen", {})  # as another process
    assert weights_sha256(tmp_path) == first and hashed == [file]
