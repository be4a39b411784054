"""What went wrong in silence in other systems, tried on a whole PPO run: bare defaults, short runs, drift on resume, bad input."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_ray.config import PPOConfig
from rlhf_ray.config.resolved import dump_yaml
from rlhf_ray.console import Console, LocalConsole, NullConsole
from rlhf_ray.errors import ArtifactError, ConfigError, DataError, Interrupted, InvariantError, LimitReached
from rlhf_ray.metrics import read_metrics
from rlhf_ray.roles.experience import Evaluation
from rlhf_ray.roles.learner import Learner
from rlhf_ray.stages.resume import resume
from rlhf_ray.stages.start import ppo
from rlhf_ray.storage.run import Run
from rlhf_ray.storage.run_folder import describe_files, open_run

pytestmark = pytest.mark.integration
Job = Callable[..., PPOConfig]


def run(config: PPOConfig, console: Console | None = None) -> Run:
    return ppo(config, console or NullConsole())


def rows_of(done: Run) -> list[dict[str, Any]]:
    return read_metrics(Path(done.run_dir) / "metrics.jsonl")


def test_bare_defaults_run(tmp_path: Path, tiny_llama: Callable[..., Path], reward_file: str) -> None:
    """F2: the ancestor's own default KL penalty raised, after four models were loaded and a rollout was done.

    Only what has no default is set, and what bounds the time: one step, in this process."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"instruction": f"Say {i}."}) + "\n" for i in range(300)))
    fields: dict[str, Any] = {
        "output_dir": str(tmp_path / "run"),
        "model_name_or_path": str(tiny_llama(context=320)),
        "data": {"train": str(prompts)},
        "rewards": [{"function": reward_file}],
        "learner": {"num_workers": 0, "num_threads": 1},
        "max_steps": 1,
        "eval_on_start": False,
    }
    done = run(PPOConfig(**fields))
    last = rows_of(done)[-1]
    assert (last["step"], last["kl/coef"], last["response/length"] > 1) == (1, 0.05, True)
    assert load_file(Path(done.run_dir) / "adapter" / "adapter_model.safetensors")


def test_the_alarm_stops_a_run_where_that_is_asked_for_and_it_can_go_on(ppo_job: Job) -> None:
    """Two steps outside of a band that is narrow on purpose; the checkpoint of that step is there, and warning is the default."""
    narrow = {"entropy_factor": 1.0000001, "length_factor": None, "repetition_rise": None}
    config = ppo_job("alarmed", alarm={"action": "stop", **narrow}, max_steps=5, save_steps=5, learning_rate=1e-3)
    with pytest.raises(LimitReached, match=r"step 3: over-optimisation: replies have .* policy/entropy left its band"):
        run(config)
    folder = open_run(config.output_dir, verify=False)
    assert [checkpoint.step for checkpoint in folder.checkpoints()] == [3]
    assert [row["step"] for row in read_metrics(folder.path / "metrics.jsonl") if "alarm/entropy" in row] == [3]
    said = io.StringIO()
    done = resume(config.output_dir, LocalConsole(file=said), overrides=["alarm.action=warn"])
    assert done.status == "done" and done.steps == 5
    assert said.getvalue().count("over-optimisation") == 0, "it was told before the run was stopped"
    assert {row["step"] for row in rows_of(done) if "alarm/entropy" in row} == {3, 4, 5}
    assert "The alarm for over-optimisation went off" in (folder.path / "report.html").read_text()


def test_the_best_step_is_one_within_the_kl_cap(ppo_job: Job) -> None:
    """A learning rate that moves the policy far: whatever is earned there, only the start is near enough."""
    fields: dict[str, Any] = {"learning_rate": 5e-2, "max_steps": 3, "eval_steps": 1, "load_best_model_at_end": True}
    free, near = (run(ppo_job(name, kl_cap=cap, **fields)) for name, cap in (("free", None), ("near", 1e-6)))
    rows = {row["step"]: row for row in rows_of(free) if "eval/reward" in row}
    assert max(rows, key=lambda step: rows[step]["eval/reward"]) > 0 and rows[3]["eval/kl_k1_per_response"] > 1e-6
    assert (free.metrics["best/step"] > 0, near.metrics["best/step"]) == (True, 0)


def test_rewards_for_some_prompts_only_and_a_watcher_that_breaks(ppo_job: Job, tmp_path: Path) -> None:
    """Two rewards, each for its kind of prompt, and a weight-0 one that says NaN: no reply is lost, and training goes on. All three
    made the sum NaN, and the first step stopped the run."""
    rule = tmp_path / "kinds.py"
    rule.write_text(
        "def odd(prompts, completions, **k):\n    return [1.0 if int(p.split()[-1][:-1]) % 2 else None for p in prompts]\n"
        "def even(prompts, completions, **k):\n    return [None if int(p.split()[-1][:-1]) % 2 else 3.0 for p in prompts]\n"
        "def watch(prompts, completions, **k):\n    return [float('nan')] * len(prompts)\n"
    )
    weights = {"odd": 1.0, "even": 0.5, "watch": 0.0}
    rewards = [{"name": name, "function": f"{rule}:{name}", "weight": w} for name, w in weights.items()]
    rows = rows_of(run(ppo_job("kinds", rewards=rewards)))
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    for row in rows[1:]:
        share = row["reward_applies/odd"]
        assert 0 < share < 1 and share + row["reward_applies/even"] == 1.0 and row["reward_applies/watch"] == 0.0
        assert (row["reward/odd"], row["reward/even"]) == (1.0, 3.0) and "reward/watch" not in row
        assert row["reward/mean"] == pytest.approx(share + 1.5 * (1 - share)) and "faults/rewards_left_out" not in row


def test_a_reward_that_applies_to_no_held_out_reply(ppo_job: Job, tmp_path: Path) -> None:
    """The run trains on the prompts that it does apply to, says once that nothing is evaluated, and ends with its last step. It was
    stopped before the first step."""
    rule, said = tmp_path / "half.py", io.StringIO()
    rule.write_text(
        "def score(prompts, completions, **k):\n    return [None if p.startswith('Held') else float(len(c))"
        " for p, c in zip(prompts, completions)]\n"
    )
    held = tmp_path / "held.jsonl"
    held.write_text("".join(f'{{"instruction": "Held out {i}."}}\n' for i in range(4)))
    data = {"train": ppo_job("none").data.train, "eval": str(held)}
    rewards = [{"function": f"{rule}:score"}]
    config = ppo_job("half", rewards=rewards, data=data, load_best_model_at_end=True, max_steps=2, eval_steps=1)
    done = run(config, LocalConsole(file=said))
    assert done.status == "done" and done.steps == 2
    evaluated = [row for row in rows_of(done) if "eval/rows" in row]
    assert [row["step"] for row in evaluated] == [0, 1, 2] and not any("eval/reward" in row for row in evaluated)
    line = "evaluation at step 0: no reward applies to 4 of 4 replies to held-out prompts (None): there is no eval/reward, and so"
    assert said.getvalue().replace("\n", " ").count(line) == 1
    assert "best/step" not in done.metrics and "NaN" not in (Path(done.run_dir) / "metrics.jsonl").read_text()


def test_a_short_run_leaves_its_result_and_its_last_step(ppo_job: Job) -> None:
    """F31 and F7, no final save: the ancestors saved every 100 steps and not at the end; 3 steps left nothing."""
    done = run(ppo_job("short", save_steps=100, eval_steps=100))
    folder = Path(done.run_dir)
    assert [p.name for p in sorted((folder / "checkpoints").glob("step_*"))] == ["step_000003"]
    assert (folder / "checkpoints" / "step_000003" / "optimizer.safetensors").is_file()
    saved, result = (
        load_file(place / "adapter" / "adapter_model.safetensors")
        for place in (folder / "checkpoints" / "step_000003", folder)
    )
    assert saved.keys() == result.keys() and all(torch.equal(saved[k], result[k]) for k in saved)
    assert any(bool(t.any()) for k, t in result.items() if "lora_B" in k)


def test_the_critic_learns_to_explain_the_returns(ppo_job: Job, tmp_path: Path) -> None:
    """F4: with whitened rewards of about 17, a value clip of 0.2 and a head of zeros, the ancestor's critic could barely move.

    Here the prompt alone decides the reward, which is as large as that, and the defaults have to learn it."""
    prompts, rule = tmp_path / "two_kinds.jsonl", tmp_path / "kinds.py"
    asked = [f"{'up' if i % 2 else 'DOWN'} {i} {'up' if i % 2 else 'DOWN'}" for i in range(80)]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in asked))
    rule.write_text(
        "def score(prompts, completions, **k):\n    return [17.0 if 'up' in p else -17.0 for p in prompts]\n"
    )
    changes: dict[str, Any] = {
        "data": {"train": str(prompts)},
        "rewards": [{"name": "kinds", "function": f"{rule}:score"}],
        "value": {"learning_rate": 1e-2},
        "learning_rate": 1e-6,
        "normalize_rewards": True,
        "missing_eos_penalty": None,
        "rollout_batch_size": 32,
        "per_device_train_batch_size": 16,
        "response_length": 4,
        "max_steps": 10,
        "eval_on_start": False,
        "eval_steps": 100,
    }
    explained = [row["value/explained_variance"] for row in rows_of(run(ppo_job("critic", **changes)))]
    assert abs(explained[0]) < 0.05 and sum(explained[-2:]) / 2 > 0.5


def test_the_gradient_norm_is_logged_as_it_was_before_clipping(ppo_job: Job) -> None:
    """F23: logged after clipping it can never exceed the limit, and an explosion looks calm."""
    last = rows_of(run(ppo_job("clipped", max_steps=1, max_grad_norm=1e-4)))[-1]
    assert last["grad_norm/policy"] > 1e-3 and last["grad_norm/value"] > 1e-3


def test_the_update_must_see_the_policy_that_was_evaluated(ppo_job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """F5, dropout making ratio != 1: any difference between the two passes stops the run at its first minibatch."""
    plain = Learner.evaluate

    def elsewhere(self: Learner, rollout: Any, step: int, learnt: Any = None) -> Evaluation:
        found = plain(self, rollout, step, learnt)
        return replace(found, logprobs=torch.where(rollout.response_mask, found.logprobs - 5e-4, found.logprobs))

    monkeypatch.setattr(Learner, "evaluate", elsewhere)
    with pytest.raises(InvariantError, match=r"step 1: the probability ratio of the first minibatch is not 1"):
        run(ppo_job("run"))


@pytest.mark.parametrize(
    ("reward", "changes"),
    [
        (1.0, {"normalize_rewards": True}),
        (0.0, {"missing_eos_penalty": None}),
        (1.0, {"advantage_estimator": "grpo", "num_generations": 2, "missing_eos_penalty": None}),
    ],
    ids=["one", "none", "grpo"],
)
def test_equal_rewards_are_told_and_give_no_nan(
    ppo_job: Job, tmp_path: Path, console: Any, reward: float, changes: dict[str, Any]
) -> None:
    """Fault 27: a constant reward; also the spread that F33's batch of one did not have. Where nobody has an advantage, as at the
    start of a task with a rare reward, the first update changes nothing and is none of the program's bugs."""
    path = tmp_path / "flat.py"
    path.write_text(f"def score(prompts, completions, **k):\n    return [{reward}] * len(prompts)\n")
    flat = {"rewards": [{"name": "flat", "function": f"{path}:score"}], "max_steps": 2, **changes}
    done = run(ppo_job("flat", **flat), console)
    told = [w for w in console.warnings if w.startswith("reward std 0 at step 1")]
    assert done.status == "done" and len(told) == 1
    assert all(value == value for row in rows_of(done) for value in row.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"response_length": 256},
            "response_length: leaves no room for a prompt; expected below 256 (the model's context)",
        ),
        ({"response_length": 128, "max_length": 129}, "prompts.jsonl: no prompt is left to train on"),
        ({"data": {"train": "nowhere.jsonl"}}, "nowhere.jsonl: no such file"),
        ({"rollout_batch_size": 128}, "data.train: "),
        (
            {"stop_token_ids": [100_000]},
            "stop_token_ids: not in the vocabulary; expected ids from 0 to 259; got 100000",
        ),
        ({"template": "chat"}, "template: the tokenizer has no chat template"),
    ],
    ids=["fault 45", "fault 20", "fault 26", "fault 23", "F27 eos id wrong", "fault 52"],
)
def test_jobs_that_cannot_run_say_so_in_one_line(ppo_job: Job, changes: dict[str, Any], message: str) -> None:
    """Faults that show only once the model or the data is there: told before the first rollout, with exit code 2 or 4."""
    with pytest.raises((ConfigError, DataError)) as caught:
        run(ppo_job("run", **changes))
    (line,) = caught.value.lines()
    assert message in line


def forget(checkpoint: Path, *names: str) -> None:
    """Make `checkpoint` one of a version whose state.json had not these items."""
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps({k: v for k, v in state.items() if k not in names}))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    files = describe_files(checkpoint, skip=("manifest.json",))
    (checkpoint / "manifest.json").write_text(json.dumps({**manifest, "files": files}))


class TestGoingOn:
    """A run that was interrupted in its third step, resumed under conditions that changed meanwhile."""

    @pytest.fixture
    def broken(self, ppo_job: Job, monkeypatch: pytest.MonkeyPatch) -> PPOConfig:
        monkeypatch.setenv("FAIL_AT_CALL", "5")  # 2 chunks a step
        config = ppo_job("broken", save_steps=1, eval_on_start=False, eval_steps=100, resume="auto")
        with pytest.raises(RuntimeError, match="reward service"):
            run(config)
        monkeypatch.delenv("FAIL_AT_CALL")
        return config

    def test_another_configuration_is_refused_field_by_field(self, broken: PPOConfig) -> None:
        """Fault 56: silent drift. What only says where and how often may change."""
        other = broken.model_copy(update={"kl_coef": 0.3, "lam": 0.9, "run_name": "again", "save_total_limit": 9})
        with pytest.raises(ConfigError) as caught:
            run(other)
        assert caught.value.lines() == [
            f"error: {name}: {broken.output_dir} holds a run with another value; expected {old}; got {new}; "
            "fix: put it back, or choose another output_dir"
            for name, old, new in (("kl_coef", "0.05", "0.3"), ("lam", "0.95", "0.9"))
        ]
        allowed = broken.model_copy(update={"save_total_limit": 9, "run_name": "again"})
        assert run(allowed).status == "done"

    def test_resume_takes_what_may_change(self, broken: PPOConfig) -> None:
        """A guard's advice can be followed; the start after it finds what was changed."""
        folder = open_run(broken.output_dir, verify=False)
        with pytest.raises(ConfigError, match=r"kl_coef: .* holds a run with another value; expected 0.05; got 0.3"):
            resume(broken.output_dir, NullConsole(), overrides=["kl_coef=0.3"])
        with pytest.raises(ConfigError, match="override max_k=1: unknown key"):
            resume(broken.output_dir, NullConsole(), overrides=["max_k=1"])
        said = io.StringIO()
        with pytest.raises(Interrupted, match="raise max_kl"):
            resume(broken.output_dir, LocalConsole(file=said), overrides=["max_kl=1e-9"])
        assert "ppo: continuing with max_kl 1e-09 (was null)\n" in said.getvalue()
        assert folder.config()["max_kl"] == 1e-9
        assert resume(broken.output_dir, LocalConsole(file=said), overrides=["max_kl=1000"]).status == "done"
        assert "ppo: continuing with max_kl 1000.0 (was 1e-09)\n" in said.getvalue()
        assert folder.config()["max_kl"] == 1000.0

    def test_a_configuration_that_was_edited_in_the_run_is_refused(self, broken: PPOConfig) -> None:
        """Fault 56: resume would compare the file with itself. What may change may be edited; a checkpoint of an older version,
        which says nothing, is believed."""
        folder = open_run(broken.output_dir, verify=False)
        was, path = folder.config(), folder.path / "config.yaml"
        path.write_text(dump_yaml({**was, "learning_rate": 0.5, "max_kl": 1e-9}))
        with pytest.raises(ConfigError) as caught:
            resume(broken.output_dir, NullConsole())
        assert caught.value.lines() == [
            f"error: learning_rate: {folder.checkpoints()[-1].path} was written under another value, and config.yaml has been "
            f"edited since; expected 0.001; got 0.5; fix: put it back in {path}, or start another run"
        ]
        forget(folder.checkpoints()[-1].path, "config", "environment")
        path.write_text(dump_yaml({**was, "lam": 0.9}))
        assert resume(broken.output_dir, NullConsole()).status == "done"

    def test_what_keeps_bits_from_being_equal_is_told_once(self, broken: PPOConfig) -> None:
        said = io.StringIO()
        assert resume(broken.output_dir, LocalConsole(file=said), overrides=["learner.num_threads=2"]).status == "done"
        assert [line for line in said.getvalue().splitlines() if "exact" in line] == [
            "warning: resumes, not bit-exact: threads 1 -> 2"
        ]

    def test_where_nothing_has_changed_nothing_is_told(self, broken: PPOConfig) -> None:
        said = io.StringIO()
        assert resume(broken.output_dir, LocalConsole(file=said)).status == "done"
        assert "resuming from step 2 " in said.getvalue() and "exact" not in said.getvalue()

    def test_other_data_are_refused_unless_accepted(self, broken: PPOConfig, prompts_file: Path) -> None:
        """Fault 24: rows that moved would be replayed or skipped without a word."""
        recorded = open_run(broken.output_dir, verify=False).manifest()["data"][0]["sha256"]
        lines = prompts_file.read_text().splitlines(keepends=True)
        prompts_file.write_text("".join(lines[::-1]))
        with pytest.raises(DataError) as caught:
            run(broken)
        (line,) = caught.value.lines()
        assert f"{prompts_file}: data sha256 differs from the checkpoint's; expected {recorded}; got " in line
        assert line.endswith("rlhf-ray resume RUN --reset-data") and caught.value.exit_code == 4
        assert resume(broken.output_dir, NullConsole(), reset_data=True).status == "done"
        assert open_run(broken.output_dir).manifest()["data"][0]["sha256"] != recorded

    def test_checkpoints_that_are_all_gone_end_the_job(self, broken: PPOConfig) -> None:
        """F31, F7, fault 19: the ancestor looked for another file name, found nothing, and started from scratch."""
        for weights in Path(broken.output_dir).glob("checkpoints/step_*/adapter/adapter_model.safetensors"):
            weights.unlink()
        with pytest.raises(ArtifactError, match="no valid checkpoint") as caught:
            resume(broken.output_dir, NullConsole())
        assert caught.value.exit_code == 5


def test_a_job_that_fails_before_its_first_step_leaves_no_run(ppo_job: Job) -> None:
    """It is mended and started again under the same name."""
    wrong = ppo_job("run", stop_token_ids=[100_000])
    with pytest.raises(ConfigError, match="stop_token_ids"):
        run(wrong)
    assert not Path(wrong.output_dir).exists()
    assert run(ppo_job("run", max_steps=1)).status == "done"


def test_a_run_without_a_checkpoint_starts_over_under_the_job_as_it_is_now(
    ppo_job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its metrics hold every step once."""
    monkeypatch.setenv("FAIL_AT_CALL", "2")  # the held-out replies are one call, the first chunk of step 1 the next
    with pytest.raises(RuntimeError, match="reward service"):
        run(ppo_job("run", resume="auto"))
    monkeypatch.delenv("FAIL_AT_CALL")
    done = run(ppo_job("run", resume="auto", kl_coef=0.3, num_samples_logged=2))
    assert [row["step"] for row in rows_of(done)] == [0, 1, 2, 3] and rows_of(done)[-1]["kl/coef"] == 0.3
    assert open_run(done.run_dir).config()["kl_coef"] == 0.3
    assert len(read_metrics(Path(done.run_dir) / "samples.jsonl")) == 2 * 3
