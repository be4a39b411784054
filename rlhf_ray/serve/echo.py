"""What /v1/completions tells of every token of prompt and reply (`echo`, `logprobs`): text, log-probability, the likeliest others.

An evaluation harness scores given continuations so. The decoder reports sampled tokens alone, so this is a forward pass of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel

from rlhf_ray.data.continuation import decode_continuation
from rlhf_ray.models.adapters import use_adapter
from rlhf_ray.models.backbone import Backbone, trunk
from rlhf_ray.models.forward import LOGITS_AT_ONCE
from rlhf_ray.serve.response_text import ResponseText
from rlhf_ray.serve.token_bytes import token_bytes

ListedToken = list[Any]
"""[text, nats or None of the first, {text: nats} of the likeliest tokens there or None]"""


@torch.no_grad()
def token_table(
    backbone: Backbone, model: PeftModel, adapter: str | None, ids: Sequence[int], top: int
) -> tuple[list[float], list[list[tuple[int, float]]], list[int]]:
    """log p of ids[1:], each after all before it, under `adapter` at temperature 1; the `top` likeliest (id, log p) at each of
    these places; and the rank of the token there, 1 for the likeliest."""
    tokens = torch.tensor([list(ids)], device=backbone.device)
    with use_adapter(model, adapter):
        states = trunk(backbone.model)(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False
        ).last_hidden_state[0, :-1]
    head: Any = backbone.lm_head
    logprobs: list[float] = []
    likeliest: list[list[tuple[int, float]]] = []
    ranks: list[int] = []
    size = max(LOGITS_AT_ONCE // int(getattr(head, "out_features", None) or 32_000), 1)
    for part, targets in zip(states.split(size), tokens[0, 1:].split(size)):
        logits = head(part)
        every = logits.float().log_softmax(-1)
        logprobs += every.gather(1, targets[:, None])[
            :, 0
        ].tolist()  # the very numbers of `best`: harnesses compare them
        best = every.topk(min(top, every.shape[-1]))
        likeliest += [list(zip(i, p)) for i, p in zip(best.indices.tolist(), best.values.tolist())]
        ranks += ((every > every.gather(1, targets[:, None])).sum(-1) + 1).tolist()
    return logprobs, likeliest, ranks


def prompt_logprobs(
    tokenizer: Any,
    ids: Sequence[int],
    logprobs: Sequence[float],
    likeliest: Sequence[Sequence[tuple[int, float]]],
    ranks: Sequence[int],
    top: int,
) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: of every token but the first, {id: {logprob, rank, decoded_token}} of itself and the `top`
    likeliest in its place.   logprobs, likeliest, ranks: of `token_table`, of these tokens or more."""
    found: list[dict[str, Any] | None] = [None]
    shown = token_bytes(tokenizer).shown
    for token, own, best, own_rank in zip(ids[1:], logprobs, likeliest, ranks):
        ranked = {other: (value, rank) for rank, (other, value) in enumerate(best[:top], start=1)}
        ranked.setdefault(token, (own, own_rank))
        found.append(
            {str(i): {"logprob": p, "rank": rank, "decoded_token": shown(i)[0]} for i, (p, rank) in ranked.items()}
        )
    return found


def prompt_texts(tokenizer: Any, ids: Sequence[int], prompt: str | None) -> list[str]:
    """The text of each token of a prompt. prompt: as it was given, if it was a text: special tokens that it spells are part of it.

    A bos that it does not begin with, which the tokenizer has set, has no text."""
    text = ResponseText(tokenizer)
    for i in ids:
        text.push(i)
    text.finish()
    text.settle()
    special = {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    texts = [special.get(i, token.text) for i, token in zip(ids, text.tokens)]
    if ids[0] == tokenizer.bos_token_id and not (prompt or "").startswith(texts[0]):
        texts[0] = ""
    return texts


def listed(
    tokenizer: Any,
    ids: Sequence[int],
    texts: Sequence[str],
    logprobs: Sequence[float],
    likeliest: Sequence[Sequence[tuple[int, float]]],
) -> list[ListedToken]:
    """Every token of `ids` with what is told of it. texts: theirs.  logprobs, likeliest: of `token_table`."""
    found: list[ListedToken] = [[texts[0], None, None]]
    for i, (logprob, best) in enumerate(zip(logprobs, likeliest), start=1):
        others: dict[str, float] = {}
        for other, value in best:  # the likeliest first; two tokens may be the same text
            others.setdefault(texts[i] if other == ids[i] else _text(tokenizer, ids[:i], other), value)
        if others:
            others.setdefault(texts[i], logprob)
        found.append([texts[i], logprob, others or None])
    return found


def _text(tokenizer: Any, before: Sequence[int], token_id: int) -> str:
    added = tokenizer.added_tokens_decoder.get(token_id)
    return str(added.content) if added is not None else decode_continuation(tokenizer, before, [token_id])
