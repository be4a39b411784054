"""Data that a URI names. file:/// goes the same way as s3://, which tests/integration/workflow/test_object_store.py tries."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from rlhf_ray.data.remote import fetch
from rlhf_ray.data.sources import find
from rlhf_ray.errors import DataError
from rlhf_ray.submit.probe import readable


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "store" / "rows.jsonl"
    path.parent.mkdir()
    path.write_text('{"prompt": "a"}\n')
    return path


def test_a_file_is_fetched_once_and_again_when_it_has_changed(rows: Path, cache: Path) -> None:
    uri = f"file://{rows}"
    first = fetch(uri)
    assert first.is_relative_to(cache) and first.read_bytes() == rows.read_bytes()
    before = first.stat().st_mtime_ns
    assert fetch(uri) == first and first.stat().st_mtime_ns == before
    rows.write_text('{"prompt": "other"}\n')
    assert fetch(uri).read_bytes() == rows.read_bytes()
    assert not list(cache.rglob("*.part"))


def test_it_is_read_as_a_file_is_and_told_by_its_uri(rows: Path) -> None:
    source = find(f"file://{rows}")
    assert (source.name, source.kind) == (f"file://{rows}", "jsonl")
    assert source.sha256() == find(str(rows)).sha256()
    with source.open() as file:
        assert file.read() == rows.read_bytes()


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("file://{folder}/gone.jsonl", "no such file"),
        ("file://{folder}/sub.jsonl", "is a folder, not a file"),
        ("file://{folder}/rows.txt", "unknown file type; expected .jsonl"),
        ("file://{folder}/rows.csv.gz", "its content is not gzip data"),
        ("https://example.org/rows.jsonl", "cannot be read: "),
        ("s3://KEY:hunter2@bucket/rows.jsonl", "has credentials in it"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, uri: str, told: str) -> None:
    (tmp_path / "sub.jsonl").mkdir()
    for name in ("rows.txt", "rows.csv.gz"):
        (tmp_path / name).write_text("a")
    with pytest.raises(DataError, match=told) as error:
        find(uri.format(folder=tmp_path))
    assert "hunter2" not in str(error.value) and len(error.value.lines()) == 1


def test_a_fetch_that_breaks_off_leaves_nothing(rows: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(*_: object) -> None:
        raise OSError("torn")

    monkeypatch.setattr("shutil.copyfileobj", torn)
    with pytest.raises(DataError, match="torn"):
        fetch(f"file://{rows}")
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_a_node_is_asked_whether_it_can_read_it(rows: Path) -> None:
    assert readable(f"file://{rows}") == ""
    assert os.strerror(errno.ENOENT) in readable(f"file://{rows}.gone")
