"""The script for the first minutes on a GPU, rehearsed without one: every step, a step that fails or hangs, README's line."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_first.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        spec = importlib.util.spec_from_file_location("gpu_first", SCRIPT)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPT.parent))
    return module


@pytest.mark.integration
def test_every_step_works_and_the_verdict_is_of_its_figures(script: ModuleType, tmp_path: Path) -> None:
    place = script.Place(tmp_path, tiny=True)
    steps: dict[str, Any] = {}
    for name in script.LIMITS:
        found = json.loads(json.dumps(script.STEPS[name](place)))
        steps[name] = {"ok": True, "seconds": 1.0, "found": found}
    found = {name: step["found"] for name, step in steps.items()}
    assert found["model"]["hash_s"] >= 0 and found["model"]["attention"] == "sdpa"
    for name in ("cudnn_off", "many_rows", "generate"):
        assert found["decode"][name]["tokens_per_s"] > 0, found["decode"][name]
    assert found["decode"]["cudnn_off"]["tokens"] == place.rows * place.reply
    for name in ("ppo", "kept"):
        (first, second) = found[name]["steps"]
        assert first["ratio/first_minibatch_max_deviation"] == 0.0 and second["time/update"] > 0
    assert {"load", "sampling", "scoring", "evaluation", "update"} <= found["plan"].keys()
    assert (
        found["attention"]["math"]["not_finite"] == 0 and max(found["attention"]["math"]["largest_difference"]) == 0.0
    )
    assert "error" in found["attention"]["cudnn"], "there is none on the CPU, and the other cases go on"
    verdict = script.verdict(steps)
    assert verdict["passed"] and verdict["figures"]["ratio_deviation"] == 0.0, verdict
    steps["ppo"]["found"]["steps"][1]["ratio/first_minibatch_max_deviation"] = 0.01
    steps["ppo"]["found"]["peak_bytes"] = {"update": 2 * steps["plan"]["found"]["update"]}
    failed = script.verdict(steps)
    assert not failed["passed"] and not failed["held"]["ratio_deviation"] and not failed["held"]["peak_of_plan"]


@pytest.mark.integration
def test_a_step_that_fails_stops_no_other_and_is_in_the_report(tmp_path: Path) -> None:
    """decode finds no model, since the step that makes it was not asked for."""
    report = tmp_path / "report.json"
    command = ["--tiny", "--steps", "decode", "attention", "--output", str(report), "--folder", str(tmp_path / "work")]
    done = subprocess.run([sys.executable, str(SCRIPT), *command], capture_output=True, text=True)
    found = json.loads(report.read_text())
    assert done.returncode == 1, "no PPO step was done: nothing has been shown"
    assert not found["measured"]["decode"]["ok"] and "not found locally" in found["measured"]["decode"]["error"]
    assert found["measured"]["attention"]["ok"] and found["verdict"]["passed"] is False
    assert found["machine"]["cores"] >= 1 and "torch" in found["versions"]


def test_a_step_that_hangs_is_ended(script: ModuleType, tmp_path: Path) -> None:
    outcome = script.one_step("attention", True, tmp_path, limit=0.1)
    assert not outcome["ok"] and "not done within 0 s" in outcome["error"] and outcome["found"] is None


def report_of(gpus: list[str], tiny: bool = False, passed: bool = True) -> dict[str, Any]:
    measured = {
        "ppo": {"found": {"steps": [{"time/step": 31.4}]}},
        "decode": {"found": {"cudnn_off": {"tokens_per_s": 1600.0}}},
    }
    return {"machine": {"gpus": gpus}, "settings": {"tiny": tiny}, "verdict": {"passed": passed}, "measured": measured}


@pytest.mark.parametrize(
    "wrong", [{"gpus": []}, {"gpus": ["NVIDIA H200"], "tiny": True}, {"gpus": ["NVIDIA H200"], "passed": False}]
)
def test_readme_tells_of_nothing_else(script: ModuleType, tmp_path: Path, wrong: dict[str, Any]) -> None:
    readme = tmp_path / "README.md"
    readme.write_text((ROOT / "README.md").read_text())
    with pytest.raises(ValueError, match="this is none"):
        script.write_readme(report_of(**wrong), readme)
    assert readme.read_text() == (ROOT / "README.md").read_text()


def test_readme_has_the_newest_run_once(script: ModuleType, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text((ROOT / "README.md").read_text())
    for _ in range(2):
        script.write_readme(report_of(["NVIDIA H200"]), readme)
    lines = readme.read_text().splitlines()
    (at,) = [i for i, line in enumerate(lines) if "gpu_first.json" in line]
    assert lines[at].startswith("- **One NVIDIA H200:**") and "31 s each" in lines[at]
    assert lines[at + 1].startswith("- **Not yet:** any real GPU")
    assert len(lines) == len((ROOT / "README.md").read_text().splitlines()) + 1
