"""Copies on an object store: a real S3-compatible server, a run that loses its disk and goes on from the copy, damage, outages."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_ray.errors import ArtifactError
from rlhf_ray.storage import object_store
from rlhf_ray.storage.object_store import COMMIT, Store, restore
from tests.servers import free_ports

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def bucket() -> Iterator[Callable[[str], str]]:
    """bucket("name") -> URI of an empty folder on moto's server, which speaks S3 over HTTP in a process of its own."""
    pytest.importorskip("moto")
    (port,) = free_ports(1)
    os.environ.update(AWS_ACCESS_KEY_ID="testing", AWS_SECRET_ACCESS_KEY="testing", AWS_EC2_METADATA_DISABLED="true")
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                request = urllib.request.Request(f"http://127.0.0.1:{port}/runs", method="PUT")
                urllib.request.urlopen(request, timeout=5).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.2)
        options = f"?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
        yield lambda name: f"s3://runs/{name}{options}"
    finally:
        process.terminate()
        process.wait(timeout=20)


def ppo(job: str, *changes: str, fault: str = "") -> tuple[int, str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RLHF_RAY_FAULT": fault}
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_ray.cli", "ppo", job, *changes],
        **{"env": environment, "capture_output": True, "text": True, "timeout": 300},
    )
    return done.returncode, done.stderr


@pytest.fixture
def job(jobs: dict[str, str], tmp_path: Path) -> str:
    """A PPO job of six steps on a fresh adapter, with a checkpoint every two."""
    values = yaml.safe_load(Path(jobs["ppo"]).read_text())
    (tmp_path / "rule.py").write_text(
        "def score(prompts, completions, **c):\n    return [float(len(t)) for t in completions]\n"
    )
    values |= {
        "sft": None,
        "lora": {"r": 4, "lora_alpha": 8},
        "rewards": [{"name": "long", "function": "rule.py:score"}],
    }
    values |= {"max_steps": 6, "save_steps": 2, "eval_steps": 6, "resume": "auto", "save_total_limit": 2}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(values))
    return "job.yaml"


def adapter(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_run_that_lost_its_disk_goes_on_from_the_copy(job: str, bucket: Callable[[str], str], tmp_path: Path) -> None:
    """Killed after its checkpoint of step 4, its folder deleted: the same adapter and metrics as the run that nobody touched."""
    uri, run = bucket("lost"), tmp_path / "runs" / "ppo"
    code, said = ppo(job, "output_dir=runs/whole")
    assert code == 0, said
    code, said = ppo(job, f"copy_to={uri}", fault="learner:update:step=6:kill")
    assert code == -9, said
    store = Store(uri)
    assert store.folders("checkpoints") == ["step_000002", "step_000004"]
    shutil.rmtree(run)
    code, said = ppo(job, f"copy_to={uri}")
    assert code == 0 and "restored from s3://" in said, said
    assert adapter(run) == adapter(tmp_path / "runs" / "whole")
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()][-1] == 6
    assert store.folders("checkpoints") == ["step_000004", "step_000006"], "copies of deleted checkpoints are deleted"

    shutil.rmtree(run)  # and once more, when it was done
    code, said = ppo(job, f"copy_to={uri}")
    assert code == 0 and ": final" in said and "nothing to do" in said, said
    assert adapter(run) == adapter(tmp_path / "runs" / "whole")


@pytest.mark.long
def test_what_has_no_commit_is_not_read_and_damage_is_passed_over(
    job: str, bucket: Callable[[str], str], tmp_path: Path
) -> None:
    uri = bucket("damaged")
    code, said = ppo(job, f"copy_to={uri}")
    assert code == 0, said
    store = Store(uri)
    store.fs.delete_file(store._path(f"final/{COMMIT}"))
    assert restore(uri, tmp_path / "a") == "step_000006"
    store.put(tmp_path / "job.yaml", "checkpoints/step_000006/checkpoint/adapter/adapter_model.safetensors")
    assert restore(uri, tmp_path / "b") == "step_000004"
    assert not list(tmp_path.glob(".b.restore-*")) and (tmp_path / "b" / "checkpoints" / "step_000004").is_dir()
    store.put(tmp_path / "job.yaml", "checkpoints/step_000004/run/manifest.json")
    with pytest.raises(ArtifactError, match="the copy is damaged"):
        restore(uri, tmp_path / "c")
    assert not (tmp_path / "c").exists()
    assert restore(bucket("nothing-here"), tmp_path / "d") is None


def test_an_upload_that_is_cut_off_leaves_no_commit(
    bucket: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, uri, told = tmp_path / "run", bucket("cut"), []
    for name in ("manifest.json", "checkpoints/step_000002/a", "checkpoints/step_000002/b"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("{}")
    whole = Store.put

    def cut(self: Any, source: Path, name: str) -> Any:
        if name.endswith("/b"):
            raise OSError("the line is dead")
        return whole(self, source, name)

    monkeypatch.setattr(Store, "put", cut)
    monkeypatch.setattr(object_store.time, "sleep", lambda seconds: None)
    checkpoint = run / "checkpoints" / "step_000002"
    assert not object_store.copy_checkpoint(run, checkpoint, uri, told.append)
    assert "step_000002 was not copied to" in told[0] and "the line is dead" in told[0]
    assert restore(uri, tmp_path / "new") is None
    monkeypatch.setattr(Store, "put", whole)
    assert object_store.copy_checkpoint(run, checkpoint, uri, told.append)
    assert (
        restore(uri, tmp_path / "new") == "step_000002" and (tmp_path / "new" / "checkpoints/step_000002/b").is_file()
    )


def test_data_on_an_object_store(bucket: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are read from there, and a node says whether it can."""
    from rlhf_ray.config.sections import DataConfig
    from rlhf_ray.data.records import read_rows
    from rlhf_ray.submit.probe import readable

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"instruction": "Name a bird.", "output": "A wren."}) + "\n")
    Store(bucket("data")).put(tmp_path / "rows.jsonl", "rows.jsonl")
    uri = bucket("data/rows.jsonl")
    (row,) = read_rows(DataConfig(train=(uri,)), "sft").rows
    assert row.where.startswith("s3://runs/data/rows.jsonl")
    assert readable(uri) == "" and readable(bucket("data/gone.jsonl")) != ""
