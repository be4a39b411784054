"""Replies of a model that is served elsewhere, by a scripted server on loopback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from rlhf_ray.config import EndpointConfig, EvaluateConfig
from rlhf_ray.data.collate import TokenisedPrompt
from rlhf_ray.data.encode import encode_texts
from rlhf_ray.data.prompts import Prompt
from rlhf_ray.data.records import Row
from rlhf_ray.stages.other_policies import ServedPolicy
from rlhf_ray.storage.answers import Answers
from tests.servers import serving


def test_half_a_character_does_not_break_the_evaluation(tmp_path: Path, tiny_llama: Callable[..., Path]) -> None:
    """A server that cuts a reply in the middle of an emoji; also where that was kept by an earlier start."""
    said = {"choices": [{"message": {"content": "half \ud83d, whole \U0001f600"}, "finish_reason": "length"}]}
    prompts = [TokenisedPrompt([1], Row("p.jsonl:1", Prompt("Say it.")))]
    config = EvaluateConfig(
        output_dir="runs/e",
        model_name_or_path="m",
        data={"train": "p.jsonl"},
        policies=[{"name": "base", "policy": "base"}],
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama())
    with serving(lambda body: said, path="/v1/chat/completions") as server:
        endpoint = EndpointConfig(base_url=server.url.removesuffix("/chat/completions"), model="far")
        for _ in range(2):
            replies = ServedPolicy("far", endpoint, config, Answers(tmp_path)).answer(prompts, "e")
            assert replies.texts == ["half \ufffd, whole \U0001f600"] and replies.finished == [False]
            assert encode_texts(tokenizer, replies.texts)[0]
        assert len(server.asked) == 1, "the second time from what was kept"


def test_the_tokenizer_would_refuse_it(tiny_llama: Callable[..., Path]) -> None:
    with pytest.raises(TypeError):
        encode_texts(AutoTokenizer.from_pretrained(tiny_llama()), ["half \ud83d"])
