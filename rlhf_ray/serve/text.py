"""Token ids of one reply as text, while it is being written: no half characters, and nothing of a stop string gets out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokenizers.decoders import DecodeStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class ResponseText:
    """`push` each token, then `finish`: the parts make up the reply's text, cut before the first stop string.

    tokenizer: of the base.   stops: strings that end the reply; they are not part of it.   stopped: one of them came."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._backend = tokenizer, tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stops = tuple(stops)
        self._ids: list[int] = []  # since the stream began
        self._decoded = 0  # characters that it has given out
        self._held = ""  # might be the beginning of a stop string
        self.stopped = False
        self.parts: list[str] = []

    @property
    def text(self) -> str:
        """What has been given out so far."""
        return "".join(self.parts)

    def push(self, token_id: int) -> str:
        """What can be said after this token; "" while it is unclear."""
        if self.stopped:
            return ""
        try:
            new = self._stream.step(self._backend, token_id) or ""
        except Exception:  # tokenizers raises nothing narrower
            return self._out(self._begin_again(token_id))
        self._ids.append(token_id)
        self._decoded += len(new)
        return self._out(new)

    def finish(self) -> str:
        """What was held back: bytes that never became a character, the beginning of a stop string that did not come."""
        if self.stopped:
            return ""
        whole = self._decode(self._ids)
        said = self._out(whole[self._decoded :])
        if not self.stopped:
            said += self._held
            self.parts.append(self._held)
            self._held = ""
        return said

    def _begin_again(self, token_id: int) -> str:
        """What is new with a token that changes what was said before: bytes of a byte-fallback tokenizer that were a character by
        themselves, and with those that followed are none. They stay as they were said, and the stream begins with this token."""
        rest = self._decode(self._ids)[self._decoded :]
        before = self._ids[-1:]
        new = self._decode([*before, token_id])[
            len(self._decode(before)) :
        ]  # in its place: a first token has no space before it
        self._stream = DecodeStream(ids=[token_id], skip_special_tokens=True)
        self._ids, self._decoded = [token_id], len(self._decode([token_id]))
        return rest + new

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def _out(self, new: str) -> str:
        if not self._stops:
            self.parts.append(new)
            return new
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped = True
            said, self._held = text[: min(found)], ""
        else:
            keep = max(_overlap(text, stop) for stop in self._stops)
            said, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self.parts.append(said)
        return said


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with.

    >>> _overlap("one \\nHum", "\\nHuman:")
    4
    """
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
