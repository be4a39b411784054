"""`/v1/score`: replies that were written elsewhere, scored by a reward adapter that is served here. The other side of
rewards/http_reward.py, whose protocol it speaks; a batch of replies is read between two steps of decoding."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rlhf_ray.serve.api_errors import ApiError, request_timeout
from rlhf_ray.serve.openai_types import MAX_LIST, ChatMessage, ModelName, Text, TokenIds

if TYPE_CHECKING:  # torch is imported by replicas; the API process does without
    from rlhf_ray.serve.generation import ServedModel
    from rlhf_ray.serve.replica import Replica

ROWS_PER_PASS = 16
"""Of one request: that many of its replies are read at a time."""
TextOrMessages = Text | Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_LIST, fail_fast=True)]


class ScoreRequest(BaseModel):
    """model: a reward adapter; default: the one that is served.  finished: whether each completion ended by itself; default: yes.

    Fields that are not named here, columns of the data say, are not read."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, protected_namespaces=())

    model: ModelName | None = None
    ids: Annotated[list[Text | int], Field(max_length=MAX_LIST)] | None = None
    prompts: Annotated[list[TextOrMessages], Field(min_length=1, max_length=MAX_LIST, fail_fast=True)]
    completions: Annotated[list[TextOrMessages], Field(min_length=1, max_length=MAX_LIST, fail_fast=True)]
    finished: Annotated[list[bool], Field(max_length=MAX_LIST, fail_fast=True)] | None = None
    tokenizer_sha256: str | None = None
    prompt_ids: Annotated[list[TokenIds], Field(max_length=MAX_LIST, fail_fast=True)] | None = None
    completion_ids: (
        Annotated[list[TokenIds | Annotated[list[int], Field(max_length=0)]], Field(max_length=MAX_LIST)] | None
    ) = None

    @model_validator(mode="after")
    def _one_of_each(self) -> ScoreRequest:
        rows = len(self.prompts)
        for name in ("completions", "ids", "finished", "prompt_ids", "completion_ids"):
            given = getattr(self, name)
            if given is not None and len(given) != rows:
                raise ValueError(f"{name}: expected {rows}, one for each prompt; got {len(given)}")
        return self

    def row_ids(self) -> list[str | int]:
        return list(self.ids) if self.ids is not None else [str(i) for i in range(len(self.prompts))]


async def score_on(replica: Replica, request: ScoreRequest, key: str = "") -> dict[str, Any]:
    """{model, sha256, ids, rewards, usage}, a reward None where the reply is empty or, with its prompt, longer than the context; or
    {error, usage}, as plain data. usage: of the tokens that were read.

    key: name of the API key that asks. A request takes one place, however many rows it has: they take turns."""
    read: Counter[str] = Counter()
    try:
        async with AsyncExitStack() as resources, asyncio.timeout(replica.limits.request_timeout_s):
            replica.claim(key, 1, resources)
            served = await replica.reward_model(request.model or True, resources)
            prompts, replies = await _encoded(replica, request, served)
            rewards = await _rewards(replica, served, prompts, replies, read)
            told: dict[str, Any] = {
                "model": served.model,
                "sha256": served.sha256,
                "ids": request.row_ids(),
                "rewards": rewards,
            }
    except ApiError as error:
        told = {"error": error.as_dict()}
    except TimeoutError:
        told = {"error": request_timeout(replica.limits.request_timeout_s).as_dict()}
    counts = {name: read[name] for name in ("prompt_tokens", "completion_tokens")}
    return {**told, "usage": {**counts, "total_tokens": read.total()}}


async def _encoded(
    replica: Replica, request: ScoreRequest, served: ServedModel
) -> tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]]:
    """Ids of prompts and replies: those of the request where its tokenizer is this base's, so that the very tokens are scored that
    were sampled. Else texts are encoded; a prompt that is a text is all that the model reads, markers included."""
    same = request.tokenizer_sha256 == replica.backbone.identity.tokenizer_sha256
    if same and request.prompt_ids is not None and request.completion_ids is not None:
        for ids in (*request.prompt_ids, *request.completion_ids):
            if ids:
                await replica.prompt_encoder.encode({"ids": ids}, served.template)
        return request.prompt_ids, request.completion_ids
    prompts = [
        await replica.prompt_encoder.encode(
            {"raw": p} if isinstance(p, str) else {"messages": [m.to_dict() for m in p]}, served.template
        )
        for p in request.prompts
    ]
    return prompts, await asyncio.to_thread(_replies, replica, request, served)


def _replies(replica: Replica, request: ScoreRequest, served: ServedModel) -> list[list[int]]:
    from rlhf_ray.data.continuation import texts_after_prompts
    from rlhf_ray.data.encode import encode_texts

    texts = [c if isinstance(c, str) else "".join(m.to_dict()["content"] for m in c) for c in request.completions]
    finished = request.finished or [True] * len(texts)
    tokenizer = replica.backbone.tokenizer
    encoded = encode_texts(tokenizer, texts_after_prompts(tokenizer, texts))
    assert served.cached is not None
    end = list(served.stop_ids[:1]) if served.cached.checkpoint.add_eos_token else []
    return [[*ids, *(end if whole else [])] for ids, whole in zip(encoded, finished, strict=True)]


async def _rewards(
    replica: Replica,
    served: ServedModel,
    prompts: Sequence[Sequence[int]],
    replies: Sequence[Sequence[int]],
    read: Counter[str],
) -> list[float | None]:
    """In the order of the request, ROWS_PER_PASS to a forward pass: other clients' tokens come in between. Counts in `read` what
    the passes read."""
    found: list[float | None] = [None] * len(prompts)
    context = replica.backbone.context_length
    fits = [i for i, (p, r) in enumerate(zip(prompts, replies, strict=True)) if p and r and len(p) + len(r) <= context]
    for start in range(0, len(fits), ROWS_PER_PASS):
        part = fits[start : start + ROWS_PER_PASS]
        some = [list(prompts[i]) for i in part], [list(replies[i]) for i in part]
        read["prompt_tokens"] += sum(map(len, some[0]))
        read["completion_tokens"] += sum(map(len, some[1]))
        values = await asyncio.wrap_future(replica.engine.call(partial(_pass, replica, served, *some)))
        for i, value in zip(part, values):
            found[i] = value
    return found


def _pass(
    replica: Replica, served: ServedModel, prompts: list[list[int]], replies: list[list[int]], model: Any
) -> list[float]:
    """Called on the decode thread."""
    import torch

    from rlhf_ray.models.forward import after_last_token
    from rlhf_ray.models.role_models import AdapterStack
    from rlhf_ray.rewards.retokenised import Reader

    cached, backbone = served.cached, replica.backbone
    assert cached is not None and cached.head is not None
    with torch.no_grad():
        seq = Reader(backbone, served.template, False).sequences(prompts, replies)
        states = AdapterStack(backbone, model).states(seq, cached.adapter_name)
        return after_last_token(cached.head(states), seq).float().tolist()
