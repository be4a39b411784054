"""Incremental detokenisation of one response: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokenizers.decoders import DecodeStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class ResponseText:
    """`push` each token, then `finish`: the parts make up the text of the response, cut before the first stop string.

    tokenizer: of the base.   stop_strings: end the response; they are not part of it.   stopped: one of them came."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop_strings: Sequence[str] = ()) -> None:
        self._tokenizer, self._backend = tokenizer, tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop_strings = tuple(stop_strings)
        self._ids: list[int] = []  # since the stream started
        self._decoded = 0  # characters that the stream has returned
        self._held_back = ""  # might be the beginning of a stop string
        self.stopped = False
        self.parts: list[str] = []

    @property
    def text(self) -> str:
        """What has been returned so far."""
        return "".join(self.parts)

    def push(self, token_id: int) -> str:
        """The text that this token completes; "" where a character, or what may be a stop string, is not complete."""
        if self.stopped:
            return ""
        try:
            new = self._stream.step(self._backend, token_id) or ""
        except Exception:  # tokenizers raises nothing narrower
            return self._emit(self._restart_stream(token_id))
        self._ids.append(token_id)
        self._decoded += len(new)
        return self._emit(new)

    def finish(self) -> str:
        """The rest: bytes that never became a character, the beginning of a stop string that did not come."""
        if self.stopped:
            return ""
        whole = self._decode(self._ids)
        text_out = self._emit(whole[self._decoded :])
        if not self.stopped:
            text_out += self._held_back
            self.parts.append(self._held_back)
            self._held_back = ""
        return text_out

    def _restart_stream(self, token_id: int) -> str:
        """The new text of a token that changes text before it: bytes of a byte-fallback tokenizer that were a character by
        themselves, and with those that followed are none. The text stays as it was, and the stream starts again at this token."""
        rest = self._decode(self._ids)[self._decoded :]
        before = self._ids[-1:]
        new = self._decode([*before, token_id])[
            len(self._decode(before)) :
        ]  # after its predecessor: a first token has no space before it
        self._stream = DecodeStream(ids=[token_id], skip_special_tokens=True)
        self._ids, self._decoded = [token_id], len(self._decode([token_id]))
        return rest + new

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def _emit(self, new: str) -> str:
        if not self._stop_strings:
            self.parts.append(new)
            return new
        text = self._held_back + new
        found = [at for at in (text.find(stop) for stop in self._stop_strings) if at >= 0]
        if found:
            self.stopped = True
            text_out, self._held_back = text[: min(found)], ""
        else:
            keep = max(_overlap(text, stop) for stop in self._stop_strings)
            text_out, self._held_back = text[: len(text) - keep], text[len(text) - keep :]
        self.parts.append(text_out)
        return text_out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with.

    >>> _overlap("one \\nHum", "\\nHuman:")
    4
    """
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
