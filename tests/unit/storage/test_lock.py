"""One writer at a time, also where the file system or its owner makes that hard."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from rlhf_ray.errors import ConfigError
from rlhf_ray.storage.lock import check_owner, locked


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no holder: the token keeps two writers apart."""

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    with locked(tmp_path):
        check_owner(tmp_path / "x")
        (tmp_path / ".owner").write_text("another")
        with pytest.raises(ConfigError, match="another process has taken over this run"):
            check_owner(tmp_path / "x")


def test_a_run_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / ".lock").symlink_to("elsewhere")  # refuses everybody, root too
    with pytest.raises(ConfigError, match="cannot be written to: ") as caught, locked(tmp_path):
        pass
    assert len(caught.value.lines()) == 1
