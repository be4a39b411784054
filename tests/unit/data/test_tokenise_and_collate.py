"""Token ids, labels, lengths and padding. The byte tokenizer makes one token of a byte, so every number here can be counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.data.collate import (
    IGNORE_INDEX,
    TokenisedRow,
    collate_pairs,
    collate_sft,
    pad_left,
    pad_right,
    prompt_batch,
    tokenise_pairs,
    tokenise_prompts,
    tokenise_sft,
)
from rlhf_ray.data.prompts import Prompt
from rlhf_ray.data.records import Row
from rlhf_ray.data.templates import load_template
from rlhf_ray.errors import ConfigError, DataError

BOS, EOS, PAD = 1, 2, 0
NONE = load_template("none")
SFT: dict[str, Any] = {"max_length": 8, "too_long": "drop", "train_on_inputs": False}
SFT |= {"train_on_turns": "all", "add_eos_token": True}
PAIRS: dict[str, Any] = {"max_length": 8, "too_long": "drop", "add_eos_token": True}


def _sft(prompt: str, completion: str, line: int = 1) -> Row:
    return Row(f"x:{line}", Prompt(prompt), completion=completion)


def _pair(prompt: str, chosen: str, rejected: str, line: int = 1) -> Row:
    return Row(f"x:{line}", Prompt(prompt), chosen=chosen, rejected=rejected)


@pytest.fixture(scope="module")
def letters(tokenizer: Any) -> Callable[[str], list[int]]:
    vocabulary = tokenizer.get_vocab()
    return lambda text: [vocabulary[letter] for letter in text]


def test_rows_that_spell_special_tokens_are_counted_or_parsed(tokenizer: Any) -> None:
    rows = [Row("x:1", Prompt(), completion="a</s>"), _sft("a", "b", 2), _sft("<s>a", "b", 3)]
    found = tokenise_sft(rows, NONE, tokenizer, **{**SFT, "max_length": 64})
    assert [len(e.input_ids) for e in found.examples] == [1 + 5 + 1, 4, 7]
    told = (
        "2 spell special tokens: read as text; data.special_tokens: parse reads them as the tokens (first x:1, '</s>')"
    )
    assert found.warnings == [told]
    parsed = tokenise_sft(rows, NONE, tokenizer, special_tokens="parse", **SFT)
    assert [len(e.input_ids) for e in parsed.examples] == [3, 4, 4]  # one </s>, one <s>
    assert parsed.examples[0].labels == [IGNORE_INDEX, *parsed.examples[0].input_ids[1:]]
    assert not parsed.warnings
    (pair,) = tokenise_pairs([_pair("a", "b</s>", "c")], NONE, tokenizer, special_tokens="parse", **PAIRS).examples
    assert (len(pair.chosen_ids), len(pair.rejected_ids)) == (4, 4)


def test_the_loss_is_on_the_reply_and_its_eos(tokenizer: Any, letters: Callable[[str], list[int]]) -> None:
    (example,) = tokenise_sft([_sft("ab", "cd")], NONE, tokenizer, **SFT).examples
    assert example == TokenisedRow([BOS, *letters("abcd"), EOS], [IGNORE_INDEX] * 3 + [*letters("cd"), EOS], "x:1")
    (whole,) = tokenise_sft([_sft("ab", "cd")], NONE, tokenizer, **{**SFT, "train_on_inputs": True}).examples
    assert whole.labels == whole.input_ids == example.input_ids
    (bare,) = tokenise_sft([_sft("ab", "cd")], NONE, tokenizer, **{**SFT, "add_eos_token": False}).examples
    assert bare.input_ids == example.input_ids[:-1]


def test_a_bare_text_is_learnt_whole_whatever_the_template(tokenizer: Any, letters: Callable[[str], list[int]]) -> None:
    row = Row("x:1", Prompt(), completion="abc")
    for template in (NONE, load_template("alpaca")):
        (example,) = tokenise_sft([row], template, tokenizer, **SFT).examples
        assert example.input_ids == [BOS, *letters("abc"), EOS]
        assert example.labels == [IGNORE_INDEX, *letters("abc"), EOS]


def test_prompt_and_reply_are_encoded_apart() -> None:
    """Generation chooses the reply's first token after the prompt's last one, so training must not merge the two."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(vocab={"</s>": 0, "a": 1, "b": 2, "ab": 3}, merges=[("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert tokenizer("ab").input_ids == [3]
    (example,) = tokenise_sft([_sft("a", "b")], NONE, tokenizer, **SFT).examples
    assert example.input_ids == [1, 2, 0]
    (pair,) = tokenise_pairs([_pair("a", "b", "bb")], NONE, tokenizer, **PAIRS).examples
    assert (pair.chosen_ids, pair.rejected_ids, pair.prompt_length) == ([1, 2, 0], [1, 2, 2, 0], 1)


def test_rows_over_the_limit(tokenizer: Any, letters: Callable[[str], list[int]]) -> None:
    rows = [_sft("ab", "cdef", 1), _sft("ab", "cdefg", 2), _sft("ab", "cdefgh", 3)]  # 8, 9 and 10 tokens
    dropped = tokenise_sft(rows, NONE, tokenizer, **SFT)
    assert [e.where for e in dropped.examples] == ["x:1"]
    assert str(dropped.dropped) == "2 dropped: over max_length 8 (first x:2, 9 tokens)"
    cut = tokenise_sft(rows, NONE, tokenizer, **{**SFT, "too_long": "truncate"})
    assert [e.input_ids for e in cut.examples[1:]] == [[BOS, *letters("abcdefg")]] * 2
    assert all(e.input_ids[-1] != EOS for e in cut.examples[1:])  # F30: a cut reply does not end
    assert str(cut.truncated) == "2 truncated: over max_length 8 (first x:2, 9 tokens)"
    with pytest.raises(DataError) as caught:
        tokenise_sft(rows, NONE, tokenizer, **{**SFT, "too_long": "stop"})
    assert [str(p) for p in caught.value.problems] == [
        "x:2: 9 tokens > max_length 8; fix: data.too_long: drop or truncate, or a longer max_length",
        "x:3: 10 tokens > max_length 8; fix: data.too_long: drop or truncate, or a longer max_length",
    ]


def test_rows_without_a_token_to_learn_are_dropped(tokenizer: Any, load_byte_tokenizer: Callable[..., Any]) -> None:
    """Seeds F30: labels that are all masked make the mean loss NaN."""
    options = {**SFT, "too_long": "truncate"}
    found = tokenise_sft([_sft("abcdefgh", "x", 1), _sft("a", "x", 2)], NONE, tokenizer, **options)
    assert [e.where for e in found.examples] == ["x:2"]
    assert found.dropped.counts() == {"reply empty after truncation": 1}
    assert not found.truncated.total
    bare = load_byte_tokenizer(bos=False)  # a text of one token has nothing that is predicted
    alone = tokenise_sft([Row("x:1", Prompt(), completion="a")], NONE, bare, **{**SFT, "add_eos_token": False})
    assert (alone.examples, alone.dropped.counts()) == ([], {"no token to learn": 1})


def test_pairs_share_their_prompt_tokens_and_end_in_eos(tokenizer: Any, letters: Callable[[str], list[int]]) -> None:
    """Seeds F10: the reward model sees eos, so that finished and cut replies differ."""
    (pair,) = tokenise_pairs([_pair("ab", "cd", "e")], NONE, tokenizer, **PAIRS).examples
    assert pair.chosen_ids == [BOS, *letters("abcd"), EOS]
    assert pair.rejected_ids == [BOS, *letters("abe"), EOS]
    assert pair.prompt_length == 3
    (empty,) = tokenise_pairs([_pair("ab", "cd", "")], NONE, tokenizer, **PAIRS).examples
    assert empty.rejected_ids == [BOS, *letters("ab"), EOS]
    (bare,) = tokenise_pairs([_pair("ab", "cd", "e")], NONE, tokenizer, **{**PAIRS, "add_eos_token": False}).examples
    assert bare.chosen_ids == [BOS, *letters("abcd")]


def test_long_pairs(tokenizer: Any, letters: Callable[[str], list[int]]) -> None:
    rows = [
        _pair("ab", "cdefg", "x", 1),  # 9 and 5 tokens
        _pair("ab", "cdefgh", "cdefgi", 2),  # equal once cut
        _pair("abcdefgh", "x", "y", 3),  # the prompt alone is 9
        _pair("ab", "c", "d", 4),
    ]
    dropped = tokenise_pairs(rows, NONE, tokenizer, **PAIRS)
    assert ([e.where for e in dropped.examples], str(dropped.dropped)) == (
        ["x:4"],
        "3 dropped: over max_length 8 (first x:1, 9 tokens)",
    )
    cut = tokenise_pairs(rows, NONE, tokenizer, **{**PAIRS, "too_long": "truncate"})
    assert [e.where for e in cut.examples] == ["x:1", "x:4"]
    assert cut.examples[0].chosen_ids == [BOS, *letters("abcdefg")]
    assert cut.examples[0].rejected_ids == [BOS, *letters("abx"), EOS]
    assert cut.dropped.counts() == {"identical after truncation": 1, "reply empty after truncation": 1}
    assert str(cut.truncated) == "1 truncated: over max_length 8 (first x:1, 9 tokens)"
    with pytest.raises(DataError) as caught:
        tokenise_pairs(rows, NONE, tokenizer, **{**PAIRS, "too_long": "stop"})
    assert [p.where for p in caught.value.problems] == ["x:1", "x:2", "x:3"]


def test_replies_that_encode_to_nothing_or_to_the_same_are_dropped(word_tokenizer: Any) -> None:
    options = {**PAIRS, "add_eos_token": False}
    rows = [_pair("name", "bird", "", 1), _pair("name", "owl", "emu", 2), _pair("name", "bird", "owl", 3)]
    found = tokenise_pairs(rows, NONE, word_tokenizer, **options)
    assert [e.where for e in found.examples] == ["x:3"]
    assert found.dropped.counts() == {"reply without a token": 1, "identical token ids": 1}


def test_long_prompts_are_counted_alike_in_training_and_evaluation(
    tokenizer: Any, letters: Callable[[str], list[int]]
) -> None:
    """Seeds F8: a hand-made set; 4 of 7 prompts do not fit into 12 - 4 tokens, <s> included."""
    rows = [Row(f"x:{n}", Prompt("abcdefghijklmnop"[:n])) for n in (1, 6, 7, 8, 9, 12, 16)]
    options: dict[str, Any] = {"max_length": 12, "response_length": 4}
    found = tokenise_prompts(rows, NONE, tokenizer, too_long="drop", **options)
    assert [len(e.ids) for e in found.examples] == [2, 7, 8]
    assert str(found.dropped) == "4 dropped: over 12-4 (first x:8, 9 tokens)"
    cut = tokenise_prompts(rows, NONE, tokenizer, too_long="truncate", **options)
    assert cut.examples[3].ids == [BOS, *letters("bcdefgh")]  # cut on the left, behind <s>
    assert cut.examples[6].ids == [BOS, *letters("jklmnop")]
    assert all(e.row is row for e, row in zip(cut.examples, rows, strict=True))
    with pytest.raises(ConfigError, match="max_length: no room for a prompt: 4-4"):
        tokenise_prompts(rows, NONE, tokenizer, too_long="drop", max_length=4, response_length=4)


def test_a_prompt_is_too_long_from_max_prompt_length_on(tokenizer: Any) -> None:
    """If that is less than what max_length leaves: 3 of 5 prompts are over 7 tokens, <s> included, and 2 over 12 - 4."""
    rows = [Row(f"x:{n}", Prompt("abcdefghijklmnop"[:n])) for n in (1, 6, 7, 8, 9)]
    for most, told in (
        (7, "3 dropped: over max_prompt_length 7 (first x:7, 8 tokens)"),
        (9, "2 dropped: over 12-4 (first x:8, 9 tokens)"),
    ):
        options: dict[str, Any] = {"max_length": 12, "response_length": 4, "max_prompt_length": most}
        assert str(tokenise_prompts(rows, NONE, tokenizer, too_long="drop", **options).dropped) == told
    with pytest.raises(DataError, match=r"8 tokens > max_prompt_length 7; fix: .*or a longer max_prompt_length"):
        tokenise_prompts(rows, NONE, tokenizer, too_long="stop", **{**options, "max_prompt_length": 7})


def test_no_eos_is_an_error_only_where_one_is_asked_for(load_byte_tokenizer: Callable[..., Any]) -> None:
    tokenizer = load_byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="add_eos_token: the tokenizer has no eos token"):
        tokenise_sft([_sft("a", "b")], NONE, tokenizer, **SFT)
    assert tokenise_sft([_sft("a", "b")], NONE, tokenizer, **{**SFT, "add_eos_token": False}).examples


def test_rows_and_pairs_end_with_the_chat_template_s_end_of_turn(load_byte_tokenizer: Callable[..., Any]) -> None:
    """What generation stops on has to be learnt: <|im_end|>, though the tokenizer's eos is another token, or none."""
    tokenizer = load_byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    for eos in ("</s>", None):
        tokenizer.eos_token = eos
        template = load_template("chat", tokenizer)
        (example,) = tokenise_sft([_sft("a", "b")], template, tokenizer, **{**SFT, "max_length": 64}).examples
        assert [label for label in example.labels if label != IGNORE_INDEX] == [tokenizer.get_vocab()["b"], end]
        (pair,) = tokenise_pairs([_pair("a", "b", "c")], template, tokenizer, **{**PAIRS, "max_length": 64}).examples
        assert (pair.chosen_ids[-1], pair.rejected_ids[-1]) == (end, end)


def test_padding_is_masked_and_never_a_label() -> None:
    """Seeds F12 and F24: pad may equal eos or a token of the text; only the mask says what is real."""
    examples = [
        TokenisedRow([BOS, 5, EOS], [IGNORE_INDEX, 5, EOS], "x:1"),
        TokenisedRow([BOS, 5, 6, 7, EOS], [5] * 5, "x:2"),
    ]
    for pad in (PAD, EOS, 5):
        batch = collate_sft(examples, pad)
        assert batch["input_ids"].tolist() == [[BOS, 5, EOS, pad, pad], [BOS, 5, 6, 7, EOS]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
        assert batch["labels"].tolist() == [[IGNORE_INDEX, 5, EOS, IGNORE_INDEX, IGNORE_INDEX], [5] * 5]
        assert all(t.dtype == torch.int64 for t in batch.values())


def test_the_loss_does_not_see_padding(tiny_llama: Callable[..., Any], tokenizer: Any) -> None:
    """Seeds F12: a row's loss is the same alone and beside a longer row, whatever the pad id."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama()).eval()
    rows = [_sft("ab", "cd", 1), _sft("a", "bcdefgh", 2)]
    examples = tokenise_sft(rows, NONE, tokenizer, **{**SFT, "max_length": 64}).examples

    def losses(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        flat = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), labels, ignore_index=IGNORE_INDEX, reduction="none"
        )
        return flat.sum(1)

    with torch.no_grad():
        alone = losses(collate_sft(examples[:1], PAD))[0]
        for pad in (PAD, EOS, 99):
            torch.testing.assert_close(losses(collate_sft(examples, pad))[0], alone, rtol=1e-5, atol=1e-5)


def test_pairs_are_stacked_chosen_first(tokenizer: Any) -> None:
    pairs = tokenise_pairs([_pair("a", "bc", "d"), _pair("a", "e", "fgh")], NONE, tokenizer, **PAIRS).examples
    batch = collate_pairs(pairs, PAD)
    assert batch["input_ids"].shape == (4, 6)
    assert batch["attention_mask"].sum(1).tolist() == [5, 4, 4, 6]
    for row, ids in zip(
        batch["input_ids"].tolist(), [pairs[0].chosen_ids, pairs[1].chosen_ids, pairs[0].rejected_ids], strict=False
    ):
        assert row[: len(ids)] == ids
        assert set(row[len(ids) :]) <= {PAD}


def test_prompt_batch_is_left_padded() -> None:
    batch = prompt_batch([[BOS, 5], [BOS, 6, 7]], [4, 9], torch.tensor([3, 2]), EOS)
    assert batch.prompt_ids.tolist() == [[EOS, BOS, 5], [BOS, 6, 7]]
    assert batch.prompt_mask.tolist() == [[False, True, True], [True, True, True]]
    assert (batch.row_id.tolist(), batch.max_new_tokens.tolist()) == ([4, 9], [3, 2])
    with pytest.raises(ValueError, match="the last column must be real"):
        prompt_batch([[], [BOS]], [0, 1], [1, 1], PAD)
    with pytest.raises(ValueError, match="row_id"):
        prompt_batch([[BOS]], [0, 1], [1], PAD)


@given(st.lists(st.lists(st.integers(0, 50), max_size=9), min_size=1, max_size=9), st.integers(0, 50))
def test_padding_keeps_every_row(rows: list[list[int]], value: int) -> None:
    for pad in (pad_left, pad_right):
        ids, real = pad(rows, value)
        assert [ids[i][real[i]].tolist() for i in range(len(rows))] == rows
        assert set(ids[~real].tolist()) <= {value}
    assert (pad_left(rows, value)[1].long().diff(dim=1) >= 0).all()
    assert (pad_right(rows, value)[1].long().diff(dim=1) <= 0).all()
