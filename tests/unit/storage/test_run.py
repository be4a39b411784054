from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from rlhf_ray.errors import ArtifactError, ConfigError
from rlhf_ray.storage.run import Run, load_run
from rlhf_ray.storage.run_folder import create_run, write_checkpoint


def finished(folder: Path) -> Run:
    run = create_run(folder, "sft", {"seed": 5}, "never")
    run.adapter_dir.mkdir()
    (run.adapter_dir / "adapter_config.json").write_text("{}")
    result = Run("sft", "done", str(run.path), 12, 3.5, 5, {"loss": 1.25, "bad": math.nan}, {"adapter": "adapter"})
    result.save()
    run.seal()
    return result


def test_a_finished_run_comes_back_from_wherever_it_was_moved_to(tmp_path: Path) -> None:
    saved = finished(tmp_path / "a")
    shutil.move(tmp_path / "a", tmp_path / "b")
    found = load_run(tmp_path / "b")
    assert (found.stage, found.status, found.steps, found.seconds, found.seed) == ("sft", "done", 12, 3.5, 5)
    assert found.run_dir == str(tmp_path / "b") and found.adapter_dir == tmp_path / "b" / "adapter"
    assert found.metrics["loss"] == 1.25 and math.isnan(found.metrics["bad"])
    assert found.artifacts == saved.artifacts and Run.load(tmp_path / "b").steps == 12


def test_the_summary_has_the_contract_s_fields_and_no_nan(tmp_path: Path) -> None:
    finished(tmp_path / "a")
    text = (tmp_path / "a" / "summary.json").read_text()
    assert list(json.loads(text)) == ["stage", "status", "run_dir", "steps", "seconds", "seed", "metrics", "artifacts"]
    assert "NaN" not in text and json.loads(text)["metrics"]["bad"] is None


def test_an_unfinished_run_tells_its_newest_step(tmp_path: Path) -> None:
    run = create_run(tmp_path / "a", "ppo", {"seed": 1}, "never")
    assert load_run(run.path).steps == 0
    write_checkpoint(run, 7, lambda folder: None, 3)
    found = load_run(run.path)
    assert (found.status, found.steps, found.seed) == ("running", 7, 1)


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        load_run(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="is not a run"):
        load_run(tmp_path)
    finished(tmp_path / "a")
    (tmp_path / "a" / "summary.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"summary\.json"):
        load_run(tmp_path / "a")
    with pytest.raises(ArtifactError, match="field steps"):
        Run.from_json({**Run("sft", "done", "/x", 1, 0.0, None).to_json(), "steps": "1"})
