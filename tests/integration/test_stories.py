"""Real input: a pretrained 260 k-parameter Llama on real prompts, a short form of the benchmarks of the same names."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rlhf_ray.console import NullConsole
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
