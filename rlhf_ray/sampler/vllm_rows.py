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

from rlhf_ray.sampler.requests import DecodeRequest
from rlhf_ray.sampler.rows import sampling_plan
from rlhf_ray.sampler.sampling import SamplingPlan, likeliest, sample_tokens

ROW = "rlhf_ray_row"
"""Key of a request's number among vLLM's extra arguments."""


@dataclass
class DrawnTokens:
    """What engine and processor, both of this process, tell each other. requests: of rows under way, by number.
    drawn: number -> token, log-probability and the likeliest tokens at each place of the reply; `begun` is not among them."""

    requests: dict[int, DecodeRequest] = field(default_factory=dict)
    drawn: dict[int, list[tuple[int, float, tuple[tuple[int, float], ...]]]] = field(default_factory=dict)

    def add(self, number: int, request: DecodeRequest) -> None:
        self.requests[number] = request
        self.drawn[number] = []

    def drop(self, number: int) -> None:
        self.requests.pop(number, None)
        self.drawn.pop(number, None)


class RowSampler:
    """The processor without vLLM's base class: which row is where in the batch, and what is drawn for it.

    A row that is read in parts, or read again after vLLM has put it off, is drawn for more than once at the same place of its
    reply; vLLM keeps the last of these tokens, and so does this."""

    def __init__(self, shared: DrawnTokens) -> None:
        self.shared = shared
        self.rows: dict[int, tuple[int, list[int]]] = {}  # place in the batch -> number, and vLLM's list of its reply
        self._plan: tuple[tuple[int, ...], SamplingPlan] | None = None

    def update(self, change: Any) -> None:
        """change: vLLM's BatchUpdate, in its order: removed, added, moved."""
        for place in change.removed:
            self.rows.pop(place, None)
        for place, params, _, output in change.added:
            self.rows[place] = int((params.extra_args or {})[ROW]), output
        for first, second, direction in change.moved:
            one, other = self.rows.pop(first, None), self.rows.pop(second, None)
            if one is not None:
                self.rows[second] = one
            if other is not None and direction.name == "SWAP":
                self.rows[first] = other

    def draw(self, logits: Tensor) -> Tensor:
        """logits: f[N, V] of the rows in the first N places. Returns them with nothing left but each row's token."""
        rows = [self.rows[place] for place in range(len(logits))]
        numbers = tuple(number for number, _ in rows)
        requests = [self.shared.requests[number] for number in numbers]
        if self._plan is None or self._plan[0] != numbers:
            seeds = torch.tensor([request.row_seed for request in requests]).to(logits.device)
            self._plan = numbers, sampling_plan(requests, seeds, logits.device)
        told = [len(output) for _, output in rows]
        index = torch.tensor([len(request.begun) + n for request, n in zip(requests, told)]).to(logits.device)
        tokens, logprobs = sample_tokens(logits, self._plan[1], index)
        tops = likeliest(logits, self._plan[1])
        for number, at, *found in zip(numbers, told, tokens.tolist(), logprobs.tolist(), tops):
            self.shared.drawn[number][at:] = [tuple(found)]
        return logits.fill_(-torch.inf).scatter_(1, tokens[:, None], 0.0)


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
