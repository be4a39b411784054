"""Incremental detokenisation of one response: whole characters only, nothing of a stop string, and what each token adds to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from tokenizers.decoders import DecodeStream

from rlhf_ray.data.continuation import CONTEXT
from rlhf_ray.serve.token_bytes import token_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class TokenText(NamedTuple):
    """What a token adds to a response: whole characters, which come with the last of their tokens; bytes, of every token."""

    text: str
    raw: bytes


def special_stop_ids(tokenizer: PreTrainedTokenizerFast, stop_strings: Sequence[str]) -> tuple[int, ...]:
    """Stop strings that spell a special token: it is no text, so it has to be stopped on as a token."""
    added = tokenizer.added_tokens_decoder.items()
    return tuple(i for i, token in added if token.special and token.content in stop_strings)


class ResponseText:
    """`push` each token, then `finish`: the parts make up the text of the response, cut before the first stop string.

    tokenizer: of the base.   stop_strings: end the response; they are not part of it.   stopped: one of them came.
    after: ids of a prompt whose text the response goes on with.   min_tokens: before the text of the token behind these, no stop
    string is looked for.   spoken: special tokens that are part of the text.
    tokens: those pushed, in order, whose text has been returned as of the last `settle`; none that a stop string hid.
    is_cut: a stop string began within the last of them."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        stop_strings: Sequence[str] = (),
        after: Sequence[int] = (),
        min_tokens: int = 0,
        spoken: Mapping[int, str] | None = None,
    ) -> None:
        self._tokenizer, self._backend = tokenizer, tokenizer.backend_tokenizer
        before = list(after[-CONTEXT:])
        self._stream = DecodeStream(ids=before, skip_special_tokens=True)
        self._stop_strings = tuple(stop_strings)
        self._min_tokens, self._spoken = min_tokens, spoken or {}
        self._ids = before  # since the stream started
        self._decoded = len(self._decode(before))  # characters that the stream has returned, or that were there before
        self._held_back = ""  # might be the beginning of a stop string
        self._pushed: list[tuple[int, str]] = []  # every token, and the text that came with it
        self._settled = 0  # characters of `tokens`
        self._finished = False
        self.stopped = False
        self.is_cut = False
        self.parts: list[str] = []
        self.tokens: list[TokenText] = []

    @property
    def text(self) -> str:
        """What has been returned so far."""
        return "".join(self.parts)

    def push(self, token_id: int) -> str:
        """The text that this token completes; "" where a character, or what may be a stop string, is not complete."""
        if self.stopped:
            return ""
        if token_id in self._spoken:
            self._pushed.append((token_id, self._spoken[token_id]))
            return self._emit(self._spoken[token_id])
        try:
            new = self._stream.step(self._backend, token_id) or ""
        except Exception:  # tokenizers raises nothing narrower
            new = self._restart_stream(token_id)
        else:
            self._ids.append(token_id)
            self._decoded += len(new)
        self._pushed.append((token_id, new))
        return self._emit(new)

    def finish(self) -> str:
        """The rest: bytes that never became a character, the beginning of a stop string that did not come."""
        if self.stopped:
            return ""
        self._finished = True
        rest = self._decode(self._ids)[self._decoded :]
        if self._pushed:
            token_id, text = self._pushed[-1]
            self._pushed[-1] = token_id, text + rest
        text_out = self._emit(rest)
        if not self.stopped:
            text_out += self._held_back
            self.parts.append(self._held_back)
            self._held_back = ""
        return text_out

    def settle(self) -> None:
        """Bring `tokens` up to date. Tokens of one character stay together, and with a token that has no text the next that has."""
        returned, over = len(self.text), self.stopped or self._finished
        while (start := len(self.tokens)) < len(self._pushed):
            stop = next((i for i in range(start, len(self._pushed)) if self._pushed[i][1]), len(self._pushed) - 1) + 1
            text = self._pushed[stop - 1][1]
            shown = text[: max(returned - self._settled, 0)]
            if not over and (len(shown) < len(text) or not text):
                return  # held back, or no character yet
            if self.stopped and not shown:
                return  # hidden
            ids, spread = [i for i, _ in self._pushed[start:stop]], token_bytes(self._tokenizer).spread
            raw = spread(ids, shown, text[len(shown) :])
            if len(shown) < len(text):
                while len(raw) > 1 and not raw[-1]:
                    raw.pop()  # hidden as a whole
                self.is_cut = raw[-1] != spread(ids, text)[len(raw) - 1]
            self.tokens += [TokenText("", part) for part in raw[:-1]] + [TokenText(shown, raw[-1])]
            self._settled += len(text)

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
        if not self._stop_strings or len(self._pushed) <= self._min_tokens:
            self.parts.append(new)
            return new
        text = self._held_back + new
        found = [at for at in (text.find(stop) for stop in self._stop_strings) if at >= 0]
        if found:
            self.stopped = True
            text_out, self._held_back = text[: min(found)], ""
        else:
            keep = max(overlap(text, stop) for stop in self._stop_strings)
            text_out, self._held_back = text[: len(text) - keep], text[len(text) - keep :]
        self.parts.append(text_out)
        return text_out


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with.

    >>> overlap("one \\nHum", "\\nHuman:")
    4
    """
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
