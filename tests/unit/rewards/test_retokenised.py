"""Replies put into the tokens of another tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.batches import Rollout
from rlhf_ray.data.prompts import Prompt
from rlhf_ray.data.records import Row
from rlhf_ray.data.templates import load_template
from rlhf_ray.models.backbone import Backbone, load_in_float32
from rlhf_ray.models.batching import Batching
from rlhf_ray.rewards.protocol import RewardInputs, Texts
from rlhf_ray.rewards.retokenised import Reader, RetokenisedReward, _fit


def load(folder: Path) -> Backbone:
    return load_in_float32(str(folder), "sdpa")


@pytest.fixture
def backbone(tiny_llama: Callable[..., Path]) -> Backbone:
    return load(tiny_llama())


def row(text: str) -> Row:
    return Row("here:1", Prompt(text, ""), columns={})


def test_finished_replies_end_as_in_training(backbone: Backbone) -> None:
    """F10: the reward model must see which replies are complete."""
    reader = Reader(backbone, load_template("none"), True)
    prompts, responses = reader.encode([row("ab"), row("ab")], ["xy", "xy"], [True, False])
    bos, eos = backbone.tokenizer.bos_token_id, backbone.tokenizer.eos_token_id
    assert prompts[0][0] == bos and prompts[0] == prompts[1]
    assert responses[0] == [*responses[1], eos]
    assert Reader(backbone, load_template("none"), False).encode([row("ab")], ["xy"], [True])[1] == [responses[1]]


def test_finished_replies_end_with_the_turn_of_the_reward_model_s_own_template(chat_llama: Callable[..., Path]) -> None:
    base = load(chat_llama())
    chat = load_template("chat", base.tokenizer)
    responses = Reader(base, chat, True).encode([row("ab"), row("ab")], ["xy", "xy"], [True, False])[1]
    assert responses[0] == [*responses[1], 261]
    assert Reader(base, chat, True, 2).encode([row("ab")], ["xy"])[1] == [[*responses[1], 2]], "as its run recorded"


def test_what_does_not_fit_loses_the_start_of_its_prompt() -> None:
    assert _fit([1, 2, 3], [4, 5], 10) == ([1, 2, 3], [4, 5])
    assert _fit([1, 2, 3], [4, 5], 3) == ([3], [4, 5])
    assert _fit([1, 2, 3], [4, 5, 6, 7], 3) == ([5], [6, 7])
    assert _fit([1, 2], [], 10) == ([1], [2]), "a reply without tokens is read after its prompt"


def inputs(rows: list[Row], texts: Texts, finished: list[bool]) -> RewardInputs:
    """Replies that are read as text: their ids do not matter."""
    count = len(rows)
    rollout = Rollout(
        tokens=torch.zeros(count, 2, dtype=torch.int64),
        prompt_mask=torch.ones(count, 1, dtype=torch.bool),
        response_mask=torch.ones(count, 1, dtype=torch.bool),
        sample_logprobs=torch.zeros(count, 1),
        finished=torch.tensor(finished),
        row_id=torch.arange(count),
        adapter_version=0,
        adapter_sha256="",
    )
    return RewardInputs(rollout, rows, lambda *_: texts)


def test_padding_and_batching_change_no_score(backbone: Backbone) -> None:
    seen: list[int] = []

    def sums(kind: str, role: str, seq: Any) -> torch.Tensor:
        seen.append(len(seq.tokens))
        return (seq.tokens * seq.attention_mask).sum(dim=1).float()

    rows = [row("a"), row("abc"), row("ab")]
    texts = Texts([r.prompt.text for r in rows], ["xx", "y", ""], [[], [], []], [{}, {}, {}])

    def score(per_forward: int) -> torch.Tensor:
        reader = Reader(backbone, load_template("none"), True)
        reward = RetokenisedReward("r", 1.0, sums, "r", reader, backbone, Batching(per_forward))
        return reward.score(inputs(rows, texts, [True, False, False]))

    assert torch.equal(score(1), score(3))
    assert seen == [1, 1, 1, 3]


def test_drift_counts_replies_whose_text_is_other_tokens(backbone: Backbone) -> None:
    tokenizer = backbone.tokenizer
    reward = RetokenisedReward(
        "r", 1.0, print, "r", Reader(backbone, load_template("none"), True), backbone, Batching(8)
    )
    clean = tokenizer.encode("hello", add_special_tokens=False)
    broken = [tokenizer.encode("é", add_special_tokens=False)[0]]  # half of a character
    ids = [[*clean, tokenizer.eos_token_id], broken]
    texts = Texts(["", ""], [str(tokenizer.decode(i, skip_special_tokens=True)) for i in ids], ids, [{}, {}])
    assert reward.drift(inputs([row("a"), row("b")], texts, [True, False])).tolist() == [0.0, 1.0]


def test_clean_text_takes_the_same_ids_to_the_reward_model_either_way(backbone: Backbone) -> None:
    """F10: ids path == text path. What was sampled, decoded and encoded again by the reward model is what was sampled."""
    tokenizer, template = backbone.tokenizer, load_template("alpaca_short")
    rows, said = [row("Name a bird."), row("Zwölf?")], ["Wren.", "é — ja"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    sampled = [[*tokenizer.encode(text, add_special_tokens=False), eos] for text in said]
    texts = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in sampled]
    prompts, responses = Reader(backbone, template, True).encode(rows, texts, [True, True])
    assert responses == sampled
    rendered = [template.render(r.prompt) for r in rows]
    assert prompts == [[bos, *tokenizer.encode(text, add_special_tokens=False)] for text in rendered]
