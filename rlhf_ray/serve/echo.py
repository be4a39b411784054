"""What /v1/completions tells of every token of prompt and reply (`echo`, `logprobs`): text, log-probability, the likeliest others.

An evaluation harness scores given continuations so. The decoder reports sampled tokens alone, so this is a forward pass of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel

from rlhf_ray.data.continuation import decode_continuation
from rlhf_ray.maths.logprobs import token_logprobs
from rlhf_ray.models.adapters import use_adapter
from rlhf_ray.models.backbone import Backbone, trunk
from rlhf_ray.models.forward import LOGITS_AT_ONCE
from rlhf_ray.serve.response_text import ResponseText

ListedToken = list[Any]
"""[text, nats or None of the first, {text: nats} of the likeliest tokens there or None]"""


@torch.no_grad()
def token_table(
    backbone: Backbone, model: PeftModel, adapter: str | None, ids: Sequence[int], temperature: float, top: int
) -> tuple[list[float], list[list[tuple[int, float]]]]:
    """log p of ids[1:], each after all before it, under `adapter`; and the `top` likeliest (id, log p) at each of these places."""
    tokens = torch.tensor([list(ids)], device=backbone.device)
    with use_adapter(model, adapter):
        states = trunk(backbone.model)(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False
        ).last_hidden_state[0, :-1]
    head: Any = backbone.lm_head
    logprobs: list[float] = []
    likeliest: list[list[tuple[int, float]]] = []
    size = max(LOGITS_AT_ONCE // int(getattr(head, "out_features", None) or 32_000), 1)
    for part, targets in zip(states.split(size), tokens[0, 1:].split(size)):
        logits = head(part)
        logprobs += token_logprobs(logits, targets, temperature).tolist()
        best = (logits.float() / temperature).log_softmax(-1).topk(top)
        likeliest += [list(zip(i, p)) for i, p in zip(best.indices.tolist(), best.values.tolist())]
    return logprobs, likeliest


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
            others.setdefault(_text(tokenizer, ids[:i], other), value)
        found.append([texts[i], logprob, others or None])
    return found


def _text(tokenizer: Any, before: Sequence[int], token_id: int) -> str:
    added = tokenizer.added_tokens_decoder.get(token_id)
    return str(added.content) if added is not None else decode_continuation(tokenizer, before, [token_id])
