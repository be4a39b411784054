"""Rewards of finished replies, and their log-probabilities under the base: forward passes between two decoding steps.

Whatever waits when the engine comes to it is scored together, in as few passes as memory allows.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from rlhf_ray.models.backbone import Backbone
from rlhf_ray.models.forward import after_last_token
from rlhf_ray.models.heads import ScalarHead
from rlhf_ray.models.role_models import AdapterStack
from rlhf_ray.rewards.retokenised import Reader
from rlhf_ray.serve.decode_thread import DecodeThread

ROWS_PER_PASS = 16


@dataclass(frozen=True, eq=False)
class ScoringCase:
    """A reply to be judged. adapter: PEFT name of a reward adapter, or None for the base's log-probabilities.
    head: f32[1, D] of the reward.  temperature: divides the base's logits."""

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    adapter: str | None = None
    head: torch.Tensor | None = None
    temperature: float = 1.0

    @property
    def group(self) -> Hashable:
        return self.adapter, None if self.head is None else id(self.head), self.temperature


class ResponseScorer:
    """Lives on the event loop that awaits it."""

    def __init__(self, engine: DecodeThread) -> None:
        self._engine = engine
        self._waiting: list[tuple[ScoringCase, asyncio.Future[float]]] = []

    async def reward(
        self, prompt_ids: Sequence[int], response_ids: Sequence[int], adapter: str, head: torch.Tensor
    ) -> float | None:
        """The reward model's score after the reply's last token; None if it cannot read so much."""
        if not self._fits(prompt_ids, response_ids):
            return None
        return await self._ask(ScoringCase(prompt_ids, response_ids, adapter, head))

    async def base_logprob(
        self, prompt_ids: Sequence[int], response_ids: Sequence[int], temperature: float
    ) -> float | None:
        """Nats: the sum over the reply's tokens of their log-probabilities under the base; None if it cannot read so much."""
        if not self._fits(prompt_ids, response_ids):
            return None
        return await self._ask(ScoringCase(prompt_ids, response_ids, temperature=temperature))

    def _fits(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> bool:
        return (
            bool(prompt_ids)
            and bool(response_ids)
            and len(prompt_ids) + len(response_ids) <= self._engine.backbone.context_length
        )

    async def _ask(self, case: ScoringCase) -> float:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[float] = loop.create_future()
        self._waiting.append((case, answer))
        if len(self._waiting) == 1:
            self._engine.call(lambda model: self._judge(model, loop))
        return await answer

    def _judge(self, model: PeftModel, loop: asyncio.AbstractEventLoop) -> None:
        """On the engine's thread."""
        waiting, self._waiting = self._waiting, []
        try:
            found: list[Any] = judge([case for case, _ in waiting], self._engine.backbone, model)
        except Exception as error:
            found = [error] * len(waiting)
        loop.call_soon_threadsafe(_tell, [answer for _, answer in waiting], found)


def _tell(answers: Sequence[asyncio.Future[float]], found: Sequence[float | Exception]) -> None:
    for answer, value in zip(answers, found):
        if answer.done():  # whoever asked has left
            continue
        if isinstance(value, Exception):
            answer.set_exception(value)
        else:
            answer.set_result(value)


@torch.no_grad()
def judge(cases: Sequence[ScoringCase], backbone: Backbone, model: PeftModel) -> list[float]:
    """One number per case, in their order: a reward, or a sum of log-probabilities. Cases are read in groups of one adapter."""
    stack, pad = AdapterStack(backbone, model), Reader(backbone, None, False)  # type: ignore[arg-type]  # only pads
    found = [0.0] * len(cases)
    groups: defaultdict[Hashable, list[int]] = defaultdict(list)
    for i, case in enumerate(cases):
        groups[case.group].append(i)
    for members in groups.values():
        members.sort(key=lambda i: len(cases[i].prompt_ids) + len(cases[i].response_ids))
        for start in range(0, len(members), ROWS_PER_PASS):
            part = members[start : start + ROWS_PER_PASS]
            first = cases[part[0]]
            seq = pad.sequences([list(cases[i].prompt_ids) for i in part], [list(cases[i].response_ids) for i in part])
            states = stack.states(seq, first.adapter)
            if first.head is None:
                values = stack.logprobs(states, seq, first.temperature, False, int)[0].double().sum(dim=1)
            else:
                head = ScalarHead(backbone.hidden_size, first.head.cpu()).to(backbone.device)
                values = after_last_token(head(states), seq)
            for i, value in zip(part, values.tolist()):
                found[i] = value
    return found
