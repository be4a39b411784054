"""Heads on the trunk's hidden states: the scalar one of reward and value models, and the language model's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rlhf_ray.errors import ArtifactError


class ScalarHead(nn.Linear):
    """h [..., D] -> w . h [...], in float32 whatever the trunk's precision. `weight` is [1, D].

    Zero at the start (a value model that knows nothing yet says 0 everywhere), or a copy of `weight`."""

    def __init__(self, hidden_size: int, weight: Tensor | None = None) -> None:
        super().__init__(hidden_size, 1, bias=False, dtype=torch.float32)
        if weight is not None and tuple(weight.shape) != (1, hidden_size):
            raise ArtifactError.at("head", "wrong shape", f"(1, {hidden_size})", str(tuple(weight.shape)))
        with torch.no_grad():
            self.weight.zero_() if weight is None else self.weight.copy_(weight)

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.float()).squeeze(-1)


class LogitsHead(nn.Module):
    """h [..., D] -> logits [..., V] of architectures that rescale or cap what their output layer says.

    logits = cap * tanh(scale * (W h) / cap): Gemma caps, Cohere and Granite scale. `out_features` is V."""

    def __init__(self, output_layer: nn.Module, scale: float, cap: float | None) -> None:
        super().__init__()
        self.output_layer, self.scale, self.cap = output_layer, scale, cap
        self.out_features = int(getattr(output_layer, "out_features", 0))

    def forward(self, hidden: Tensor) -> Tensor:
        logits = self.output_layer(hidden) * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def logits_head(model: nn.Module) -> nn.Module:
    """The language-model head of `model`: its output layer, wrapped where its config says that logits are scaled or capped."""
    layer = model.get_output_embeddings()  # type: ignore[operator]
    if layer is None:
        raise ArtifactError.at(type(model).__name__, "has no output layer", "a causal language model")
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    cap = getattr(config, "final_logit_softcapping", None)
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    divisor = float(getattr(config, "logits_scaling", None) or 1.0)
    if cap is None and scale == divisor:
        return layer
    return LogitsHead(layer, scale / divisor, cap)


@torch.no_grad()
def check_logits_head(model: nn.Module, trunk: nn.Module, head: nn.Module) -> None:
    """ArtifactError unless `head` on the trunk's hidden states gives the model's own logits: log-probabilities are taken so."""
    ids = torch.arange(4, device=next(model.parameters()).device)[None]
    whole = model(input_ids=ids, use_cache=False).logits.float()
    parts = head(trunk(input_ids=ids, use_cache=False).last_hidden_state).float()
    worst = float((whole - parts).abs().max())
    if not worst <= 1e-3 * max(float(whole.abs().max()), 1.0):
        raise ArtifactError.at(
            type(model).__name__,
            "its logits are not its output layer on its last hidden state, and how they differ is not known here",
            "a difference below 0.1 %",
            f"{worst:.3g}",
        )
