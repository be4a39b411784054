"""Responses as text while they are written: the parts make up the text, characters are whole, stop strings are cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.models.tokenizer import load_tokenizer
from rlhf_ray.serve.response_text import ResponseText, special_stop_ids

WORDS = ["naïve", " 東京", "🙂", "\nHuman:", " a", "b", "é", "Hum", "an:", "\n"]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Callable[..., Path]) -> Any:
    return load_tokenizer(str(tiny_llama()))


def parts(tokenizer: Any, ids: list[int], stop_strings: tuple[str, ...] = ()) -> list[str]:
    response = ResponseText(tokenizer, stop_strings)
    texts = [response.push(i) for i in ids] + [response.finish()]
    assert response.text == "".join(texts)
    return texts


@given(st.lists(st.integers(0, 259), max_size=60))
def test_any_ids_give_the_text_of_decoding_them_at_once(tokenizer: Any, ids: list[int]) -> None:
    assert "".join(parts(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


@given(st.lists(st.sampled_from(WORDS), max_size=12), st.lists(st.sampled_from(WORDS), min_size=1, max_size=3))
def test_stop_strings_cut_where_a_search_in_the_whole_would(tokenizer: Any, words: list[str], stops: list[str]) -> None:
    text = "".join(words)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    # Which stop string is complete first decides, and of several that are, the one that begins first.
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text
    if ends:
        first = min(end for end, _ in ends)
        expected = text[: min(start for end, start in ends if end == first)]
    assert "".join(parts(tokenizer, ids, tuple(stops))) == expected


@pytest.fixture(scope="module")
def fallback() -> Any:
    """As Llama's: words with their space, and a token for each byte of what it has no word for."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = [f"<0x{byte:02X}>" for byte in range(256)] + ["\u2581a", "\u2581b", "c"]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made)


@given(st.lists(st.one_of(st.integers(0, 258), st.sampled_from([0x67, 0xFF, 0xE6, 256, 257])), max_size=40))
def test_no_bytes_end_a_response(fallback: Any, ids: list[int]) -> None:
    """Such a tokenizer changes text that is out already: b"g" is a character, b"g\\xff" is two replacement characters."""
    text = "".join(parts(fallback, ids))
    whole = fallback.decode(ids, skip_special_tokens=True)
    assert text == whole or "\ufffd" in whole
    assert text.count(" a") + text.startswith("a") == whole.count(" a") + whole.startswith("a")


def test_text_before_invalid_bytes_stays(fallback: Any) -> None:
    assert parts(fallback, [256, 0x67, 0xFF, 256, 257, 258]) == ["a", "g", "", "\ufffd a", " b", "c", ""]


def test_a_character_comes_when_its_last_byte_has(tokenizer: Any) -> None:
    ids = tokenizer("é🙂", add_special_tokens=False).input_ids
    assert parts(tokenizer, ids) == ["", "é", "", "", "", "🙂", ""]
    assert parts(tokenizer, ids[:1]) == ["", "\ufffd"]  # it never came


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_none(tokenizer: Any) -> None:
    ids = tokenizer("ab\nHux", add_special_tokens=False).input_ids
    assert parts(tokenizer, ids, ("\nHuman:",)) == ["a", "b", "", "", "", "\nHux", ""]


# ---------------------------------------------------------------- tokens


@pytest.fixture(scope="module")
def merged() -> Any:
    """Byte-level as GPT-2's, with a special token and one that is none, and tokens of several letters."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), ("\u0120", "a"), ("\u0120a", "b")]  # \u0120 is how it writes a space
    vocabulary = [*letters, *(one + two for one, two in merges)]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<|end|>"])
    made.add_tokens([AddedToken("<tool>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=made)


def listed(tokenizer: Any, ids: list[int], stops: tuple[str, ...] = ()) -> tuple[ResponseText, list[tuple[str, bytes]]]:
    """As a service does: nothing after the stop string, tokens asked for after every one. They never run ahead of the text."""
    response = ResponseText(tokenizer, stops)
    for i in ids:
        if not response.stopped:
            response.push(i)
            response.settle()
            assert response.text.startswith("".join(token.text for token in response.tokens))
    response.finish()
    response.settle()
    return response, [(token.text, token.raw) for token in response.tokens]


@pytest.mark.parametrize("kind", ["merged", "fallback", "tokenizer"])
@given(data=st.data())
def test_tokens_join_up_to_the_response(kind: str, data: st.DataObject, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=30))
    stops = data.draw(st.sampled_from([(), ("b",), (" a",), ("ab", "c"), ("\ufffd",)]))
    response, tokens = listed(tokenizer, ids, stops)
    assert "".join(text for text, _ in tokens) == response.text
    raw = b"".join(raw for _, raw in tokens)
    if "\ufffd" not in response.text:
        assert raw == response.text.encode()
    elif kind == "merged" and not response.is_cut:  # which writes one replacement character where Python does
        assert raw.decode(errors="replace") == response.text
    if not response.stopped:
        assert len(tokens) == len(ids)
        again = listed(tokenizer, ids)[1]
        assert again == tokens


def test_the_bytes_of_a_letter_are_those_of_its_tokens(merged: Any, fallback: Any) -> None:
    """\u0641 is 0xD9 0x81: it comes with the second token, each has its byte. What never becomes a letter keeps its bytes too."""
    d9, x81 = (merged.convert_tokens_to_ids(letter) for letter in ("\u00d9", "\u0123"))
    assert listed(merged, [d9, x81])[1] == listed(fallback, [0xD9, 0x81])[1] == [("", b"\xd9"), ("\u0641", b"\x81")]
    assert listed(merged, [d9])[1] == [("\ufffd", b"\xd9")]


def test_special_tokens_are_no_text_and_added_ones_are(merged: Any) -> None:
    a, end, tool = (merged.convert_tokens_to_ids(token) for token in ("a", "<|end|>", "<tool>"))
    assert listed(merged, [a, end, tool, end])[1] == [("a", b"a"), ("", b""), ("<tool>", b"<tool>"), ("", b"")]
    assert special_stop_ids(merged, ("<tool>", "<|end|>", "a")) == (end,)


def test_the_space_before_the_first_word_is_not_in_the_response(fallback: Any) -> None:
    assert listed(fallback, [256, 257, 258])[1] == [("a", b"a"), (" b", b" b"), ("c", b"c")]


def test_a_response_that_goes_on_with_a_text_keeps_its_first_space(fallback: Any) -> None:
    """Of /v1/completions: prompt and text join up (issue 16, inputs 13), in the text, its tokens and their bytes."""
    for prompt in ([257], [258, 257] * 9, [0xC3, 258]):
        response = ResponseText(fallback, (" b",), after=prompt)
        assert [response.push(i) for i in (256, 258)] == [" a", "c"]
        response.settle()
        assert [(token.text, token.raw) for token in response.tokens] == [(" a", b" a"), ("c", b"c")]
        assert response.push(257) + response.finish() == ""
        assert (response.stopped, response.text) == (True, " ac")


def test_what_a_stop_string_hides_is_not_listed(merged: Any) -> None:
    ids = merged.convert_tokens_to_ids(["a", "\u0120ab", "\u0120", "c"])
    assert merged.decode(ids) == "a ab c"
    response, tokens = listed(merged, ids, ("b ",))
    assert (response.text, tokens, response.is_cut) == ("a a", [("a", b"a"), (" a", b" a")], True)
    bad = merged.convert_tokens_to_ids("\u00d9")  # 0xD9 and no more: a character only once "c" has come
    response, tokens = listed(merged, [bad, ids[-1]], ("c",))
    assert (response.text, tokens, response.is_cut) == ("\ufffd", [("\ufffd", b"\xd9")], False)
    response, tokens = listed(merged, ids, (" ab",))
    assert (response.text, tokens, response.is_cut) == ("a", [("a", b"a")], False)
