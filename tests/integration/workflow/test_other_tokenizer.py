"""A reward model that has a tokenizer of its own: replies reach it as text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from rlhf_ray.cli import main
from rlhf_ray.metrics import read_metrics

pytestmark = pytest.mark.integration


@pytest.fixture
def foreign(jobs: dict[str, str], run_command: Callable[..., None], tiny_llama: Callable[..., Path]) -> str:
    """A merged reward model whose tokenizer sets no bos, trained with another template."""
    other = str(tiny_llama(context=128, bos=False, seed=5))
    run_command(
        "reward", jobs["reward"], f"model_name_or_path={other}", "sft=null", "template=none", "add_eos_token=false"
    )
    run_command("merge", "runs/reward")
    return "runs/reward-adapter-merged"


def rewards_of(job: str, model: str) -> str:
    """The job with `model` as its only reward."""
    fields = yaml.safe_load(Path(job).read_text())
    fields["rewards"] = [{"name": "helpful", "model": model}]
    fields.pop("sft")
    Path(job).write_text(yaml.safe_dump({**fields, "max_steps": 1}))
    return job


def test_replies_are_scored_as_text(
    jobs: dict[str, str], run_command: Callable[..., None], foreign: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """PPO's held-out rewards are those that `score` gives the same texts; the value model starts from the policy."""
    run_command("ppo", rewards_of(jobs["ppo"], foreign), "num_samples_logged=16", "lora.r=4")
    said = capfd.readouterr().err
    assert "helpful has its own tokenizer: replies are decoded, put in template none" in said
    assert "value      copy of the adapter of policy" in said
    step = read_metrics(Path("runs/ppo/metrics.jsonl"))[1]
    assert 0.0 < step["response/retokenised_drift"] <= 1.0, "bytes that are no text do not survive decoding"
    samples = [json.loads(line) for line in Path("runs/ppo/samples.jsonl").read_text().splitlines()]
    asked = {row["instruction"]: row for row in map(json.loads, Path("prompts.jsonl").read_text().splitlines())}
    shown = [(next(q for q in asked if q in s["prompt"]), s) for s in samples]
    rows = [{"instruction": q, "input": "", "output": s["reply"]} for q, s in shown]
    Path("said.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_command("score", "--model", foreign, "--file", "said.jsonl", "--out", "scored.jsonl")
    scored = [json.loads(line) for line in Path("scored.jsonl").read_text().splitlines()]
    expected = {(row["completion"]): row["reward"] for row in scored}
    for _, sample in shown:
        assert sample["reward"] == pytest.approx(expected[sample["reply"]], abs=1e-4)


def test_a_critic_cannot_start_from_it(jobs: dict[str, str], foreign: str, capfd: pytest.CaptureFixture[str]) -> None:
    code = main(["ppo", rewards_of(jobs["ppo"], foreign), "value.init_from=reward:helpful"])
    assert code == 2
    assert "value.init_from: reward 'helpful' has another tokenizer than the policy" in capfd.readouterr().err


def test_a_template_for_a_reward_on_the_policys_own_tokens_is_refused(
    jobs: dict[str, str], run_command: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    run_command("sft", jobs["sft"])
    run_command("reward", jobs["reward"])
    rewards = 'rewards=[{"name": "helpful", "run": "runs/reward", "template": "alpaca"}]'
    assert main(["ppo", jobs["ppo"], rewards]) == 5
    assert "rewards.helpful.template: is set" in capfd.readouterr().err
