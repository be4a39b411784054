"""What optuna suggests: no setting twice, and on resume first the trials that are left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config import SweepConfig
from rlhf_ray.console import LocalConsole
from rlhf_ray.storage.run import Run
from rlhf_ray.storage.run_folder import create_run
from rlhf_ray.sweep.bases import Placed
from rlhf_ray.sweep.record import Record
from rlhf_ray.sweep.space import read_space
from rlhf_ray.sweep.trials import Trial, trial_of
from rlhf_ray.sweep.tuning import Watcher

pytest.importorskip("optuna")
from rlhf_ray.sweep.suggest import Suggestions

FOUR = {"kl_coef": [0.1, 0.2], "learning_rate": [1e-4, 1e-3]}


def config(folder: Path, **changes: Any) -> SweepConfig:
    fields: dict[str, Any] = {
        "output_dir": str(folder),
        "model_name_or_path": "m",
        "ppo": {"data": {"train": "p.jsonl"}, "rewards": [{"function": "f.py:score"}]},
        "search": "optuna",
        "num_samples": 4,
        "space": {"kl_coef": {"loguniform": [0.01, 1.0]}, "learning_rate": [1e-4, 1e-3]},
        "seeds": (0, 1),
    }
    return SweepConfig(**{**fields, **changes})


def suggestions(config: SweepConfig, record: Record) -> Suggestions:
    return Suggestions(read_space(config.space), config, record)


def finish(trial: Trial, score: float) -> None:
    """Leave what `ppo` leaves."""
    run = create_run(trial.folder, "ppo", {}, "never")
    line = {"step": 4, "eval/reward": score, "eval/kl_k1_per_response": 1.0, "eval/length": 9.0}
    (run.path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    Run("ppo", "done", str(run.path), 4, 1.0, trial.seed, {"best/step": 4.0, "best/eval_reward": score}).save()
    run.update_manifest(status="done")


def started(search: Suggestions, watcher: Watcher, name: str) -> Trial:
    """The next suggestion, as drivers start it."""
    placed = Placed(name, search.suggest(name))
    watcher.on_trial_start(0, [], placed)
    return watcher.ours(placed)


@pytest.mark.parametrize("waits", [True, False], ids=["all at once", "one after the other"])
def test_no_setting_is_suggested_twice(tmp_path: Path, waits: bool) -> None:
    given = config(tmp_path, space=FOUR, num_samples=8)
    search = suggestions(given, Record(given, tmp_path, []))
    assert search.to_run == 8, "four settings are all that there are"
    found = []
    for i in range(8):
        params = search.suggest(str(i))["trial"]
        found.append(trial_of(given, params["settings"], params["seed"]).id)
        if not waits:
            search.on_trial_complete(str(i), {"score": params["settings"]["kl_coef"]})
    assert len(set(found)) == 8
    assert search.suggest("more") == Suggestions.FINISHED


def test_a_sampler_that_has_learnt_what_is_best_still_finds_all_that_is_new(tmp_path: Path) -> None:
    given = config(tmp_path, space={"kl_coef": [i / 10 for i in range(1, 31)]}, num_samples=30, seeds=(0,))
    search = suggestions(given, Record(given, tmp_path, []))
    for i in range(30):
        assert search.suggest(str(i)) != Suggestions.FINISHED
        search.on_trial_complete(str(i), {"score": -float(i)})
    assert len(search.known) == 30


def test_what_was_begun_is_ended_before_anything_new(tmp_path: Path) -> None:
    """Of 4 settings x 2 seeds, 3 trials are done, 2 were stopped and 1 waits: it, and one setting more, are left."""
    given = config(tmp_path)
    record = Record(given, tmp_path, [])
    search, watcher = suggestions(given, record), Watcher(given, record, LocalConsole())
    assert search.to_run == 8
    trials = [started(search, watcher, str(i)) for i in range(6)]
    for trial in trials[:3]:
        finish(trial, 0.5)
    for trial in trials[3:5]:
        record.stop(trial, "asha: others do better")
    record.write()

    again = Record(given, tmp_path, [])
    assert [trial.id for trial in again.left()] == [trials[5].id] and again.to_suggest() == 1
    search = suggestions(given, again)
    assert search.to_run == 3
    assert len(search.study.trials) == 2, "the one that is done, and the one of which a trial is"
    rest = [started(search, Watcher(given, again, LocalConsole()), f"again{i}") for i in range(3)]
    assert rest[0].id == trials[5].id
    assert rest[1].setting == rest[2].setting not in {trial.setting for trial in trials}
    assert [trial.seed for trial in rest[1:]] == [0, 1]
    search.on_trial_complete("again0", {"score": 0.7})
    assert search.study.trials[-1].value == 0.7, "the sampler hears of a setting that was begun at an earlier start"


def test_a_driver_that_dies_finds_what_it_had_started(tmp_path: Path) -> None:
    """Nothing has ended yet: the setting is known all the same, and its seed that was not started either."""
    given = config(tmp_path)
    record = Record(given, tmp_path, [])
    trial = started(suggestions(given, record), Watcher(given, record, LocalConsole()), "first")
    again = Record(given, tmp_path, [])
    assert [(t.setting, t.seed) for t in again.left()] == [(trial.setting, 0), (trial.setting, 1)]
    assert again.to_suggest() == 3
