"""A sweep over DPO jobs: beta, learning rate and label_smoothing, compared by reward at one KL cap, or by pairs alone."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rlhf_ray.config import DPOConfig, SFTConfig, SweepConfig
from rlhf_ray.config.load import load_dict
from rlhf_ray.errors import ConfigError
from rlhf_ray.registry import Registry
from rlhf_ray.stages.start import dpo, evaluate, sft
from rlhf_ray.storage.run import Run, load_run
from rlhf_ray.sweep.evaluation import EVALUATION
from rlhf_ray.sweep.sweep import resume_sweep, sweep
from rlhf_ray.sweep.trial import alone
from rlhf_ray.sweep.trials import TRAINED, evaluation_of, job_of, planned
from tests.runs import equal, weights, yes_or_no

pytestmark = pytest.mark.integration
RULE = "def score(prompts, completions, **columns):\n    return [text.count('y') / max(len(text), 1) for text in completions]\n"


@pytest.fixture
def job(
    tmp_path: Path, supervised_job: Callable[..., Any], write_jsonl: Callable[..., str], console: Any
) -> Callable[..., SweepConfig]:
    """job("name", field=value, ...) -> three settings of DPO on the pairs of yes and no; `rule` likes the letter y."""
    rows = [{"instruction": f"Is {i} a number?", "input": "", "output": "yyyy nnnn"} for i in range(60)]
    small = {"lora": {"r": 4, "lora_alpha": 8}, "max_steps": 6, "data": {"held_out_fraction": 0.3}}
    start = sft(supervised_job(SFTConfig, "sft", rows, **small), console).run_dir
    trial = supervised_job(DPOConfig, "x", yes_or_no(120), data={"held_out_fraction": 0.3}, max_steps=8, eval_steps=4)
    shared = ("model_name_or_path", "template", "report_to")
    prompts = write_jsonl("prompts.jsonl", rows)
    (tmp_path / "rule.py").write_text(RULE)
    measured = {
        "data": {"train": prompts, "held_out_fraction": 0.3},
        "rewards": [{"name": "rule", "function": f"{tmp_path / 'rule.py'}:score", "weight": 0.0}],
        "response_length": 8,
    }

    def make(name: str, **changes: Any) -> SweepConfig:
        given = trial.model_dump(exclude_unset=True)
        fields = {k: v for k, v in given.items() if k not in (*shared, "output_dir", "learner", "learning_rate")}
        values: dict[str, Any] = {
            "output_dir": str(tmp_path / name),
            **{k: given[k] for k in shared},
            "learner": {"num_threads": 1},
            "dpo": {"sft": start, **fields},
            "evaluate": measured,
            "metric": "eval/reward/rule",
            "space": {
                "beta": [0.05, 5.0],
                "learning_rate": {"given": "beta", "cases": {0.05: [1e-4, 1e-2], 5.0: [1e-2]}},
            },
        }
        return load_dict(SweepConfig, {**values, **changes}, "job")

    return make


def table(run: Run) -> list[dict[str, str]]:
    with open(Path(run.run_dir) / "settings.csv") as file:
        return list(csv.DictReader(file))


def test_dpo_trials_are_compared_at_one_kl_cap_and_the_winner_is_promoted(
    two_cpus: Any, job: Callable[..., SweepConfig], console: Any, tmp_path: Path
) -> None:
    config = job("sweep", seeds=(0, 1))
    run = sweep(config, console)
    assert run.metrics["trials/done"] == 6.0 and len(table(run)) == 3
    rows = {(row["beta"], row["learning_rate"]): row for row in table(run)}
    gentle, bold, held = rows["0.05", "0.0001"], rows["0.05", "0.01"], rows["5.0", "0.01"]
    assert float(gentle["kl_k1"]) < float(held["kl_k1"]) < float(bold["kl_k1"]), "beta holds the policy to its start"
    record = json.loads((Path(run.run_dir) / "sweep.json").read_text())
    assert record["choice"]["settings"] == {"beta": 0.05, "learning_rate": 0.01} and bold["verdict"] == "winner"
    assert "mean KL (k1) at most 10 nats" in record["choice"]["rule"]
    found = record["choice"]["confirmed"]
    assert found["metric"] == "eval/confirm/reward/rule" and found["rows"] > 0
    page = (Path(run.run_dir) / "report.html").read_text()
    assert "Reward against measured KL (k1)" in page and "(k3)" not in page and "Replies on the frontier" in page

    # a trial is the run that the same job gives by itself, and its evaluation that of `evaluate`
    trial = planned(config)[1]
    mine = alone(job_of(config, trial), 1).model_copy(update={"output_dir": str(tmp_path / "alone")})
    by_itself = dpo(mine, console)
    assert equal(weights(by_itself), weights(trial.folder)) and load_run(trial.folder).stage == "dpo"
    measured = evaluation_of(config, trial, mine, trained=by_itself.run_dir)
    again = evaluate(measured.model_copy(update={"output_dir": str(tmp_path / "measured")}), console)
    kept = load_run(trial.folder / EVALUATION)
    assert again.metrics == kept.metrics and kept.metrics["kl_k1_per_response/reference"] == 0.0
    (row,) = (row for row in record["trials"] if row["trial"] == trial.id)
    whole = [row["score"], row["confirmed"]]
    assert min(whole) <= kept.metrics[f"reward/rule/{TRAINED}"] <= max(whole), "halves of the prompts"

    # a lower cap is another choice over the same trials; promotion reads the reward and KL of the evaluation
    cap = (float(held["kl_k1"]) + float(bold["kl_k1"])) / 2
    best = Path(run.run_dir) / run.artifacts["best"]
    promoted = Registry(tmp_path / "registry").promote(
        run.run_dir, "winner", min_reward=-1.0, force=True, reason="a test"
    )
    gates = {gate.name: gate for gate in promoted.gates}
    assert promoted.entry.manifest["source"]["run_dir"] == str(best)
    assert gates["kl"].status == "passed" and gates["kl"].measured.endswith(
        "nats per reply on prompts that chose nothing"
    )
    assert gates["reward"].measured.startswith("eval/confirm/reward/rule") and gates["accuracy"].status == "passed"
    with pytest.raises(ConfigError, match=r"gate kl: failed; expected at most 1e-06 \(--max-kl\)"):
        Registry(tmp_path / "registry").promote(run.run_dir, "other", max_kl=1e-6, min_reward=-1.0)
    capped = sweep(job("sweep", seeds=(0, 1), kl_cap=cap, resume="auto", output_dir=str(tmp_path / "capped")), console)
    verdicts = {(row["beta"], row["learning_rate"]): row["verdict"] for row in table(capped)}
    assert verdicts["0.05", "0.01"].startswith("excluded: KL ") and "winner" in verdicts.values()


def test_a_trial_that_was_trained_and_not_measured_is_measured_on_resume(
    two_cpus: Any, job: Callable[..., SweepConfig], console: Any, tmp_path: Path
) -> None:
    """The reward fails after the first trial's training: nothing is trained again."""
    config = job("cut", space={"label_smoothing": [0.0, 0.3]}, max_trial_failures=0, max_concurrent_trials=1)
    rule = tmp_path / "rule.py"
    rule.write_text(
        "def score(prompts, completions, **columns):\n    raise RuntimeError('the reward service is gone')\n"
    )
    with pytest.raises(Exception, match="no trial finished"):
        sweep(config, console)
    trained = [weights(trial.folder) for trial in planned(config)]
    times = [(trial.folder / "summary.json").stat().st_mtime_ns for trial in planned(config)]
    rule.write_text(RULE)
    run = resume_sweep(config.output_dir, console)
    assert run.metrics["trials/done"] == 2.0
    assert [(trial.folder / "summary.json").stat().st_mtime_ns for trial in planned(config)] == times
    assert not equal(*trained) and all(equal(t, weights(trial.folder)) for t, trial in zip(trained, planned(config)))


def test_without_an_evaluation_pairs_choose_and_nothing_is_said_of_kl(
    two_cpus: Any, job: Callable[..., SweepConfig], console: Any
) -> None:
    values = job("x").model_dump(exclude_unset=True)
    del values["evaluate"], values["metric"]
    config = load_dict(SweepConfig, {**values, "output_dir": f"{values['output_dir']}/pairs"}, "job")
    assert (config.metric, config.kl_cap, config.length_ratio) == ("eval/accuracy", None, None)
    run = sweep(config, console)
    rows = table(run)
    assert {row["kl_k1"] for row in rows} == {""} and {row["on_frontier"] for row in rows} == {"False"}
    assert max(float(row["score"]) for row in rows) > 0.9 and run.metrics["best/score"] > 0.9
    page = (Path(run.run_dir) / "report.html").read_text()
    assert "eval/accuracy" in page and not re.search(r"\bnan\b", page, re.I) and "against measured KL" not in page


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"ppo": {"max_steps": 1}}, "set exactly one of ppo and dpo"),
        ({"dpo": None}, "set exactly one of ppo and dpo"),
        ({"scheduler": "asha"}, "scheduler: trials of DPO are measured once, at their end; expected none; got asha"),
        ({"metric": "eval/accuracy"}, "metric: expected eval/reward or eval/reward/<name>, as evaluate measures it"),
        ({"metric": "eval/loss", "evaluate": None}, "metric: expected eval/accuracy, or a section evaluate"),
        (
            {"kl_cap": 3.0, "evaluate": None},
            "kl_cap: DPO samples no replies to measure it by; add evaluate, or drop it",
        ),
        ({"evaluate": {"policies": []}}, "evaluate.policies: is each trial's own; drop it"),
        ({"dpo": {"output_dir": "x"}}, "dpo.output_dir: each trial writes to output_dir/trials"),
    ],
)
def test_a_job_that_says_two_things_is_refused(
    job: Callable[..., SweepConfig], changes: dict[str, Any], told: str
) -> None:
    with pytest.raises((ConfigError, ValidationError)) as error:
        job("x", **changes)
    assert told in str(error.value)


def test_what_cannot_be_is_told_before_the_first_trial(
    two_cpus: Any, job: Callable[..., SweepConfig], console: Any, tmp_path: Path
) -> None:
    measured = job("x").evaluate or {}
    for message, changes in (
        (r"space.betta=0.1: unknown key.*did you mean beta", {"space": {"betta": [0.1]}}),
        (r"space.label_smoothing=0.7", {"space": {"label_smoothing": [0.7]}}),
        (r"metric: no reward of the job has this name.*eval/reward/rule", {"metric": "eval/reward/judge"}),
        (r"metric: no reward of the job has this name; expected eval/reward/rule", {"metric": "eval/reward"}),
        (r"evaluate.*response_lenght: unknown", {"evaluate": {**measured, "response_lenght": 8}}),
        (r"evaluate.rewards\[0\].run: no such folder", {"evaluate": {**measured, "rewards": [{"run": "./none"}]}}),
        (r"share_base: trials of DPO sample nothing together", {"share_base": True}),
    ):
        with pytest.raises(ConfigError, match=message):
            sweep(job("refused", **changes), console)
    assert not (tmp_path / "refused").exists()
