"""The forward passes of RLHF on one loaded base with named adapters: token log-probabilities, values and rewards.

All of them start from `response_states`: the hidden states that predict the reply and the one after its last token. Sequence
columns are P prompt columns and R reply columns (batches.py); state column t, 0 <= t <= R, is hidden column P - 1 + t, the
state BEFORE reply token t. Column n, with n the reply's length, is the state after its last token: there the reward head and
the bootstrap value read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_ray.batches import Sequences
from rlhf_ray.maths.logprobs import chunk_calls, chunked_token_logprobs
from rlhf_ray.maths.masks import zero_outside
from rlhf_ray.models.recurrent import hidden_states, turned
from rlhf_ray.models.zero3 import MaxOverRanks

LOGITS_AT_ONCE = 2**26
"""Logits alive at any time in a log-probability pass: 256 MB in float32, whatever the vocabulary."""


def response_states(trunk: nn.Module, seq: Sequences) -> Tensor:
    """Hidden states [M, R+1, D] of columns P-1 .. T-1, under whichever adapter is active."""
    return hidden_states(trunk, seq.tokens, seq.attention_mask, seq.response_width + 1, seq.length)


def response_logprobs(
    states: Tensor,
    head: Callable[[Tensor], Tensor],
    seq: Sequences,
    temperature: float,
    with_entropy: bool = False,
    max_over_ranks: MaxOverRanks = int,
) -> tuple[Tensor, Tensor | None]:
    """log-probabilities (and entropies, nats) of the reply's own tokens: f32[M, R], 0 outside the mask.

    states: [M, R+1, D] of `response_states`.   head: the language-model head, [N, D] -> [N, V], which sees the states of real reply
    tokens alone where `seq` knows them.   temperature: divides the logits.
    max_over_ranks: under ZeRO-3, how ranks with replies of different lengths come to call the head equally often.
    """
    tokens, mask, at = seq.tokens[:, -seq.response_width :], seq.response_mask, seq.reply_at
    wanted = states[:, :-1]
    if at is not None:
        wanted, tokens = wanted.flatten(0, 1).index_select(0, at)[None], tokens.flatten()[at][None]
    vocabulary = getattr(head, "out_features", None) or 32_000
    chunk = max(LOGITS_AT_ONCE // int(vocabulary), 1)
    calls = max_over_ranks(chunk_calls(tokens.numel(), chunk))
    logprobs, entropy = chunked_token_logprobs(wanted, head, tokens, temperature, chunk, with_entropy, calls)
    if at is not None:
        return _put_back(logprobs, at, mask), None if entropy is None else _put_back(entropy, at, mask)
    return zero_outside(logprobs, mask), None if entropy is None else zero_outside(entropy, mask)


def _put_back(values: Tensor, at: Tensor, mask: Tensor) -> Tensor:
    """values [1, K] at the True places of `mask`, 0 elsewhere."""
    return values.new_zeros(mask.numel()).index_copy(0, at, values[0]).view(mask.shape)


def response_values(states: Tensor, head: nn.Module, seq: Sequences) -> tuple[Tensor, Tensor]:
    """The value model: values f32[M, R] of the states before each reply token (0 outside the mask), and f32[M] after the last
    one."""
    every = head(states)
    values = zero_outside(every[:, :-1], seq.response_mask)
    return values, after_last_token(every, seq)


def after_last_token(every: Tensor, seq: Sequences) -> Tensor:
    """f32[M]: the entry of [M, R+1] state columns that has seen the whole reply. Where the reward model reads."""
    last = seq.response_mask.sum(dim=1, keepdim=True)
    return every.gather(1, last).squeeze(1)


def pair_scores(model: Any, seq: Sequences, limit: int, marks_second: bool) -> Tensor:
    """f32[M]: what an encoder says of prompt and reply, one pair of texts: its one logit, or of two labels the log-odds of label 1.

    seq: as the encoder's tokenizer writes a pair, what stands before the second text as the prompt (rewards/retokenised.py).
    limit: positions that the encoder has.   marks_second: tokens of the second text are of another kind."""
    mask = seq.attention_mask
    length = min(mask.shape[1] if seq.length is None else seq.length, limit)
    begin = mask.long().argmax(dim=1, keepdim=True)

    def right_padded(values: Tensor) -> Tensor:
        return turned(values, begin)[:, :length]

    inputs = {"input_ids": right_padded(seq.tokens), "attention_mask": right_padded(mask.long())}
    if marks_second:
        second = torch.zeros_like(seq.tokens)
        second[:, -seq.response_width :] = seq.response_mask.long()
        inputs["token_type_ids"] = right_padded(second)
    logits: Tensor = model(**inputs).logits.float()
    return logits[:, -1] - logits[:, 0] if logits.shape[1] == 2 else logits[:, 0]


def to_device(seq: Sequences, device: torch.device) -> Sequences:
    tokens, mask, reply = (t.to(device) for t in (seq.tokens, seq.attention_mask, seq.response_mask))
    reply_at = None if seq.reply_at is None else seq.reply_at.to(device)
    return Sequences(tokens, mask, reply, seq.length, reply_at, None if seq.packed is None else seq.packed.to(device))
