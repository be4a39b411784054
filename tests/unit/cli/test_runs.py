"""Commands that name a run, an adapter or a folder which is not there, not finished, damaged or somebody else's.

One line and an exit code each: 2 where the name is wrong, 5 where something is there and cannot be used (faults 29, 55, 57; F31: in
an ancestor a missing checkpoint silently started from scratch).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from rlhf_ray.cli import main
from rlhf_ray.storage.run_folder import create_run

JOB = (
    "output_dir: runs/ppo\nmodel_name_or_path: base\ndata: {train: prompts.jsonl}\nrewards: [{run: reward}]\n"
    "learner: {num_workers: 0}\n"
)
NO_ADAPTER = "holds no adapter_config.json, config.json or run manifest; expected "
POLICY = "a run, RUN@STEP, an adapter folder or a checkpoint"
REWARD = "a reward run or a sequence-classification checkpoint"
ASK = ("--instruction", "Hi.")
SAY = ("--completion", "Hi.")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a job, an unfinished run without checkpoints, and runs that are damaged or newer than we are."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "reward", "empty", "photos"):
        Path(name).mkdir()
    Path("photos/cat.jpg").write_text("cat")
    Path("job.yaml").write_text(JOB)
    for name in ("started", "newer", "foreign", "cut", "muddled"):
        create_run(name, "ppo", {"seed": 0}, "never")
    create_run("newer", "ppo", {}, "auto").update_manifest(schema=99)
    create_run("foreign", "ppo", {}, "auto").update_manifest(stage="distil")
    create_run("tried", "sweep", {}, "never")
    create_run("shown", "demo", {}, "never")
    Path("cut/manifest.json").write_text('{"schema": 1, "stage"')
    Path("muddled/config.yaml").write_text("seed: [0")
    return tmp_path


# row, command, exit code, the line after "error: " ({here}: the working directory)
CASES: list[tuple[str, tuple[str, ...], int, str]] = [
    ("57 nothing there", ("resume", "nowhere"), 2, "nowhere: no such folder; expected a run folder"),
    ("57 a file", ("resume", "job.yaml"), 5, "job.yaml: is not a run; expected a folder with manifest.json"),
    ("57 an empty folder", ("resume", "empty"), 5, "empty: is not a run; expected a folder with manifest.json"),
    ("57 half a manifest", ("resume", "cut"), 5, "{here}/cut/manifest.json: cannot be read as JSON: "),
    ("57 half a configuration", ("resume", "muddled"), 5, "{here}/muddled/config.yaml: cannot be read: "),
    ("29 newer", ("resume", "newer"), 5,
     "{here}/newer/manifest.json: written by a newer version; expected schema up to 1; got 99; fix: update rlhf_ray"),
    ("29 another stage", ("resume", "foreign"), 2,
     "stage: unknown; expected one of sft, dpo, reward, ppo, evaluate, pipeline, demo; got distil"),
    ("57 elsewhere", ("resume", "started", "output_dir=there", "resume=never"), 2,
     "override output_dir=there: resume takes the run folder as it is; fix: leave it out\n"
     "error: override resume=never: resume takes the run folder as it is; fix: leave it out"),
    ("resume under no field", ("resume", "started", "max_kl"), 2,
     "override max_kl: no value; expected field=value, e.g. kl_coef=0.1"),
    ("resume a sweep under", ("resume", "tried", "ppo.max_kl=20"), 2,
     "tried: a sweep resumes with the settings and the data it was started with; expected no FIELD=VALUE, no --reset-data; "
     "got ppo.max_kl=20; fix: leave it out"),
    ("resume a sweep on other data", ("resume", "tried", "--reset-data"), 2,
     "tried: a sweep resumes with the settings and the data it was started with; expected no FIELD=VALUE, no --reset-data; "
     "got --reset-data; fix: leave it out"),
    ("resume a demo under", ("resume", "shown", "seed=1"), 2,
     "{here}/shown: a demo has no settings to change; expected no FIELD=VALUE; got seed=1"),
    ("merge nothing", ("merge", "nowhere"), 2, f"nowhere: no such folder; expected {POLICY}"),
    ("merge a file", ("merge", "job.yaml"), 5, f"job.yaml: {NO_ADAPTER}{POLICY}"),
    ("merge a Hub id", ("merge", "some/model"), 2, "some/model: holds no adapter to merge; expected a run or an adapter folder"),
    ("merge what is not finished", ("merge", "started"), 5,
     "started: the run has no adapter yet; expected a finished run; got status running"),
    ("merge a step that is not there", ("merge", "started@3"), 5, "{here}/started: no checkpoint of step 3; expected one of none"),
    ("report of nothing", ("report", "nowhere"), 2, "nowhere: no such folder; expected a run folder"),
    ("report of no run", ("report", "empty"), 5, "empty: not a run folder; expected one of config.yaml, manifest.json"),
    ("generate nothing", ("generate", "--policy", "./nowhere", *ASK), 2, f"./nowhere: no such folder; expected {POLICY}"),
    ("generate with no policy", ("generate", "--policy", "empty", *ASK), 5, f"empty: {NO_ADAPTER}{POLICY}"),
    ("generate with half a run", ("generate", "--policy", "started", *ASK), 5, "started: the run has no adapter yet"),
    ("generate with no step", ("generate", "--policy", "started@3", *ASK), 5, "{here}/started: no checkpoint of step 3"),
    ("generate with no base", ("generate", "--policy", "base", *ASK), 2,
     "model: no policy records its base model; expected a base model; fix: name it: --model"),
    ("score with nothing", ("score", "--run", "./nowhere", *SAY), 2, f"./nowhere: no such folder; expected {REWARD}"),
    ("score with no reward", ("score", "--run", "empty", *SAY), 5, f"empty: {NO_ADAPTER}{REWARD}"),
    ("score with half a run", ("score", "--run", "started", *SAY), 5, "started: the run has no adapter yet"),
    ("score with no function", ("score", "--function", "rule.py:score", *SAY), 2, "rewards.function: no such file"),
    ("55 a file", ("ppo", "job.yaml", "output_dir=job.yaml"), 2,
     "output_dir: job.yaml is a file; expected a folder to write the run into"),
    ("55 foreign", ("ppo", "job.yaml", "output_dir=photos"), 2,
     "output_dir: photos is not empty and is not a run; expected an empty or new folder; got cat.jpg; fix: choose another folder"),
    ("55 unwritable", ("ppo", "job.yaml", "output_dir=/proc/rlhf/run"), 2, "output_dir: cannot write to /proc/rlhf/run: "),
    ("55 a run", ("ppo", "job.yaml", "output_dir=started"), 2,
     "output_dir: started already holds a run; expected a new folder, or resume=auto; "
     "fix: to resume it, with the settings that it has: rlhf-ray resume started; for others: another output_dir"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "command", "code", "line"), CASES, ids=[c[0] for c in CASES])
def test_what_cannot_be_used_is_told_in_one_line(
    row: str, command: tuple[str, ...], code: int, line: str, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = sorted(p.relative_to(here) for p in here.rglob("*"))
    assert main(command) == code
    out, err = capfd.readouterr()
    told = [text for text in err.splitlines() if text.startswith("error: ")]
    assert out == "" and len(told) == 1 + line.count("\n"), err
    assert "\n".join(told).startswith("error: " + line.replace("{here}", str(here))), err
    assert sorted(p.relative_to(here) for p in here.rglob("*")) == before, "a refused command left something behind"


@pytest.mark.parametrize("options", [(), ("--reset-data",)])
def test_resume_hands_on_whether_changed_data_are_accepted(
    options: tuple[str, ...], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 24."""
    from rlhf_ray.stages import resume
    from rlhf_ray.storage.run import Run

    seen: list[tuple[str, bool, tuple[str, ...]]] = []

    def stand_in(run: str, reset_data: bool, overrides: Sequence[str]) -> Run:
        seen.append((run, reset_data, tuple(overrides)))
        return Run("ppo", "done", run, 1, 1.0, 0, {}, {})

    patched: Callable[..., Run] = stand_in
    monkeypatch.setattr(resume, "resume", patched)
    assert main(["resume", "started", *options]) == 0
    assert main(["resume", "started", "max_kl=20", "save_steps=3", *options]) == 0
    assert seen == [("started", bool(options), ()), ("started", bool(options), ("max_kl=20", "save_steps=3"))]
