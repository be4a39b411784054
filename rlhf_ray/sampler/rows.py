"""Requests on their way through the decode engine: one row, the rows of a step as tensors, prompts that are read together."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from rlhf_ray.sampler.logits import LogitsPlan
from rlhf_ray.sampler.requests import DecodeEvent, DecodeRequest, DecodeResult
from rlhf_ray.sampler.sampling import SamplingPlan, Truncation

PREFILL_TOKENS = {"cuda": 4096, "cpu": 8192}
"""Prompt tokens, padding included, in one forward, by the device's type: bounds its activations, its keys and values before they
are in their slots, and how long the rows there must wait. A GPU has enough to do with half as many."""
PREFILL_FILL = 0.75
"""Least share of real tokens in a prompt forward; prompts of very different lengths are read in several."""


@dataclass(eq=False, slots=True)
class DecodeRow:
    """One request on its way. held: its tokens in the cache. prefix: the cache that its prompt was read into, and its row there.
    slot: where its prompt lies already, while it waits for others that begin with it.   matcher: where the reply stands in its
    grammar (logits.py).   passed: rows that came later and went first, since the cache had no room for this one."""

    id: int
    request: DecodeRequest
    stop_ids: frozenset[int]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prefix: tuple[Cache, int] | None = None
    slot: int | None = None
    matcher: Any = None
    passed: int = 0
    end: Literal["stop", "length", "error", "cancelled"] | None = None

    @property
    def held(self) -> int:
        return len(self.request.prompt_ids) - 1 + len(self.token_ids)

    @property
    def to_read(self) -> tuple[int, ...]:
        """What goes into its cache before its first step: all but the last of the tokens it starts with."""
        return (self.request.prompt_ids + self.request.begun)[:-1]

    @property
    def is_read(self) -> bool:
        """Its prompt is in a cache, or there is nothing of it to be read."""
        return self.prefix is not None or self.slot is not None or not self.to_read

    @property
    def most(self) -> int:
        """Tokens that it may come to hold."""
        return len(self.request.prompt_ids) + self.request.max_new_tokens

    @property
    def next_input(self) -> int:
        return self.token_ids[-1] if self.token_ids else self.request.prompt_ids[-1]

    def take(self, token_id: int, logprob: float, top: tuple[tuple[int, float], ...] = ()) -> DecodeEvent:
        self.token_ids.append(token_id)
        self.logprobs.append(logprob)
        if not math.isfinite(logprob):
            self.end = "error"
        elif token_id in self.stop_ids:
            self.end = "stop"
        elif len(self.token_ids) == self.request.max_new_tokens:
            self.end = "length"
        return DecodeEvent(self.id, token_id, logprob, self.end, top)  # type: ignore[arg-type]  # never "cancelled" here

    def go_back(self, count: int) -> bool:
        """Forget all but the first `count` tokens; whether there were more."""
        if len(self.token_ids) <= count:
            return False
        told = count - len(self.request.begun)
        del self.token_ids[count:], self.logprobs[told:]
        self.end = self.matcher = None
        return True

    def result(self) -> DecodeResult:
        return DecodeResult(tuple(self.token_ids), tuple(self.logprobs), self.end == "stop")


@dataclass
class Reading:
    """Prompts that are being read together, equal ones under one adapter once. adapters: of each distinct prompt.  ids, positions:
    i64[prompts, width], LEFT padded; positions of padding are below 0.  places: of each row, its prompt among them.
    done: columns that have been read into the cache."""

    rows: list[DecodeRow]
    adapters: list[str | None]
    ids: Tensor
    positions: Tensor
    places: list[int]
    cache: Cache
    done: int = 0

    @classmethod
    def of(cls, rows: Sequence[DecodeRow], pad_id: int, device: torch.device, cache: Cache) -> Reading:
        of_row = [(row.request.adapter, row.to_read) for row in rows]
        distinct = list(dict.fromkeys(of_row))
        number = {key: i for i, key in enumerate(distinct)}
        width = max(len(prefix) for _, prefix in distinct)
        ids = torch.tensor([(pad_id,) * (width - len(p)) + p for _, p in distinct]).to(device)
        lengths = torch.tensor([len(p) for _, p in distinct]).to(device)
        positions = torch.arange(width, device=device) - (width - lengths[:, None])
        return cls(list(rows), [name for name, _ in distinct], ids, positions, [number[key] for key in of_row], cache)

    @property
    def width(self) -> int:
        return self.ids.shape[1]


@dataclass
class Batch:
    """The rows in the slots, as tensors; valid until a row comes or goes. tokens: i64[N], the next inputs. counters: i64[2, N],
    each row's position and its index in the reply. forward: the model under the rows' adapters. longest: tokens held by the
    longest row."""

    tokens: Tensor
    counters: Tensor
    plan: SamplingPlan
    forward: Callable[..., Any]
    longest: int

    @classmethod
    def of(cls, rows: Sequence[DecodeRow], forward: Callable[..., Any], device: torch.device) -> Batch:
        requests = [row.request for row in rows]
        held = [row.held for row in rows]
        whole = torch.tensor(
            [
                [row.next_input for row in rows],
                held,
                [len(row.token_ids) for row in rows],
                [request.row_seed for request in requests],
            ]
        ).to(device)
        plan = sampling_plan(requests, whole[3], device, LogitsPlan.of(rows, device))
        return cls(whole[0], whole[1:3], plan, forward, max(held))

    def advance(self, tokens: Tensor) -> None:
        """Every row has taken its token."""
        self.tokens = tokens
        self.counters += 1
        self.longest += 1
        if self.plan.logits is not None:
            self.plan.logits.advance(tokens)


def sampling_plan(
    requests: Sequence[DecodeRequest], seeds: Tensor, device: torch.device, logits: LogitsPlan | None = None
) -> SamplingPlan:
    """How the rows of a step are sampled. seeds: i64[N], their row seeds, on the device.   logits: what changes theirs first."""
    greedy = [request.greedy for request in requests]
    return SamplingPlan(
        seeds=seeds,
        temperature=torch.tensor([request.temperature for request in requests]).to(device),
        truncation=_truncation(requests, device),
        greedy=torch.tensor(greedy).to(device) if any(greedy) else None,
        all_greedy=all(greedy),
        logits=logits,
        reported=_reported(requests, device),
        top=tuple(r.top_logprobs for r in requests) if any(r.top_logprobs for r in requests) else None,
    )


def _truncation(requests: Sequence[DecodeRequest], device: torch.device) -> Truncation | None:
    cut = [i for i, r in enumerate(requests) if not r.greedy and (r.top_k > 0 or r.top_p < 1 or r.min_p > 0)]
    if not cut:
        return None
    columns: list[list[Any]] = [cut, [requests[i].top_k for i in cut], [requests[i].top_p for i in cut]]
    if any(requests[i].min_p for i in cut):
        columns.append([math.log(requests[i].min_p) if requests[i].min_p else -math.inf for i in cut])
    return Truncation(*(torch.tensor(column).to(device) for column in columns))


def _reported(requests: Sequence[DecodeRequest], device: torch.device) -> Tensor | None:
    if not any(r.raw_logprobs and r.temperature != 1 for r in requests):
        return None
    return torch.tensor([1.0 if r.raw_logprobs else r.temperature for r in requests]).to(device)


def live(rows: Iterable[DecodeRow]) -> list[DecodeRow]:
    return [row for row in rows if row.end is None]


def prompt_groups(
    rows: Sequence[DecodeRow], mixed: bool, padded: bool = True, tokens: int = PREFILL_TOKENS["cpu"]
) -> Iterator[list[DecodeRow]]:
    """Rows whose prompts are read in one forward: similar lengths (equal ones, unless `padded`), no more than `tokens` unless one
    prompt alone has more; one adapter, unless `mixed`."""
    groups: defaultdict[str | None, list[DecodeRow]] = defaultdict(list)
    for row in rows:
        if row.held > 0:
            groups[None if mixed else row.request.adapter].append(row)
    for group in groups.values():
        group.sort(key=lambda row: -row.held)
        yield from _split(group, PREFILL_FILL if padded else 1.0, tokens)


def _split(rows: Sequence[DecodeRow], fill: float, tokens: int) -> Iterator[list[DecodeRow]]:
    group: list[DecodeRow] = []
    real = 0
    for row in rows:  # the longest first
        padded = (len(group) + 1) * (group[0].held if group else row.held)
        if group and (padded > tokens or real + row.held < fill * padded):
            yield group
            group, real = [], 0
        group.append(row)
        real += row.held
    if group:
        yield group
