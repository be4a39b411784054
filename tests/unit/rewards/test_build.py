"""Rewards put on a job's models, compared with how the job ends its replies."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlhf_ray.batches import Rollout
from rlhf_ray.config import PPOConfig, RewardSource
from rlhf_ray.data.templates import load_template
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.assembly import Assembly
from rlhf_ray.models.batching import Batching
from rlhf_ray.rewards.build import RewardBuilder
from rlhf_ray.rewards.protocol import Reward, RewardInputs
from rlhf_ray.rewards.sources import NormalisedReward
from rlhf_ray.storage.run_folder import open_run


def test_a_reward_model_that_was_trained_on_another_end_is_told(
    chat_llama: Callable[..., Path], tiny_run: Callable[..., Path], tmp_path: Path
) -> None:
    """`tiny_run` records the base's eos (</s>, 2), as runs did before turns ended with the chat template's <|im_end|> (261)."""
    run = tiny_run(tmp_path / "judge", chat_llama(), stage="reward", template="chat")
    values = {"output_dir": str(tmp_path / "ppo"), "model_name_or_path": str(chat_llama()), "template": "chat"}
    values |= {"data": {"train": "rows.jsonl"}, "rewards": [{"name": "judge", "run": str(run)}]}

    def warnings(stop_token_ids: tuple[int, ...] | None) -> list[str]:
        config = PPOConfig(**values, stop_token_ids=stop_token_ids)
        assembly = Assembly(config, torch.device("cpu"), 0, stop_token_ids)
        builder = RewardBuilder(assembly, load_template("chat", assembly.base.tokenizer), "chat")
        builder.add(config.rewards[0], "judge")
        return builder.warnings

    (told,) = warnings(None)
    assert "trained on replies that end with token 2, and scores sampled ones that end with token 261" in told
    assert warnings((2,)) == []


def test_rewards_are_normalised_by_the_held_out_scores_of_their_run(
    tiny_llama: Callable[..., Path], tiny_run: Callable[..., Path], tmp_path: Path
) -> None:
    """(score - mean) / std before the weight, wherever the run recorded them unless the job says no, and the header says what was
    used. A run that recorded none cannot be, and by default is not."""
    run = tiny_run(tmp_path / "judge", tiny_llama(), stage="reward", template="alpaca")
    values = {
        "output_dir": str(tmp_path / "ppo"),
        "model_name_or_path": str(tiny_llama()),
        "data": {"train": "rows.jsonl"},
    }

    def built(normalize: bool | None) -> tuple[RewardBuilder, list[Reward]]:
        source = {"name": "judge", "run": str(run), "weight": 0.5, "normalize": normalize}
        config = PPOConfig(**values, rewards=[source])
        assembly = Assembly(config, torch.device("cpu"), 0, None)
        builder = RewardBuilder(assembly, load_template("alpaca", assembly.base.tokenizer), "alpaca")
        builder.add(config.rewards[0], "judge")
        return builder, builder.build(lambda *_: torch.tensor([5.0, 1.0]), Batching(8), torch.device("cpu"))

    with pytest.raises(ConfigError, match=r"rewards.judge.normalize: the reward run recorded no held-out scores"):
        built(True)
    builder, (judge,) = built(None)
    assert not isinstance(judge, NormalisedReward) and not any("normalised to" in line for line in builder.lines)
    manifest = open_run(run).manifest()
    manifest["reward"]["held_out_scores"] = {"mean": 3.0, "std": 2.0, "replies": 10.0}
    (run / "manifest.json").write_text(json.dumps(manifest))
    mask = torch.ones(2, 1, dtype=torch.bool)
    zero = torch.zeros(2, 1)
    rollout = Rollout(
        torch.ones(2, 2, dtype=torch.int64), mask, mask, zero, torch.tensor([True, True]), torch.arange(2)
    )
    for normalize, expected, told in (
        (False, [5.0, 1.0], "weight 0.5"),
        (True, [1.0, -1.0], "normalised to 0 and 1, weight"),
        (None, [1.0, -1.0], "normalised to 0 and 1, weight"),
    ):
        builder, (judge,) = built(normalize)
        assert judge.score(RewardInputs(rollout, [], lambda *_: None)).tolist() == expected  # type: ignore[arg-type,return-value]
        assert any("held-out scores 3, standard deviation 2" in line and told in line for line in builder.lines)


@pytest.mark.parametrize("name", ["policy", "reference", "synced_reference", "value"])
def test_a_reward_model_is_not_called_like_another_model_of_ppo(name: str) -> None:
    """It would take that one's place, and did until the first forward pass failed."""
    with pytest.raises(ValueError, match=f"name: {name} is another model of PPO"):
        RewardSource(name=name, model="judge")
    assert RewardSource(name=name, function="f.py:score").name == name


def test_only_a_reward_run_can_be_normalised() -> None:
    with pytest.raises(ValueError, match="normalize: needs a reward run"):
        RewardSource(function="f.py:score", normalize=True)
