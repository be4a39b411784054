"""Rotary frequencies that transformers chooses by the longest row of a batch: models are read up to where they are a row's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from rlhf_ray.config import EvaluateConfig
from rlhf_ray.console import NullConsole
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.backbone import Backbone
from rlhf_ray.models.context import NO_LIMIT, context_length, rope_limit, rope_note, shortened_note
from rlhf_ray.runtime.session import process_session
from rlhf_ray.sampler.engine import DecodeRequest, Sampler
from rlhf_ray.stages.evaluation_models import load_evaluation_models
from rlhf_ray.stages.generate import generate

LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 16,
    "long_factor": [4.0] * 16,
    "original_max_position_embeddings": 16,
    "rope_theta": 10000.0,
    "factor": 4.0,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
YARN = {**DYNAMIC, "rope_type": "yarn", "original_max_position_embeddings": 16}


def config(**rope: Any) -> LlamaConfig:
    return LlamaConfig(max_position_embeddings=64, hidden_size=64, num_attention_heads=4, rope_parameters=rope)


def test_which_types_limit_the_context() -> None:
    assert rope_limit(config(**LONGROPE)) == (16, "longrope") and context_length(config(**LONGROPE)) == 16
    assert rope_limit(config(**DYNAMIC)) == (64, "dynamic") and context_length(config(**DYNAMIC)) == 64
    assert rope_limit(config(**{**LONGROPE, "long_factor": [1.0] * 16})) == (NO_LIMIT, "")
    assert rope_limit(config(**YARN)) == (NO_LIMIT, "") and context_length(config(**YARN)) == 64
    by_layer = config(rope_type="default")
    by_layer.rope_parameters = {"full_attention": DYNAMIC, "sliding_attention": {"rope_type": "default"}}
    assert rope_limit(by_layer) == (64, "dynamic")


def test_it_is_said_by_name() -> None:
    assert rope_note(config(**YARN)) == ""
    assert shortened_note(128, 16, config(**LONGROPE)) == (
        "max_length 128 is over the model's context (rope_type longrope: beyond 16 tokens positions depend on the longest row"
        " of a batch); 16 is used"
    )


def test_a_longer_neighbour_changes_nothing(
    load: Callable[..., Backbone], tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    """Rows of 4 + 12 and 16 tokens fit; one of 17, which would change the row beside it, is refused."""
    base = load(tiny_llama(rope_parameters=LONGROPE, max_position_embeddings=64))
    assert base.context_length == 16
    assert base.notes == ("16 of the model's 64 tokens of context are used" + rope_note(base.model.config),)
    short = DecodeRequest((5, 9, 33, 17), 0, 12, (), greedy=True)
    long = DecodeRequest(tuple(range(40, 55)), 0, 1, (), greedy=True)
    sampler = Sampler(base.model, 0, max_rows=2)
    beside, alone = sampler.run([short, long])[0], sampler.run([short])[0]
    assert beside.token_ids == alone.token_ids and beside.logprobs == pytest.approx(alone.logprobs, abs=1e-4)
    with torch.no_grad():  # why: the same four tokens, alone and beside a row of 17
        ids = torch.tensor([[5, 9, 33, 17, *range(60, 73)], list(range(40, 57))])
        difference = base.model(ids[:1, :4]).logits - base.model(ids).logits[:1, :4]
    assert difference.abs().max() > 1e-3
    with pytest.raises(ConfigError, match="at most 16 tokens"):
        sampler.run([short, DecodeRequest(tuple(range(40, 56)), 0, 1, (), greedy=True)])


def test_a_reply_beyond_it_is_refused_by_name(tiny_llama: Callable[..., Path]) -> None:
    base = str(tiny_llama(rope_parameters=LONGROPE, max_position_embeddings=64))
    with pytest.raises(ConfigError, match=r"below 16 .*rope_type longrope: beyond 16 tokens"):
        generate(policies=["base"], model=base, instruction="Name a bird.", max_new_tokens=20, template="none")


@pytest.mark.parametrize(("max_length", "is_told"), [(None, False), (200, False), (256, False), (257, True)])
def test_an_evaluation_says_what_it_uses_instead_of_max_length(
    tiny_llama: Callable[..., Path], max_length: int | None, is_told: bool
) -> None:
    """As SFT, reward models and PPO do: the context is 256."""
    job = EvaluateConfig(
        output_dir="run",
        model_name_or_path=str(tiny_llama()),
        data={"train": "d"},  # type: ignore[arg-type]
        template="none",
        policies=[{"name": "base", "policy": "base"}],  # type: ignore[arg-type]
        max_length=max_length,
    )
    models = load_evaluation_models(job, process_session(NullConsole(), 1), None)
    assert models.limit == (max_length if max_length == 200 else 256)
    assert models.warnings == (["max_length 257 is over the model's context; 256 is used"] if is_told else [])
