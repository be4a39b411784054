"""The bytes that tokens stand for, of byte-level and SentencePiece tokenizers alike: those of a response join up to it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@lru_cache(maxsize=4)
def token_bytes(tokenizer: PreTrainedTokenizerFast) -> TokenBytes:
    """One for each tokenizer."""
    return TokenBytes(tokenizer)


class TokenBytes:
    """tokenizer: of the base."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        decoder = tokenizer.backend_tokenizer.decoder
        kinds = "" if decoder is None else json.dumps(json.loads(decoder.__getstate__()))
        self._letters = _byte_level_alphabet() if '"ByteLevel"' in kinds else {}
        self._has_bytes = '"ByteFallback"' in kinds
        self._added = {
            i: b"" if token.special else token.content.encode() for i, token in tokenizer.added_tokens_decoder.items()
        }

    def of(self, token_id: int) -> bytes:
        """Of one token, with the space that SentencePiece marks before a word; b"" of a special token, which is no text."""
        if token_id in self._added:
            return self._added[token_id]
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(token, str):  # an embedding without a token
            return b""
        if self._letters:
            return bytes(self._letters[letter] for letter in token if letter in self._letters)
        if self._has_bytes and (byte := _BYTE.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        return token.replace("\u2581", " ").encode()

    def shown(self, token_id: int) -> tuple[str, list[int]]:
        """Text and bytes of a token by itself, as it is listed among the likeliest; the name of a special token."""
        if token_id in self._added and not self._added[token_id]:
            name = self._tokenizer.added_tokens_decoder[token_id].content
            return name, list(name.encode())
        raw = self.of(token_id)
        return raw.decode("utf-8", "replace"), list(raw)

    def spread(self, ids: Sequence[int], text: str, hidden: str = "") -> list[bytes]:
        """The bytes of `text` by token; `ids` together make text and `hidden`, which a stop string cut off.

        A response begins without the space that SentencePiece puts before every word. Where bytes make no character, they are
        those before the replacement character."""
        found, whole, after = [self.of(i) for i in ids], (text + hidden).encode(), hidden.encode()
        if b"".join(found).startswith(b" ") and not whole.startswith(b" "):
            first = next(i for i, raw in enumerate(found) if raw)
            found[first] = found[first][1:]
        joined = b"".join(found)
        if joined != whole and "\ufffd" not in text + hidden:
            return [b""] * (len(ids) - 1) + [text.encode()]
        left, cut = len(joined.removesuffix(after)) if joined.endswith(after) else len(text.encode()), []
        for raw in found:
            cut.append(raw[:left])
            left -= len(cut[-1])
        return cut


def _byte_level_alphabet() -> dict[str, int]:
    """Letter -> byte, as GPT-2 writes bytes: printable ones of Latin-1 as they are, all others as letters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}
