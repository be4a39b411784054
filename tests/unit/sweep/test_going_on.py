"""Which sweep a folder goes on with, without running a trial: those of the folder are made by hand, done or failed."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config.resolved import dump_yaml, to_dict
from rlhf_ray.config.sweep import SweepConfig
from rlhf_ray.console import LocalConsole
from rlhf_ray.errors import ConfigError, InvariantError
from rlhf_ray.metrics import standard_error_name
from rlhf_ray.storage.run import Run
from rlhf_ray.storage.run_folder import create_run, open_run
from rlhf_ray.sweep.record import Record
from rlhf_ray.sweep.report import write_sweep_report
from rlhf_ray.sweep.results import failure_file
from rlhf_ray.sweep.sweep import _as_it_began, _finish, resume_sweep, sweep
from rlhf_ray.sweep.trial import write_failure
from rlhf_ray.sweep.trials import Trial, job_of, planned, trial_of, written_out_as

Make = Callable[..., SweepConfig]


@pytest.fixture
def make(tmp_path: Path, tiny_llama: Callable[..., Path]) -> Make:
    """make(field=value, ...) -> two settings of one seed, in this process."""
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"instruction": "Hello.", "input": ""}) + "\n")
    (tmp_path / "f.py").write_text("def score(prompts, completions, **columns):\n    return [0.0] * len(prompts)\n")

    def of(**changes: Any) -> SweepConfig:
        ppo = {"data": {"train": str(tmp_path / "prompts.jsonl")}, "rewards": [{"function": f"{tmp_path}/f.py:score"}]}
        fields = {
            "output_dir": str(tmp_path / "sweep"),
            "model_name_or_path": str(tiny_llama()),
            "template": "none",
            "report_to": [],
            "resume": "auto",
            "learner": {"num_workers": 0},
            "share_base": True,
            "ppo": ppo | {"max_steps": 8} | changes.pop("ppo", {}),
            "space": {"kl_coef": [0.01, 0.1]},
        }
        return SweepConfig(**{**fields, **changes})

    return of


def finish(config: SweepConfig, trial: Trial, score: float, error: float | None = None) -> None:
    """Leave `trial` as its stage does when it is done.   error: of its score, over prompts."""
    run = create_run(trial.folder, "ppo", to_dict(job_of(config.confirming(True), trial)), "never")
    spread = {} if error is None else {standard_error_name("eval/reward"): error}
    rows = [{"step": s, "eval/reward": score, **spread, "eval/length": 10.0, "eval/rows": 20.0} for s in (0, 8)]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Run("ppo", "done", str(run.path), 8, 1.0, trial.seed, {}).save()
    run.update_manifest(status="done")


def begun(config: SweepConfig, done: int = 2) -> Record:
    """A sweep that was cut off when so many trials were done."""
    folder = create_run(config.output_dir, "sweep", written_out_as(config, True), "never")
    for score, trial in enumerate(planned(config)[:done]):
        finish(config, trial, float(score))
    record = Record(config, folder.path, planned(config))
    record.write()
    return record


def asked(name: str, port: int = 8123) -> dict[str, Any]:
    """A reward that a server gives."""
    return {"name": name, "url": f"http://127.0.0.1:{port}/score"}


OTHERS: dict[str, dict[str, Any]] = {
    "ppo.max_steps": {"ppo": {"max_steps": 200}},
    "ppo.learning_rate": {"ppo": {"learning_rate": 9e-4}},
    "length_ratio": {"length_ratio": None},
    "ppo.rewards": {"ppo": {"rewards": [asked("politeness")]}},
    "space.kl_coef": {"space": {"kl_coef": [0.5]}},
    "space.rewards": {"space": {"rewards": [[asked("politeness")], [asked("brevity")]]}},
    "seeds": {"seeds": (0, 1)},
}


@pytest.mark.parametrize("field", OTHERS)
@pytest.mark.parametrize("finished", [False, True])
def test_no_other_sweep_goes_on_in_its_folder(make: Make, field: str, finished: bool) -> None:
    folder = begun(make()).folder
    if finished:
        sweep(make())
    before = (folder / "config.yaml").read_text()
    with pytest.raises(ConfigError) as error:
        sweep(make(**OTHERS[field]))
    assert field in [problem.where for problem in error.value.problems]
    assert "put it back, or choose another output_dir" in str(error.value)
    assert (folder / "config.yaml").read_text() == before


def test_where_and_how_often_may_change_and_config_yaml_says_so(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    folder = begun(make()).folder
    changed = make(
        time_budget_s=900.0, trials_per_base=2, ppo={"save_steps": 3}, learner={"num_workers": 0, "num_threads": 1}
    )
    assert sweep(changed, LocalConsole()).metrics["trials/done"] == 2.0
    told = capsys.readouterr().err
    assert "sweep: continuing with time_budget_s 900.0 (was null)" in told
    assert "kl_cap 10 was not applied: no KL of the winner was measured" in told
    kept = open_run(folder).config()
    assert (kept["time_budget_s"], kept["ppo"]["save_steps"], kept["resume"]) == (900.0, 3, "auto")
    assert resume_sweep(str(folder)).metrics["trials/done"] == 2.0


def test_a_server_may_move_but_no_reward_of_the_space(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What all trials share is asked elsewhere from now on; the values of a space are what tells its trials apart."""
    begun(make(ppo={"rewards": [asked("politeness")]}))
    assert sweep(make(ppo={"rewards": [asked("politeness", 8124)]}), LocalConsole()).metrics["trials/done"] == 2.0
    assert "sweep: continuing with ppo.rewards" in capsys.readouterr().err
    space = [{"rewards": [[asked("a", port)], [asked("b")]]} for port in (8123, 8124)]
    varied = [make(output_dir=str(tmp_path / "varied"), space=values) for values in space]
    begun(varied[0])
    with pytest.raises(ConfigError, match=r"space\.rewards: .*varied holds a run with another value"):
        sweep(varied[1])


def test_no_space_is_listed_that_is_too_large_for_a_folder_that_is_there(make: Make) -> None:
    begun(make())
    with pytest.raises(ConfigError, match="space: the sweep has more trials than can be run; expected at most 10,000"):
        sweep(make(space={f"lora.field{i}": list(range(10)) for i in range(60)}))


def test_a_sweep_of_which_nothing_ran_may_become_another(make: Make) -> None:
    folder = create_run(make().output_dir, "sweep", written_out_as(make(), True), "never")
    config, changes = _as_it_began(folder, make(ppo={"max_steps": 200}))
    assert config.ppo is not None and config.ppo["confirm_held_out"] and changes == {}


def test_a_sweep_of_an_older_version_goes_on(make: Make) -> None:
    """Its config.yaml lacks fields that came later, has one that is gone and was off, and set no prompts apart."""
    folder = begun(make()).folder
    values = open_run(folder, verify=False).config()
    for name in ("confirm_held_out", "dual_clip", "alarm"):
        del values["ppo"][name]
    del values["trials_per_base"]
    (folder / "config.yaml").write_text(dump_yaml({**values, "gone_since": False}))
    assert write_sweep_report(folder).is_file()
    assert sweep(make()).metrics["trials/done"] == 2.0
    assert open_run(folder).config()["ppo"]["confirm_held_out"] is False


def stopped_for_time(config: SweepConfig, done: int) -> Record:
    """As a sweep of 20 seconds leaves it."""
    record = begun(config, done)
    for trial in planned(config)[done:]:
        record.stop(trial, "the time budget of 20 s was used up")
    record.write()
    return record


class Went(Exception):
    """A sweep that goes on with these trials."""


@pytest.fixture
def trials_that_go_on(monkeypatch: pytest.MonkeyPatch) -> Callable[[SweepConfig], int]:
    """How many trials `sweep` starts with a job, without any being started; 0 if it has nothing to do."""

    def run(config: SweepConfig, record: Record, *rest: Any) -> None:
        raise Went(len(record.left()))

    monkeypatch.setattr("rlhf_ray.sweep.sweep._run", run)

    def count(config: SweepConfig) -> int:
        try:
            sweep(config)
        except Went as went:
            return int(went.args[0])
        return 0

    return count


def test_a_time_budget_without_a_finished_trial_is_no_verdict(
    make: Make, trials_that_go_on: Callable[[SweepConfig], int]
) -> None:
    record = stopped_for_time(make(time_budget_s=20.0), done=0)
    with pytest.raises(
        InvariantError, match=r"no trial finished; got the time budget of 20 s.*fix: raise time_budget_s"
    ):
        _finish(record.config, record, 20.0, LocalConsole())
    assert trials_that_go_on(make(time_budget_s=9000.0)) == 2
    assert trials_that_go_on(make(time_budget_s=9000.0)) == 2, "and again"


def test_a_finished_sweep_goes_on_only_with_more_time(
    make: Make, trials_that_go_on: Callable[[SweepConfig], int]
) -> None:
    record = stopped_for_time(make(time_budget_s=20.0), done=1)
    assert _finish(record.config, record, 20.0, LocalConsole()).metrics["trials/stopped"] == 1.0
    assert [trials_that_go_on(make(time_budget_s=t)) for t in (20.0, 10.0, 30.0)] == [0, 0, 1]


def test_a_failed_trial_of_a_finished_sweep_is_tried_again(
    make: Make, trials_that_go_on: Callable[[SweepConfig], int]
) -> None:
    config = make()
    record, (_, failed) = begun(config, done=1), planned(config)
    write_failure(failed, RuntimeError("CUDA out of memory"))
    assert _finish(config, record, 1.0, LocalConsole()).metrics["trials/failed"] == 1.0
    assert trials_that_go_on(config) == 1
    finish(config, failed, 3.0)
    failure_file(failed).unlink()
    assert resume_sweep(config.output_dir).metrics["trials/done"] == 2.0
    assert trials_that_go_on(config) == 0


Count = Callable[[SweepConfig], int]


def test_an_interrupted_retry_of_a_finished_sweep_takes_nothing_up_that_had_ended(
    make: Make, trials_that_go_on: Count
) -> None:
    """Of three trials one is done, one failed and one was stopped by the time budget. The fake is interrupted each time."""
    config = make(time_budget_s=20.0, space={"kl_coef": [0.01, 0.1, 0.2]})
    record, (_, failed, stopped) = begun(config, done=1), planned(config)
    write_failure(failed, RuntimeError("CUDA out of memory"))
    record.stop(stopped, "the time budget of 20 s was used up")
    _finish(config, record, 1.0, LocalConsole())
    assert [trials_that_go_on(config) for _ in range(3)] == [1, 1, 1]
    more = config.model_copy(update={"time_budget_s": 30.0})
    assert [trials_that_go_on(more) for _ in range(3)] == [2, 2, 2], "more time was asked for once"


def test_a_seed_for_which_there_was_no_time_waits_for_more(make: Make, trials_that_go_on: Count) -> None:
    """Of a suggestion only the first seed was started: the sweep is finished all the same."""
    config = make(search="optuna", seeds=(0, 1), num_samples=2, time_budget_s=20.0)
    record, trial = begun(config), trial_of(config, {"kl_coef": 0.01}, 0)
    finish(config, trial, 1.0)
    record.add(trial)
    _finish(config, record, 20.0, LocalConsole())
    assert [trials_that_go_on(config.model_copy(update={"time_budget_s": t})) for t in (20.0, 30.0, 30.0)] == [0, 1, 1]


def table(config: SweepConfig) -> list[dict[str, str]]:
    with (Path(config.output_dir) / "trials.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("lost", ["a folder was deleted", "the machine was lost"])
def test_what_a_finished_sweep_says_is_done_is_not_run_again(
    make: Make, trials_that_go_on: Count, tmp_path: Path, lost: str
) -> None:
    """Its copy holds the sweep's own files, and its trials have copies of their own; a user deletes losers to save room."""
    config = make(copy_to=f"file://{tmp_path}/copies", space={"kl_coef": [0.01, 0.1, 0.2]})
    record, (loser, other, failed) = begun(config), planned(config)
    write_failure(failed, RuntimeError("CUDA out of memory"))
    _finish(config, record, 1.0, LocalConsole())
    before = table(config)
    if lost == "a folder was deleted":
        shutil.rmtree(loser.folder)
        failure_file(failed).unlink()
    else:
        shutil.rmtree(config.output_dir)
    assert [trials_that_go_on(config) for _ in range(2)] == [1, 1], "the one that failed"
    finish(config, failed, 3.0)
    done = resume_sweep(config.output_dir)
    assert done.metrics["trials/done"] == 3.0 and done.metrics["best/score"] == 3.0
    assert table(config)[:2] == before[:2], "its row, with every figure"
    assert [row["score"] for row in table(config)] == ["0.0", "1.0", "3.0"]
    shutil.rmtree(other.folder, ignore_errors=True)
    assert trials_that_go_on(config) == 0
    assert resume_sweep(config.output_dir).metrics == done.metrics


def test_a_folder_that_is_gone_leaves_what_was_said_of_it(make: Make) -> None:
    """Also of a trial that was stopped, whose figures stand in the table, and of one that waits again with more time."""
    config = make(time_budget_s=20.0)
    record, (first, second) = begun(config, done=1), planned(config)
    finish(config, second, 1.0)
    open_run(second.folder).update_manifest(status="running")
    record.stop(second, "the time budget of 20 s was used up")
    _finish(config, record, 20.0, LocalConsole())
    before = table(config)
    shutil.rmtree(Path(config.output_dir) / "trials")
    again = Record(config, Path(config.output_dir), planned(config))
    again.write()
    assert table(config) == before and before[1]["score"] == "1.0" and before[1]["length_ratio"] == "1.0"
    assert write_sweep_report(config.output_dir).is_file()
    again.begin(finished=True, has_more_time=True)
    assert [again.outcome(trial).status for trial in (first, second)] == ["done", "waiting"]


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        (
            (0.5, 0.5),
            "no setting is shown to be better than the other one; kl_coef 0.01 and 1 other have the highest mean",
        ),
        ((0.5, 0.6), "no setting is shown to be better than the other one; kl_coef 0.1 has the highest mean"),
        ((0.1, 0.9), "winner: kl_coef 0.1"),
    ],
)
def test_who_is_not_shown_to_be_better_is_not_announced_as_the_winner(
    make: Make, capsys: pytest.CaptureFixture[str], scores: tuple[float, float], said: str
) -> None:
    """The last lines, sweep.json and the report say the same; a prompt's standard error is 0.1 here."""
    config = make()
    record = begun(config, done=0)
    for trial, score in zip(planned(config), scores):
        finish(config, trial, score, error=0.1)
    run = _finish(config, record, 1.0, LocalConsole())
    told, folder = capsys.readouterr().err, Path(config.output_dir)
    found = f"{said}: eval/reward {max(scores):.3f} ± 0.100"
    assert found in told
    assert json.loads((folder / "sweep.json").read_text())["choice"]["conclusion"] == found
    page = (folder / "report.html").read_text()
    assert found[1:] in page and ("winner" in page) is said.startswith("winner")
    assert run.metrics["best/not_shown_to_be_worse"] == (0.0 if said.startswith("winner") else 1.0)


def test_a_length_ratio_needs_an_evaluation_before_training(
    make: Make, trials_that_go_on: Callable[[SweepConfig], int]
) -> None:
    """Said before a new sweep; one that an older version began goes on."""
    late = {"ppo": {"eval_on_start": False}}
    refused = (
        "length_ratio: replies are compared with those before training; expected eval_on_start: true; got eval_on_start"
    )
    with pytest.raises(ConfigError, match=refused):
        sweep(make(**late))
    assert not Path(make().output_dir).exists()
    assert trials_that_go_on(make(length_ratio=None, **late)) == 2
    begun(make(**late), done=1)
    assert trials_that_go_on(make(**late)) == 1
