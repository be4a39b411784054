"""F21: an ancestor shipped entry points that crashed at once. Here every command runs, by its console script, on a tiny model.

sft, reward, ppo and merge one by one: test_five_steps.py; generate and score: ../evaluation; sweep: ../sweep; promote, rollback and
adapters: test_promotion.py; plan: ../../unit/stages/test_plan.py; serve: ../service; api-key: ../../unit/serve; submit and
doctor: ../cluster. Here: pipeline with all four stages, evaluate, resume, report, and the demo with fewer steps.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_ray.cli.app import STAGE_HELP, app, main
from rlhf_ray.config import ServeConfig
from rlhf_ray.config.load import load
from rlhf_ray.data.tinyworld import Sizes, build_base, write_world
from rlhf_ray.stages import demo as demo_stage
from rlhf_ray.storage.run import load_run

pytestmark = pytest.mark.integration

PLUMBING = {"output_dir", "sft", "rewards", "model_name_or_path", "template", "learner", "report_to"}
TRIED = {
    *("sft", "dpo", "reward", "ppo", "merge", "generate", "score", "pipeline", "evaluate", "resume", "report", "demo"),
    *("sweep", "promote", "rollback", "adapters", "plan", "serve", "api-key", "submit", "doctor", "chat"),
}


def test_no_command_is_left_out() -> None:
    """A new command has to be tried somewhere, and named here."""
    assert {*STAGE_HELP, *(str(c.name or c.callback.__name__) for c in app.registered_commands if c.callback)} == TRIED


@pytest.fixture
def pipeline_job(jobs: dict[str, str], tmp_path: Path) -> str:
    """The chain of the job files as one job, with an evaluation at its end."""
    read = {stage: yaml.safe_load(Path(file).read_text()) for stage, file in jobs.items()}
    job: dict[str, Any] = {k: read["ppo"][k] for k in ("model_name_or_path", "template", "learner", "report_to")}
    job |= {stage: {k: v for k, v in fields.items() if k not in PLUMBING} for stage, fields in read.items()}
    job["evaluate"] = {"response_length": 8}
    for stage in ("sft", "reward", "ppo"):
        job[stage]["data"] = {**read[stage]["data"], "held_out_fraction": 0.3}
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump({"output_dir": "runs/all", **job}))
    return str(path)


def test_pipeline_evaluate_resume_and_report(
    pipeline_job: str, run_command: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    run_command("pipeline", pipeline_job, "--json")
    out = json.loads(capfd.readouterr().out)
    assert (out["stage"], out["status"], set(out["artifacts"])) == (
        "pipeline",
        "done",
        {"sft", "reward", "ppo", "evaluate", "report"},
    )
    found = load_run("runs/all/evaluate").metrics
    assert {f"kl_k1_per_response/{name}" for name in ("base", "sft", "ppo")} <= found.keys()
    before = Path("runs/all/ppo/adapter/adapter_model.safetensors").read_bytes()
    for run in ("runs/all", "runs/all/sft", "runs/all/ppo", "runs/all/evaluate"):
        run_command("resume", run)  # a finished run is returned as it is
        Path(run, "report.html").unlink()
        run_command("report", run)
        assert Path(run, "report.html").stat().st_size > 1000
    assert Path("runs/all/ppo/adapter/adapter_model.safetensors").read_bytes() == before
    job = yaml.safe_load(Path("runs/all/evaluate/config.yaml").read_text())
    Path("evaluate.yaml").write_text(yaml.safe_dump(job))
    run_command("evaluate", "evaluate.yaml", "output_dir=runs/again")
    assert load_run("runs/again").metrics == found


def test_a_malformed_row_names_row_and_field(jobs: dict[str, str], capfd: pytest.CaptureFixture[str]) -> None:
    """F21: the ancestor met one in a bare except that opened a debugger, and hung the cluster."""
    files = {
        "sft": ("sft.jsonl", "output"),
        "reward": ("pairs.jsonl", "completion_b"),
        "ppo": ("prompts.jsonl", "instruction"),
    }
    for stage, (file, field) in files.items():
        lines = Path(file).read_text().splitlines()
        row = json.loads(lines[6])
        row[field] = 7
        Path(file).write_text("\n".join([*lines[:6], json.dumps(row), *lines[7:]]) + "\n")
        overrides = () if stage == "sft" else ("sft=null", "lora.r=4")
        rule = ['rewards=[{name: rule, function: "json:dumps"}]'] if stage == "ppo" else []
        assert main([stage, jobs[stage], *overrides, *rule]) == 4
        told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(told) == 1 and f"{file}:7: '{field}': expected string, got int" in told[0], stage


def test_the_demo_in_few_steps(
    tmp_path: Path, run_command: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The demo's own code, with a base and stages of few steps; and a job file that it leaves runs as it is."""
    monkeypatch.chdir(tmp_path)
    whole = demo_stage.demo_config

    def few(folder: Path) -> Any:
        config = whole(folder)
        small = {"max_steps": 2, "eval_steps": 2}
        sections = {s: {**getattr(config, s), **small} for s in ("sft", "reward", "ppo")}
        sections["ppo"] |= {"rollout_batch_size": 16, "num_mini_batches": 2, "response_length": 8}
        sections["ppo"]["allow_chance_rewards"] = True  # of two steps
        data = {**config.evaluate["data"], "eval_max_rows": 8}
        sections["ppo"]["data"] = data
        sections["evaluate"] = {**config.evaluate, "data": data, "response_length": 8}
        given = config.model_dump(exclude_unset=True)
        return type(config)(**{**given, **sections, "learner": {"num_workers": 0, "num_threads": 1}, "report_to": []})

    monkeypatch.setattr(demo_stage, "demo_config", few)
    monkeypatch.setattr(demo_stage, "build_base", partial(build_base, steps=3))
    monkeypatch.setattr(demo_stage, "write_world", lambda folder, seed: write_world(folder, seed, Sizes(300, 300, 300)))
    run_command("demo", "--output-dir", "demo", "--json")
    metrics = json.loads(capfd.readouterr().out)["metrics"]
    assert {
        f"{name}/{who}" for name in ("true_reward", "true_reward_se") for who in ("base", "sft", "ppo")
    } <= metrics.keys()
    jobs = {p.stem for p in Path("demo/jobs").iterdir()}
    assert jobs == {"sft", "reward", "ppo", "evaluate", "pipeline", "sweep", "serve"}
    assert load(ServeConfig, "demo/jobs/serve.yaml").adapters.keys() == {"sft", "ppo", "reward"}
    run_command("ppo", "demo/jobs/ppo.yaml", "max_steps=1")
    assert load_run("demo/again/ppo").status == "done"
    run_command("resume", "demo")
    assert "nothing to do" in capfd.readouterr().err


def test_a_pipeline_that_fails_before_anything_ran_is_mended_under_its_own_name(
    pipeline_job: str, run_command: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    """Nothing to keep, nothing left; with a finished stage the folder stays, for `resume=auto`."""
    assert main(["pipeline", pipeline_job, "sft.train_batch_size=4096", "sft.per_device_train_batch_size=4096"]) == 4
    assert not Path("runs/all").exists()
    assert (
        main(["pipeline", pipeline_job, "reward.train_batch_size=4096", "reward.per_device_train_batch_size=4096"]) == 4
    )
    assert load_run("runs/all/sft").status == "done"
    run_command("pipeline", pipeline_job, "resume=auto")
