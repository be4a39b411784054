"""The joint between a prompt's text and a reply that goes on with it.

SentencePiece tokenizers set a space before the first word of every text and take it away again when they decode. A reply that is
decoded by itself so loses the space that stands between it and the prompt, and one that is encoded by itself has one too many.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING

from rlhf_ray.data.templates import PlainTemplate, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT = 8
"""Tokens of a prompt that the text of its continuation depends on."""


def decode_continuation(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
    """The text that the reply `ids` adds to that of `prompt_ids`, without special tokens: the two texts join up."""
    before = list(prompt_ids[-CONTEXT:])

    def text(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    known, whole = text(before), text([*before, *ids])
    return whole[len(known) :] if whole.startswith(known) else text(ids)


def decoder(tokenizer: PreTrainedTokenizerBase, template: Template) -> Callable[[Sequence[int], Sequence[int]], str]:
    """(prompt ids, reply ids) -> the reply's text. Under `none` a reply goes on with the prompt's text; under all others it is a
    text by itself."""
    if isinstance(template, PlainTemplate):
        return partial(decode_continuation, tokenizer)
    return lambda prompt_ids, ids: str(tokenizer.decode(list(ids), skip_special_tokens=True))


def texts_after_prompts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[str]:
    """`texts` as they have to be encoded to stand after a prompt: without the first space, where the tokenizer sets one itself."""
    return [text.removeprefix(" ") for text in texts] if _sets_a_space(tokenizer) else list(texts)


@lru_cache(maxsize=8)
def _sets_a_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it encodes "a" as " a", and " a" as "  a". Those that leave the space of " a" as it is need no help."""
    one, two = (tokenizer(text, add_special_tokens=False).input_ids for text in ("a", " a"))
    first = tokenizer.convert_ids_to_tokens(one[:1])
    return one != two and bool(first) and str(first[0]).startswith("\u2581")
