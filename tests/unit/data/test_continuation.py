"""Where a prompt's text ends and its continuation begins, for tokenizers that set a space before every text and take it away."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_ray.data.continuation import decode_continuation, decoder, texts_after_prompts
from rlhf_ray.data.prompts import Prompt
from rlhf_ray.data.records import Row
from rlhf_ray.data.templates import load_template
from rlhf_ray.data.tokenise import tokenise_pairs, tokenise_sft


@pytest.fixture(scope="module")
def sentencepiece() -> Any:
    """As Llama 2's: "a b" is \u2581a \u2581b, and " a b" has one \u2581 more."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "\u2581", "a", "b", "\u2581a", "\u2581b", ":"]
    vocabulary = {word: i for i, word in enumerate(words)}
    made = Tokenizer(models.BPE(vocabulary, [("\u2581", "a"), ("\u2581", "b")], unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_prompt_and_reply_join_up(sentencepiece: Any) -> None:
    """Issue 16, inputs 13: 'Once upon' + 'a time' lost the space between them."""
    ids = sentencepiece("a b a", add_special_tokens=False).input_ids
    assert ids == [6, 7, 6]
    for cut in (1, 2):
        prompt = sentencepiece.decode(ids[:cut])
        assert prompt + decode_continuation(sentencepiece, ids[:cut], ids[cut:]) == "a b a"
    assert decode_continuation(sentencepiece, ids[:1], [5, 2]) == "b"  # within a word; without the end token
    assert decode_continuation(sentencepiece, [], ids) == "a b a"
    assert decoder(sentencepiece, load_template("none"))([6], [7]) == " b"
    assert decoder(sentencepiece, load_template("alpaca"))([6], [7]) == "b"  # which answers, and does not go on


def test_a_reply_has_one_space_before_it_whether_the_data_write_it_or_not(sentencepiece: Any, tokenizer: Any) -> None:
    """completion: "b" and " b" are the tokens that generation would sample; byte-level tokenizers keep what is there."""
    none = load_template("none")
    options: dict[str, Any] = {"max_length": 64, "too_long": "stop", "add_eos_token": False}
    rows = [
        Row(f"x:{i}", Prompt("a:"), completion=text, chosen=text, rejected="a") for i, text in enumerate(("b", " b"))
    ]
    learnt = tokenise_sft(rows, none, sentencepiece, train_on_inputs=False, train_on_turns="all", **options)
    assert [e.input_ids for e in learnt.examples] == [[6, 8, 7]] * 2
    pairs = tokenise_pairs(rows, none, sentencepiece, **options)
    assert [e.chosen_ids for e in pairs.examples] == [[6, 8, 7]] * 2
    bare = Row("x:1", Prompt(), completion=" b")
    (text,) = tokenise_sft([bare], none, sentencepiece, train_on_inputs=True, train_on_turns="all", **options).examples
    assert text.input_ids == [3, 7]  # learnt as it is
    assert texts_after_prompts(tokenizer, ["b", " b"]) == ["b", " b"]
