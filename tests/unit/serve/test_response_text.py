"""Responses as text while they are written: the parts make up the text, characters are whole, stop strings are cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.models.tokenizer import load_tokenizer
from rlhf_ray.serve.response_text import ResponseText

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
