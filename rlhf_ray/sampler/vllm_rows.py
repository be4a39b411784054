"""Sampling inside vLLM with the random numbers of this package: one logits processor, which draws every token itself.

vLLM hands it the logits of all rows of a step. It draws by `sample_tokens`, the function that the builtin engine draws by, and
leaves nothing for vLLM to choose from but the token drawn. So a row has its own random numbers whatever batch it is in, its
log-probabilities are those of the whole distribution at its temperature, and a seed gives the tokens that it gives elsewhere, as
far as the logits agree. (vLLM's own generators, one for each row, would be read one row after the other.)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.sampler.logits import LogitsPlan
from rlhf_ray.sampler.requests import DecodeRequest
from rlhf_ray.sampler.rows import DecodeRow, sampling_plan
from rlhf_ray.sampler.sampling import SamplingPlan, likeliest, sample_tokens

ROW = "rlhf_ray_row"
"""Key of a request's number among vLLM's extra arguments."""


@dataclass
class DrawnTokens:
    """What engine and processor, both of this process, tell each other. rows: under way, by number.
    drawn: number -> token, log-probability and the likeliest tokens at each place of the reply; `begun` is not among them.
    broken: numbers whose logits were not finite, be it while their prompt was read.  breaks: how often that was so."""

    rows: dict[int, DecodeRow] = field(default_factory=dict)
    drawn: dict[int, list[tuple[int, float, tuple[tuple[int, float], ...]]]] = field(default_factory=dict)
    broken: set[int] = field(default_factory=set)
    breaks: int = 0

    def add(self, number: int, request: DecodeRequest) -> None:
        self.rows[number] = DecodeRow(number, request, frozenset(request.stop_ids), list(request.begun))
        self.drawn[number] = []

    def drop(self, number: int) -> None:
        self.rows.pop(number, None)
        self.drawn.pop(number, None)
        self.broken.discard(number)


class RowSampler:
    """The processor without vLLM's base class: which row is where in the batch, and what is drawn for it.

    A row that is read in parts, or read again after vLLM has put it off, is drawn for more than once at the same place of its
    reply; vLLM keeps the last of these tokens, and so does this."""

    def __init__(self, shared: DrawnTokens) -> None:
        self.shared = shared
        self.places: dict[int, tuple[int, list[int]]] = {}  # in the batch -> number, and vLLM's list of its reply
        self._plan: tuple[tuple[int, ...], SamplingPlan] | None = None

    def update(self, change: Any) -> None:
        """change: vLLM's BatchUpdate, in its order: removed, added, moved."""
        for place in change.removed:
            self.places.pop(place, None)
        for place, params, _, output in change.added:
            self.places[place] = int((params.extra_args or {})[ROW]), output
        for first, second, direction in change.moved:
            one, other = self.places.pop(first, None), self.places.pop(second, None)
            if one is not None:
                self.places[second] = one
            if other is not None and direction.name == "SWAP":
                self.places[first] = other

    def draw(self, logits: Tensor) -> Tensor:
        """logits: f[N, V] of the rows in the first N places. Returns them with nothing left but each row's token."""
        numbers, outputs = zip(*(self.places[place] for place in range(len(logits))))
        rows = [self.shared.rows[number] for number in numbers]
        again = [row.go_back(len(row.request.begun) + len(output)) for row, output in zip(rows, outputs)]
        plan = self._planned(numbers, rows, logits.device, any(again))
        index = torch.tensor([len(row.token_ids) for row in rows]).to(logits.device)
        tokens, logprobs = sample_tokens(logits, plan, index)
        for row, output, *found in zip(rows, outputs, tokens.tolist(), logprobs.tolist(), likeliest(logits, plan)):
            if row.take(*found).end == "error":
                self.shared.broken.add(row.id)
                self.shared.breaks += 1
            self.shared.drawn[row.id][len(output) :] = [tuple(found)]
        if plan.logits is not None:
            plan.logits.advance(tokens)
        return logits.fill_(-torch.inf).scatter_(1, tokens[:, None], 0.0)

    def _planned(
        self, numbers: tuple[int, ...], rows: list[DecodeRow], device: torch.device, anew: bool
    ) -> SamplingPlan:
        """The plan of the step before, while the rows are the same and none has gone back."""
        if anew or self._plan is None or self._plan[0] != numbers:
            requests = [row.request for row in rows]
            seeds = torch.tensor([request.row_seed for request in requests]).to(device)
            self._plan = numbers, sampling_plan(requests, seeds, device, LogitsPlan.of(rows, device))
        return self._plan[1]


def processor_class(shared: DrawnTokens) -> type:
    """A logits processor class of vLLM's that draws for the rows of `shared`."""
    from vllm.v1.sample.logits_processor import LogitsProcessor

    class Processor(LogitsProcessor):  # type: ignore[misc]
        def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
            self.sampler = RowSampler(shared)

        def is_argmax_invariant(self) -> bool:
            return False

        def update_state(self, batch_update: Any) -> None:
            if batch_update is not None:
                self.sampler.update(batch_update)

        def apply(self, logits: Tensor) -> Tensor:
            return self.sampler.draw(logits)

    return Processor
