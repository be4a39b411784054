"""Rewards of complete responses, and their KL to the base: forward passes between two decoding steps.

Whatever is pending when the decode thread comes to it is scored together, in as few passes as memory allows.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel

from rlhf_ray.data.continuation import texts_after_prompts
from rlhf_ray.data.encode import encode_texts
from rlhf_ray.models.backbone import Backbone
from rlhf_ray.models.forward import after_last_token
from rlhf_ray.models.heads import ScalarHead
from rlhf_ray.models.role_models import AdapterStack
from rlhf_ray.rewards.retokenised import Reader
from rlhf_ray.serve.decode_thread import DecodeThread
from rlhf_ray.serve.echo import listed, prompt_logprobs, prompt_texts, token_table
from rlhf_ray.serve.generation import Generation, GenerationRequest, ServedModel
from rlhf_ray.serve.prompt_encoder import PromptEncoder

ROWS_PER_PASS = 16


@dataclass(frozen=True, eq=False)
class ScoringCase:
    """A response to be scored. adapter: PEFT name, None for the base.
    head: of a reward; None for log-probabilities.  temperature: divides the base's logits."""

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    adapter: str | None = None
    head: ScalarHead | None = None
    temperature: float = 1.0

    @property
    def group(self) -> Hashable:
        return self.adapter, None if self.head is None else id(self.head), self.temperature


class ResponseScorer:
    """Lives on the event loop that awaits it."""

    def __init__(self, engine: DecodeThread, prompt_encoder: PromptEncoder) -> None:
        self._engine, self._prompt_encoder = engine, prompt_encoder
        self._pending: list[tuple[ScoringCase, asyncio.Future[float]]] = []

    async def scores(
        self, request: GenerationRequest, generation: Generation, reward_model: ServedModel | None
    ) -> dict[str, Any]:
        """{reward, kl, prompt_text, listed, prompt_logprobs} (see generation.py) of a complete response without what a stop
        string hid:
        those that the request wants. A score is None if the response is empty or, with its prompt, longer than the context.
        ApiError if the reward model's template cannot take the prompt."""
        scores: dict[str, Any] = {}
        if reward_model is not None:
            scores["reward"] = await self._reward(generation, reward_model)
        if request.kl:
            scores["kl"] = await self._kl(generation, request.temperature or 1.0)
        if request.echo or request.reads_again:
            scores |= await self.told(request, generation)
        return scores

    async def told(self, request: GenerationRequest, generation: Generation) -> dict[str, Any]:
        """What `echo` and `logprobs` of /v1/completions ask for, and `prompt_logprobs`: of a response as far as it is written."""
        tokenizer, generated = self._engine.backbone.tokenizer, generation.text
        before = prompt_texts(tokenizer, generation.prompt_ids, generation.prompt.get("raw"))
        told: dict[str, Any] = {"prompt_text": generation.prompt.get("raw", "".join(before))} if request.echo else {}
        if not request.reads_again:
            return told
        generated.settle()
        texts = [*before, *(token.text for token in generated.tokens)] if request.echo else before
        if request.echo and generation.end == "stop" and not generated.stopped:
            texts.append("")  # the token that ended it: harnesses take off the one token that they asked for
        ids = [*generation.prompt_ids, *generation.response_ids][: len(texts)]
        cached, asked = generation.served.cached, request.prompt_logprobs
        adapter, top = None if cached is None else cached.adapter_name, max(request.top_logprobs, asked or 0)
        logprobs, likeliest, ranks = await asyncio.wrap_future(
            self._engine.call(lambda model: token_table(self._engine.backbone, model, adapter, ids, top))
        )
        if asked is not None:
            told["prompt_logprobs"] = prompt_logprobs(
                tokenizer, generation.prompt_ids, logprobs, likeliest, ranks, asked
            )
        if request.echo and request.logprobs:
            best = [places[: request.top_logprobs] for places in likeliest]
            told["listed"] = listed(tokenizer, ids, texts, logprobs, best)
        return told

    async def _reward(self, generation: Generation, reward_model: ServedModel) -> float | None:
        """The reward model's score after the last token of the response, to the prompt under the reward model's own template."""
        assert reward_model.cached is not None and reward_model.cached.head is not None
        prompt, template = generation.prompt, reward_model.template
        has_no_template = "ids" in prompt or "raw" in prompt
        written_in = generation.served.template
        if has_no_template or (template.sha256, template.date) == (written_in.sha256, written_in.date):
            prompt_ids = generation.prompt_ids
        else:
            prompt_ids = await self._prompt_encoder.encode(prompt, template)
        cached, response_ids = reward_model.cached, generation.response_ids[: generation.shown]
        if generation.text.is_cut:  # a stop string began within a token
            tokenizer = self._engine.backbone.tokenizer
            response_ids = encode_texts(tokenizer, texts_after_prompts(tokenizer, [generation.text.text]))[0]
        return await self._score(ScoringCase(prompt_ids, response_ids, cached.adapter_name, cached.head))

    async def _kl(self, generation: Generation, temperature: float) -> float | None:
        """The k1 estimate on this one response: log-probability under the adapter minus that under the base, nats, over the tokens
        that are listed with it, and the one that ended it."""
        if generation.served.cached is None:
            return 0.0
        shown = generation.shown
        case = ScoringCase(generation.prompt_ids, generation.response_ids[:shown], temperature=temperature)
        own_logprob: float | None = sum(generation.logprobs[:shown])
        if temperature != 1:  # what was reported is at temperature 1
            own_logprob = await self._score(replace(case, adapter=generation.served.cached.adapter_name))
        base_logprob = await self._score(case)
        return None if base_logprob is None or own_logprob is None else own_logprob - base_logprob

    async def _score(self, case: ScoringCase) -> float | None:
        length = len(case.prompt_ids) + len(case.response_ids)
        if not case.prompt_ids or not case.response_ids or length > self._engine.backbone.context_length:
            return None
        loop = asyncio.get_running_loop()
        future: asyncio.Future[float] = loop.create_future()
        self._pending.append((case, future))
        if len(self._pending) == 1:
            self._engine.call(lambda model: self._score_pending(model, loop))
        return await future

    def _score_pending(self, model: PeftModel, loop: asyncio.AbstractEventLoop) -> None:
        """Called on the decode thread."""
        pending, self._pending = self._pending, []
        try:
            results: list[Any] = score_cases([case for case, _ in pending], self._engine.backbone, model)
        except Exception as error:
            results = [error] * len(pending)
        loop.call_soon_threadsafe(_resolve, [future for _, future in pending], results)


def _resolve(futures: Sequence[asyncio.Future[float]], results: Sequence[float | Exception]) -> None:
    for future, result in zip(futures, results):
        if future.done():  # cancelled: nobody waits for it any more
            continue
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)


@torch.no_grad()
def score_cases(cases: Sequence[ScoringCase], backbone: Backbone, model: PeftModel) -> list[float]:
    """One number per case, in their order: a reward, or a sum of log-probabilities. Cases are read in groups of one adapter."""
    stack, reader = AdapterStack(backbone, model), Reader(backbone, None, False)  # type: ignore[arg-type]  # only pads
    scores = [0.0] * len(cases)
    groups: defaultdict[Hashable, list[int]] = defaultdict(list)
    for i, case in enumerate(cases):
        groups[case.group].append(i)
    for members in groups.values():
        members.sort(key=lambda i: len(cases[i].prompt_ids) + len(cases[i].response_ids))
        for start in range(0, len(members), ROWS_PER_PASS):
            batch = members[start : start + ROWS_PER_PASS]
            first = cases[batch[0]]
            seq = reader.sequences(
                [list(cases[i].prompt_ids) for i in batch], [list(cases[i].response_ids) for i in batch]
            )
            states = stack.states(seq, first.adapter)
            if first.head is None:
                values = stack.logprobs(states, seq, first.temperature, False, int)[0].double().sum(dim=1)
            else:
                values = after_last_token(first.head(states), seq)
            for i, value in zip(batch, values.tolist()):
                scores[i] = value
    return scores
