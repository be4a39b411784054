"""Logits processing of requests that ask for it, with vLLM's meaning and in its order: grammar, min_tokens, bias, penalties.

Temperature, min_p, top-k and top-p come behind it (sampling.py). A row that asks for none of these is left as it is, bit for bit,
and training never asks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Matcher(Protocol):
    """Where one reply stands in its grammar."""

    def allowed(self, vocabulary: int) -> Tensor:
        """bool[V], on the CPU: tokens that may come next. Stop ids are among them where the reply may end."""
        ...

    def accept(self, token_id: int) -> None:
        """Go on behind this token. Raises if the grammar does not allow it."""
        ...


class Grammar(Protocol):
    """What a reply must be made of."""

    def matcher(self, stop_ids: Sequence[int]) -> Matcher:
        """For a reply that begins now, and ends with one of `stop_ids`."""
        ...


@dataclass(frozen=True)
class LogitsOptions:
    """What one request asks of its logits.

    presence_penalty, frequency_penalty: taken off the logit of every token of the reply so far, once or once for each time.
    repetition_penalty: logits of tokens of prompt and reply are divided by it where positive, else multiplied (Keskar et al. 2019,
    arXiv:1909.05858); 1 is none.   logit_bias: (token id, added to its logit).
    min_tokens: no stop id before that many tokens.   grammar: what the reply must be made of.
    """

    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    grammar: Grammar | None = None

    @property
    def penalises(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)


NOTHING = LogitsOptions()


class AskingRow(Protocol):
    """What is read of a row of the engine (`rows.DecodeRow`). matcher: kept there, since a plan lives for a few steps only."""

    request: Any
    stop_ids: frozenset[int]
    token_ids: list[int]
    matcher: Any
    end: Any


class LogitsPlan:
    """The K rows of a batch that ask for something; valid until a row comes or goes. Build it with `of`."""

    def __init__(self, rows: Sequence[AskingRow], slots: Sequence[int], device: torch.device) -> None:
        self._rows, self._device = rows, device
        self.slots = torch.tensor(slots).to(device)
        options = [row.request.logits or NOTHING for row in rows]
        self._matched = [k for k, asked in enumerate(options) if asked.grammar is not None]
        for k in self._matched:
            _follow(rows[k])
        self._made = torch.tensor([len(row.token_ids) for row in rows]).to(device)
        self._bans = self._table(
            (k, i, asked.min_tokens)
            for k, asked in enumerate(options)
            for i in rows[k].stop_ids
            if asked.min_tokens > len(rows[k].token_ids)
        )
        self._biases = self._table((k, i, bias) for k, asked in enumerate(options) for i, bias in asked.logit_bias)
        self._penalties: Tensor | None = None
        if any(asked.penalises for asked in options):
            numbers = [(a.repetition_penalty, a.frequency_penalty, a.presence_penalty) for a in options]
            self._penalties = torch.tensor(numbers).to(device).T[:, :, None]  # f32[3, K, 1]
        self._counts: Tensor | None = None  # f32[K, V], of the reply
        self._prompts: Tensor | None = None  # bool[K, V]

    @classmethod
    def of(cls, rows: Sequence[AskingRow], device: torch.device) -> LogitsPlan | None:
        """None if no row asks for anything."""
        slots = [slot for slot, row in enumerate(rows) if row.request.logits is not None]
        return cls([rows[slot] for slot in slots], slots, device) if slots else None

    def apply(self, logits: Tensor) -> Tensor:
        """logits: f32[N, V].   Returns f32[N, V]: rows that ask for nothing as they are. Where nothing is left, all are -inf."""
        asked = logits[self.slots]
        for k in self._matched:
            allowed = self._rows[k].matcher.allowed(logits.shape[-1])
            asked[k].masked_fill_(~allowed.to(self._device), -torch.inf)
        if self._bans is not None:
            of, ids, until = self._bans
            early = self._made[of] < until
            asked[of[early], ids[early]] = -torch.inf
        if self._biases is not None:
            of, ids, bias = self._biases
            asked.index_put_((of, ids), bias, accumulate=True)
        return logits.index_copy(0, self.slots, self._penalised(asked))

    def advance(self, tokens: Tensor) -> None:
        """Every row has taken its token, unless it ended with an error.   tokens: i64[N], of the whole batch."""
        self._made += 1
        if self._counts is not None:
            taken = tokens[self.slots][:, None]
            self._counts.scatter_add_(1, taken, torch.ones_like(taken, dtype=torch.float32))
        for k in self._matched:
            if self._rows[k].end is None:
                self._rows[k].matcher.accept(self._rows[k].token_ids[-1])

    def _penalised(self, logits: Tensor) -> Tensor:
        if self._penalties is None:
            return logits
        if self._counts is None or self._prompts is None:
            self._count(logits.shape[-1])
        assert self._counts is not None and self._prompts is not None
        repetition, frequency, presence = self._penalties
        written = self._counts > 0
        divisor = torch.where(self._prompts | written, repetition, 1.0)
        logits = torch.where(logits > 0, logits / divisor, logits * divisor)
        return logits - frequency * self._counts - presence * written

    def _count(self, vocabulary: int) -> None:
        """What each row holds so far."""
        counts, prompts = torch.zeros(len(self._rows), vocabulary), torch.zeros(len(self._rows), vocabulary)
        for k, row in enumerate(self._rows):
            asked = row.request.logits or NOTHING
            if asked.penalises:
                counts[k] = torch.bincount(torch.tensor(row.token_ids, dtype=torch.int64), minlength=vocabulary)
            if asked.repetition_penalty != 1:
                prompts[k, torch.tensor(row.request.prompt_ids)] = 1
        self._counts, self._prompts = counts.to(self._device), prompts.bool().to(self._device)

    def _table(self, entries: Iterable[tuple[int, int, float]]) -> tuple[Tensor, Tensor, Tensor] | None:
        """Columns of (row, token id, number); None if there is no entry."""
        columns = list(zip(*entries))
        if not columns:
            return None
        k, ids, numbers = (torch.tensor(column).to(self._device) for column in columns)
        return k, ids, numbers


def _follow(row: AskingRow) -> None:
    """Give a row its matcher, at the token where it stands."""
    if row.matcher is None:
        assert row.request.logits is not None and row.request.logits.grammar is not None
        row.matcher = row.request.logits.grammar.matcher(row.request.stop_ids)
        for token_id in row.token_ids:
            row.matcher.accept(token_id)
