"""Rewards put on a job's models, compared with how the job ends its replies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from rlhf_ray.config import PPOConfig
from rlhf_ray.data.templates import load_template
from rlhf_ray.models.assembly import Assembly
from rlhf_ray.rewards.build import RewardBuilder


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
