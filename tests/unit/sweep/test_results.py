"""What a trial's run folder says of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_ray.storage.run import Run
from rlhf_ray.storage.run_folder import create_run
from rlhf_ray.sweep.results import outcome_of, row_of, settings_of
from rlhf_ray.sweep.trials import Trial

EVALUATIONS = {0: (0.1, 0.0, 10.0), 4: (0.9, 2.0, 12.0), 8: (0.5, 6.0, 30.0)}
"""Step -> held-out reward, KL, length: past its best."""


def trial(folder: Path, status: str = "done", **config: object) -> Trial:
    """As `ppo` leaves it: metrics of every step, and a summary at the end."""
    run = create_run(folder, "ppo", config, "never")
    lines = [
        {"step": s, "eval/reward": r, "eval/kl_k1_per_response": k, "eval/length": n, "eval/confirm/reward": r - 0.05}
        for s, (r, k, n) in EVALUATIONS.items()
    ]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if status == "done":
        Run("ppo", "done", str(run.path), 8, 1.0, 0, {"best/step": 4.0, "best/eval_reward": 0.9}).save()
        run.update_manifest(status="done")
    return Trial("setting", {}, 0, folder)


@pytest.mark.parametrize(("best", "step"), [(True, 4), (False, 8)])
def test_a_trial_is_judged_by_the_adapter_that_it_ends_with(tmp_path: Path, best: bool, step: int) -> None:
    """Score, KL, length and confirmed score are those of the step that `promote` would take."""
    found = outcome_of(trial(tmp_path / "run", load_best_model_at_end=best))
    reward, kl, length = EVALUATIONS[step]
    row = row_of(found, "eval/reward")
    assert (row["score"], row["kl_k1"], row["length"]) == (reward, kl, length)
    assert row["confirmed"] == pytest.approx(reward - 0.05) and row["length_ratio"] == length / 10.0
    assert row["step"] == 8 and settings_of([found], "eval/reward")[0].score == reward
    assert found.status == "done"


def test_an_unfinished_trial_is_where_it_is(tmp_path: Path) -> None:
    found = outcome_of(trial(tmp_path / "run", status="running", load_best_model_at_end=True), stopped="ASHA")
    assert (found.status, found.last["eval/reward"]) == ("stopped", 0.5)


def test_without_an_evaluation_before_training_no_length_ratio_is_known(tmp_path: Path) -> None:
    """Replies that had doubled by the first evaluation are not called as long as before."""
    given = trial(tmp_path / "run")
    lines = (given.folder / "metrics.jsonl").read_text().splitlines()
    (given.folder / "metrics.jsonl").write_text("\n".join(lines[1:]) + "\n")
    found = outcome_of(given)
    assert found.first == {} and row_of(found, "eval/reward")["length_ratio"] is None
