"""PPO is not begun on a reward model that is not shown to be better than chance."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config import PPOConfig
from rlhf_ray.errors import ConfigError
from rlhf_ray.ppo.reward_gate import check_reward_models
from rlhf_ray.storage.run import Run
from rlhf_ray.storage.run_folder import atomic_write_json, create_run

WEAK = {"accuracy": 0.55, "low": 0.44, "high": 0.65, "pairs": 80.0}
GOOD = {"accuracy": 0.75, "low": 0.64, "high": 0.83, "pairs": 80.0}


@pytest.fixture
def reward_run(tmp_path: Path) -> Callable[..., str]:
    """A finished reward run that says this of itself; only what the gate reads."""

    def make(name: str, held_out: dict[str, float] | None, metrics: dict[str, float] | None = None) -> str:
        folder = create_run(tmp_path / name, "reward", {"output_dir": name}, "never")
        (folder.path / "adapter").mkdir()
        (folder.path / "adapter/adapter_config.json").write_text("{}")
        folder.update_manifest(reward={"add_eos_token": True, "held_out": held_out})
        Run("reward", "done", str(folder.path), 1, 1.0, 0, metrics or {}).save()
        return str(folder.path)

    return make


def job(*rewards: dict[str, Any], **values: Any) -> PPOConfig:
    return PPOConfig(
        output_dir="o",
        model_name_or_path="m",
        data={"train": "x"},  # type: ignore[arg-type]
        rewards=rewards,  # type: ignore[arg-type]
        **values,
    )


def test_a_reward_model_no_better_than_chance_is_refused_with_the_numbers(reward_run: Callable[..., str]) -> None:
    """All of them at once, members of ensembles by their own names; a good one is not told of."""
    weak, good = reward_run("weak", WEAK), reward_run("good", GOOD)
    rewards = {"name": "one", "run": weak}, {"name": "all", "ensemble": [good, weak]}
    with pytest.raises(ConfigError) as caught:
        check_reward_models(job(*rewards))
    assert [p.where for p in caught.value.problems] == ["rewards.one", "rewards.all/2"]
    assert str(caught.value.problems[0]) == (
        f"rewards.one: {weak} is not shown to be better than chance on held-out pairs; expected an interval above 50%;"
        " got accuracy 55.0% of 80 pairs, 95% interval 44.0% to 65.0%; fix: train it on more pairs, for longer, or with more of"
        " them held out; or set allow_chance_rewards: true"
    )
    assert check_reward_models(job({"run": good})) == []


def test_it_can_be_forced_and_what_only_watches_is_let_through_with_a_warning(reward_run: Callable[..., str]) -> None:
    weak, good = reward_run("weak", WEAK), reward_run("good", GOOD)
    (forced,) = check_reward_models(job({"run": weak}, allow_chance_rewards=True))
    assert forced.startswith("reward: ") and "95% interval 44.0% to 65.0%" in forced
    (watching,) = check_reward_models(job({"run": good}, {"name": "judge", "run": weak, "weight": 0.0}))
    assert watching.startswith("judge: ")


def test_a_run_that_held_nothing_out_is_told_of_and_one_of_an_older_version_is_read(
    reward_run: Callable[..., str],
) -> None:
    (warning,) = check_reward_models(job({"run": reward_run("blind", None)}))
    assert "held out no pairs" in warning
    figures = {"eval/accuracy": 0.5, "eval/accuracy_low": 0.4, "eval/accuracy_high": 0.6, "eval/rows": 90.0}
    with pytest.raises(ConfigError, match=r"accuracy 50.0% of 90 pairs"):
        check_reward_models(job({"run": reward_run("old", None, figures)}))


def test_a_function_and_a_checkpoint_of_unknown_origin_are_not_asked(tmp_path: Path) -> None:
    (tmp_path / "judge").mkdir()
    atomic_write_json(tmp_path / "judge/config.json", {})
    rewards = {"name": "rule", "function": "f.py:f"}, {"name": "judge", "model": str(tmp_path / "judge")}
    assert check_reward_models(job(*rewards)) == []


def test_a_merged_reward_run_carries_its_accuracy(tmp_path: Path) -> None:
    folder = tmp_path / "merged"
    folder.mkdir()
    atomic_write_json(folder / "config.json", {})
    atomic_write_json(folder / "rlhf_ray.json", {"reward": {"add_eos_token": True, "held_out": WEAK}})
    with pytest.raises(ConfigError, match=r"rewards.judge: .*merged is not shown"):
        check_reward_models(job({"name": "judge", "model": str(folder)}))
