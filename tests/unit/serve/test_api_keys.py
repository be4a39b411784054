"""API keys from the command line, and what the job file may say about addresses."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from rlhf_ray.cli import main
from rlhf_ray.config.load import load_dict
from rlhf_ray.config.serve import ServeConfig
from rlhf_ray.errors import ConfigError
from rlhf_ray.serve.api_errors import ApiError
from rlhf_ray.serve.api_keys import ApiKeys, add_key

JOB = {"output_dir": "serve", "model_name_or_path": "base"}


def test_a_key_is_shown_once_and_can_be_revoked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.json"
    assert main(["api-key", str(path), "--name", "alice", "--model", "helper"]) == 0
    shown = capsys.readouterr().out.strip()
    assert shown.startswith("rr-") and shown not in path.read_text()
    key = ApiKeys(path).authenticate(f"Bearer {shown}")
    assert (key.name, key.allows("helper@v2"), key.allows("base")) == ("alice", True, False)
    assert main(["api-key", str(path), "--name", "alice"]) == 2
    assert "has a key of this name" in capsys.readouterr().err
    assert main(["api-key", str(path), "--name", "../bob"]) == 2
    assert main(["api-key", str(path), "--name", "alice", "--revoke"]) == 0
    with pytest.raises(ApiError):
        ApiKeys(path).authenticate(f"Bearer {shown}")


def test_a_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    assert main(["api-key", str(path), "--name", "alice"]) == 0
    os.chmod(path, 0o644)
    with pytest.raises(ConfigError, match="can be read by others"):
        ApiKeys(path)


@pytest.mark.parametrize("harm", ["deleted", "damaged", "readable by others", "empty"])
def test_a_service_whose_file_of_keys_is_not_in_order_lets_nobody_in(
    tmp_path: Path, harm: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It let in whoever it knew, one request a second aside (500); now 503 until the file is in order, and one line in the log."""
    monkeypatch.setattr("rlhf_ray.serve.api_keys.REFRESH_S", -1.0)
    path = tmp_path / "keys.json"
    bearer = f"Bearer {add_key(path, 'alice')}"
    keys, good = ApiKeys(path), path.read_bytes()
    assert keys.authenticate(bearer).name == "alice"
    time.sleep(0.02)  # times of files go by ticks of up to 10 ms
    if harm == "deleted":
        path.unlink()
    elif harm == "readable by others":
        os.chmod(path, 0o644)
    else:
        path.write_bytes(b"" if harm == "empty" else good[:-20])
    for header in (bearer, bearer, "Bearer rr-other", None):
        with pytest.raises(ApiError) as caught:
            keys.authenticate(header)
        assert (caught.value.status, caught.value.code) == (503, "keys_unavailable")
    assert len(caplog.records) == 1 and "no API key is accepted" in caplog.text
    path.write_bytes(good)
    os.chmod(path, 0o600)
    assert keys.authenticate(bearer).name == "alice"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "serve.example.com"])
def test_another_address_needs_keys(host: str) -> None:
    with pytest.raises(ConfigError, match="api_keys is needed"):
        load_dict(ServeConfig, {**JOB, "host": host})
    assert load_dict(ServeConfig, {**JOB, "host": host, "api_keys": "keys.json"}).host == host


@pytest.mark.parametrize("name", ["base", "Base", "../x", "a b", "", "x" * 65])
def test_bad_names_of_adapters_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="no name"):
        load_dict(ServeConfig, {**JOB, "adapters": {name: "runs/sft"}})
