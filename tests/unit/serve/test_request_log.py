"""The access log: renamed at its size, by whichever process comes to it, and begun again; no line is lost or torn."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
from pathlib import Path

import pytest

from rlhf_ray.serve.request_log import RequestLog


def _write(path: Path, name: str, count: int) -> None:
    log = RequestLog(path, max_bytes=4000, backups=50)
    for i in range(count):
        log.append({"name": name, "i": i})
    log.close()


def test_several_processes_rotate_one_log(tmp_path: Path) -> None:
    path = tmp_path / "access.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(path, f"writer {n}", 300)) for n in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    files = sorted(tmp_path.iterdir())
    assert len(files) > 3 and all(file.stat().st_size <= 4000 for file in files)
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert sorted((r["name"], r["i"]) for r in rows) == [(f"writer {n}", i) for n in range(3) for i in range(300)]


def test_so_many_backups_are_kept_and_no_more(tmp_path: Path) -> None:
    log = RequestLog(tmp_path / "access.jsonl", max_bytes=100, backups=2)
    for i in range(20):
        log.append({"i": i, "text": "x" * 50})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["access.jsonl", "access.jsonl.1", "access.jsonl.2"]
    assert (
        '"i": 19' in (tmp_path / "access.jsonl").read_text() and '"i": 17' in (tmp_path / "access.jsonl.2").read_text()
    )
    none = RequestLog(tmp_path / "none.jsonl", max_bytes=100, backups=0)
    for i in range(5):
        none.append({"i": i, "text": "x" * 50})
    assert '"i": 4' in (tmp_path / "none.jsonl").read_text() and not (tmp_path / "none.jsonl.1").exists()


def test_a_log_that_somebody_else_renames_is_begun_again(tmp_path: Path) -> None:
    path = tmp_path / "access.jsonl"
    log = RequestLog(path)
    log.append({"i": 1})
    path.rename(tmp_path / "old")
    log.append({"i": 2})
    assert json.loads(path.read_text()) == {"i": 2} and json.loads((tmp_path / "old").read_text()) == {"i": 1}


def test_a_log_that_cannot_be_begun_again_holds_no_lock_and_goes_on_later(tmp_path: Path) -> None:
    """It kept the number of a closed file, under which the process may open any other: a socket, another log."""
    path = tmp_path / "access.jsonl"
    log = RequestLog(path)
    path.rename(tmp_path / "old")
    path.mkdir()  # nothing can be opened there
    for _ in range(2):
        with pytest.raises(IsADirectoryError):
            log.append({"i": 1})
    with (tmp_path / "old").open("rb") as other:
        assert os.fstat(log._fd).st_ino == os.fstat(other.fileno()).st_ino
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    path.rmdir()
    log.append({"i": 2})
    assert json.loads(path.read_text()) == {"i": 2}
