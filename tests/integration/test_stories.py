"""Real input: a pretrained 260 k-parameter Llama on real prompts, a short form of the benchmarks of the same names."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rlhf_ray.console import NullConsole
from rlhf_ray.metrics import read_metrics
from rlhf_ray.stages.start import ppo, reward, sft

pytestmark = [pytest.mark.integration, pytest.mark.data, pytest.mark.slow]
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def benchmark(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/<name>.py as a module; it imports its neighbours by their bare names."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_ppo_makes_stories_happier(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four steps of the VADER benchmark: at least four standard errors up on the same held-out prompts, near the reference."""
    job = benchmark("stories_sentiment", monkeypatch).job(tmp_path / "run", data_dir, seed=0, steps=4, threads=2)
    found = ppo(job, NullConsole()).metrics
    assert found["eval/reward"] > found["eval/reward_start"] + 4 * found["eval/reward_se"]
    assert 0.0 < found["eval/kl_k3_per_response"] < 5.0


@pytest.mark.long
def test_the_whole_chain_raises_the_true_reward(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SFT on stories, reward model from pairs, PPO on what it learnt: VADER, which PPO never sees, goes up."""
    first, second, third = benchmark("stories_chain", monkeypatch).jobs(tmp_path, data_dir, 0, 2)
    quiet = NullConsole()
    sft(_changed(first, max_steps=6), quiet)
    judged = reward(_changed(second, num_train_epochs=2), quiet).metrics
    assert judged["eval/accuracy_low"] > 0.5, "better than a coin, by the lower end of its interval"
    found = ppo(_changed(third, max_steps=5, eval_steps=5), quiet).metrics
    assert found["eval/reward/learned"] > found["eval/reward/learned_start"]
    assert found["eval/reward/vader"] > found["eval/reward/vader_start"]


def _changed(config: Any, **fields: Any) -> Any:
    return type(config)(**{**config.model_dump(exclude_unset=True), **fields})


UNBOUNDED = """
import re
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

LEXICON = SentimentIntensityAnalyzer()


def unbounded(prompts, completions, **_):
    '''The sum of what VADER's lexicon says of each word: the more happy words, the better, without end.'''
    return [sum(LEXICON.lexicon.get(word, 0.0) for word in re.findall("[a-z]+", text.lower())) for text in completions]


def true(prompts, completions, **_):
    '''What is wanted: happy stories. The compound score, times the share of a reply's words that it has not said before.'''
    found = []
    for text in completions:
        words = re.findall("[a-z]+", text.lower())
        found.append(LEXICON.polarity_scores(text)["compound"] * len(set(words)) / max(len(words), 1))
    return found
"""


@pytest.mark.long
def test_the_alarm_goes_off_before_the_true_reward_has_fallen_by_a_standard_deviation(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: an unbounded reward at a learning rate of 1e-3 ends in one happy word over and over.

    Measured: the true reward rises from 0.30 to 0.71 in step 8, and in step 24 is 0.33, one standard deviation (0.38) below; the
    alarm goes off in step 12, at 0.67, and the best step is 8."""
    (tmp_path / "rules.py").write_text(UNBOUNDED)
    job = benchmark("stories_sentiment", monkeypatch).job(tmp_path / "run", data_dir, seed=0, steps=26, threads=2)
    rules = [
        {"name": "happy_words", "function": f"{tmp_path}/rules.py:unbounded"},
        {"name": "true", "function": f"{tmp_path}/rules.py:true", "weight": 0.0},
    ]
    data = {**job.data.model_dump(exclude_unset=True), "eval_max_rows": 64}
    job = _changed(job, rewards=rules, watch="true", eval_steps=2, kl_coef=0.0, data=data)
    run = ppo(job, NullConsole())
    assert run.metrics["eval/reward_start"] < run.metrics["eval/reward"], "what is maximised has risen all the while"
    rows = read_metrics(Path(run.run_dir) / "metrics.jsonl")
    measured = {row["step"]: row["eval/reward/true"] for row in rows if "eval/reward/true" in row}
    deviation = rows[0]["eval/reward_se/true"] * rows[0]["eval/rows"] ** 0.5
    alarm = min(row["step"] for row in rows if any(name.startswith("alarm/") for name in row))
    best = max(measured, key=lambda step: measured[step])
    fallen = [step for step, value in measured.items() if step > best and value < measured[best] - deviation]
    assert fallen, "the control collapses, or it controls nothing"
    assert best < alarm < min(fallen)
    assert run.metrics["best/step"] == best
