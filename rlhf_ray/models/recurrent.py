"""Layers that carry a state from token to token: linear attention, gated delta nets, Mamba, short convolutions.

Attention masks padding away. A state has been through everything that came before, so padding on the left enters it, unless the
layer takes a mask and every bias on the way to the state is 0: some do, some do not. Padding on the right comes after everything
that matters, in recurrences as in causal attention. So models with such layers get their rows right padded, and no mask; so do all
others, since what is not masked is faster (runs begun under defaults_version 1 and 2 are finished with the left padding they had).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlhf_ray.errors import ConfigError
from rlhf_ray.maths.masks import position_ids

ATTENTION = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Layers with keys and values alone, by transformers' names (configuration_utils.ALLOWED_ATTN_LAYER_TYPES)."""
STATE = frozenset({"linear_attention", "conv"})
"""With a state alone."""
BOTH = frozenset({"hybrid", "hybrid_sliding"})
JITTER = ("jitter_noise", "input_jitter_noise", "moe_jitter_eps")
"""Attributes of modules whose passes in training are random."""
NEITHER = frozenset({"moe", "mlp", "dummy"})


def layer_types(config: Any) -> tuple[str, ...]:
    """The kind of every layer of a transformers config; empty if it does not say, as most models of attention alone.

    Raises ConfigError for an encoder-decoder, and for kinds of layers that nothing here knows."""
    text = config.get_text_config()
    found = tuple(getattr(text, "layer_types", None) or ())
    strange = set(found) - ATTENTION - STATE - BOTH - NEITHER
    if strange or config.is_encoder_decoder:
        got = ", ".join(sorted(strange)) or "an encoder-decoder"
        expected = "a causal model of attention or recurrent layers"
        raise ConfigError.at(f"model type {config.model_type}", "cannot be decoded here", expected, got)
    return found


def is_recurrent(config: Any) -> bool:
    """Whether any layer of a transformers config keeps a state."""
    return bool(set(getattr(config.get_text_config(), "layer_types", None) or ()) & (STATE | BOTH))


def hidden_states(
    trunk: Any, tokens: Tensor, mask: Tensor, last: int | None = None, length: int | None = None
) -> Tensor:
    """The trunk's last hidden states [N, T, D] of rows padded on either side, or of their `last` columns.

    tokens: i64[N, T].   mask: bool[N, T], True on real tokens, which lie together.   Real tokens' states do not depend on padding;
    those of padding mean nothing.
    length: tokens of the longest row. The trunk then reads rows of that width, padded on the right where causal layers do not see
    it: no mask, so that the fastest kernels serve. None: rows as they lie, with a mask; layers with a state read them turned even
    so."""
    columns = slice(None if last is None else -last, None)
    if length is None and not is_recurrent(trunk.config):
        output = trunk(input_ids=tokens, attention_mask=mask.long(), position_ids=position_ids(mask), use_cache=False)
        return output.last_hidden_state[:, columns]
    rows, width = tokens.shape
    length = width if length is None else length
    every, begin = torch.arange(width, device=tokens.device), mask.long().argmax(dim=1, keepdim=True)
    states = trunk(input_ids=turned(tokens, begin)[:, :length], use_cache=False).last_hidden_state
    back = ((every - begin) % width)[:, columns].clamp_max(length - 1)
    flat = back + length * torch.arange(rows, device=tokens.device)[:, None]
    return states.flatten(0, 1).index_select(0, flat.flatten()).unflatten(0, flat.shape)


def turned(values: Tensor, begin: Tensor) -> Tensor:
    """Rows [N, T] turned to the left by `begin` i64[N, 1]; if that is each row's first real entry, all padding comes last."""
    width = values.shape[1]
    return values.gather(1, (torch.arange(width, device=values.device) + begin) % width)


def one_recurrence(model: nn.Module) -> None:
    """Make layers with a state compute the same where they are trained, where they read a prompt and where they decode.

    Mamba 2 mixers lose their smallest time step, where they have one: transformers keeps to it where it reads many tokens at once
    (Zamba 2 and Nemotron-H: 0.001) and not where it decodes one, nor do the kernels of mamba_ssm. And mixers always run as in
    evaluation: in training a fused kernel reads the weights of out_proj and x_proj, past any adapter on them. So do routers of
    experts with a jitter: in training they choose at random (Mixtral, DBRX, MiniMax; Phi-MoE always)."""
    module: Any
    for module in model.modules():
        low, high = getattr(module, "time_step_limit", (0.0, 0.0))
        if low > 0 and high == float("inf"):
            module.time_step_limit = (0.0, high)
        if any(hasattr(module, name) for name in ("A_log", *JITTER)):
            module.register_forward_pre_hook(_as_in_evaluation)


def _as_in_evaluation(module: nn.Module, args: Any) -> None:
    module.training = False


def is_read_past(name: str, model: nn.Module) -> bool:
    """Whether a linear layer's weight is read by its Mamba mixer itself, so that an adapter on it would do nothing: dt_proj."""
    parent, _, last = name.rpartition(".")
    return last == "dt_proj" and hasattr(model.get_submodule(parent), "A_log")
