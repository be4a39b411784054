"""Heads on the trunk's hidden states: the scalar one of reward and value models, and the language model's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlhf_ray.errors import ArtifactError


class ScalarHead(nn.Linear):
    """h [..., D] -> w . h + offset [...], in float32 whatever the trunk's precision. `weight` is [1, D].

    Zero at the start (a value model that knows nothing yet says 0 everywhere), or a copy of `weight`.
    offset: the bias of a reward model by others; ours have none."""

    def __init__(self, hidden_size: int, weight: Tensor | None = None, offset: float = 0.0) -> None:
        super().__init__(hidden_size, 1, bias=False, dtype=torch.float32)
        self.offset = offset
        if weight is not None and tuple(weight.shape) != (1, hidden_size):
            raise ArtifactError.at("head", "wrong shape", f"(1, {hidden_size})", str(tuple(weight.shape)))
        with torch.no_grad():
            self.weight.zero_() if weight is None else self.weight.copy_(weight)

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.float()).squeeze(-1) + self.offset


def check_labels(count: int, where: str = "score") -> None:
    """ArtifactError for a classifier with more labels than two: nobody knows which of them is good."""
    if count not in (1, 2):
        raise ArtifactError.at(
            where,
            "has several labels",
            "one label, or two",
            str(count),
            "give it as a Python reward function, which says what its labels are worth",
        )


def two_labels_note(name: str) -> str:
    """What a run says of a reward model of two labels."""
    return f"{name} has two labels: a reward is the logit of label 1 minus that of label 0"


def score_layer(weight: Tensor, bias: Tensor | None, where: str = "score") -> nn.Linear:
    """The score head of a classifier as one linear layer D -> 1. weight: [labels, D].   bias: [labels].

    Two labels: the log-odds of label 1, which are the difference of their logits. ArtifactError, about `where`, for more."""
    check_labels(len(weight), where)
    if len(weight) == 2:
        weight, bias = weight[1:] - weight[:1], None if bias is None else bias[1:] - bias[:1]
    layer = nn.Linear(weight.shape[1], 1, bias=bias is not None, dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def scalar_head(score: nn.Linear) -> ScalarHead:
    """A copy of a classifier's score layer D -> 1."""
    offset = 0.0 if score.bias is None else float(score.bias)
    return ScalarHead(score.in_features, score.weight.detach().float().cpu(), offset)


class LogitsHead(nn.Module):
    """h [..., D] -> logits [..., V] of architectures that rescale or cap what their output layer says, or transform what it reads.

    logits = cap * tanh(scale * (W f(h)) / cap): Gemma caps; Cohere, Granite and Falcon-H1 scale; ModernBERT's decoder and BERT have
    a prediction head f, a dense layer with its activation and norm, for each token by itself. `out_features` is V."""

    def __init__(
        self, output_layer: nn.Module, scale: float, cap: float | None, transform: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.output_layer, self.scale, self.cap, self.transform = output_layer, scale, cap, transform
        self.out_features = int(getattr(output_layer, "out_features", 0))

    def forward(self, hidden: Tensor) -> Tensor:
        logits = self.output_layer(hidden if self.transform is None else self.transform(hidden)) * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


TOLERANCE = 1e-3
"""Largest difference between the head's logits and the model's own, relative to the largest logit: roundings of half precision."""


@torch.no_grad()
def logits_head(model: nn.Module, trunk: nn.Module) -> nn.Module:
    """The language-model head of `model`: its output layer, wrapped where the model's logits are that layer's scaled or capped, or
    those of a prediction head in front of it.

    Whether and by how much is measured on four tokens, since architectures name it differently, or not at all; where the config
    holds the very number, that is taken. ArtifactError if none of these explains the logits, since log-probabilities are taken from
    the head. On the meta device nothing can be measured: what the model has and the config could mean stands for its shape."""
    layer = model.get_output_embeddings()  # type: ignore[operator]
    if layer is None:
        raise ArtifactError.at(type(model).__name__, "has no output layer", "a causal language model")
    scales, caps = _numbers_of(model.config.get_text_config())  # type: ignore[union-attr,operator]
    before = _prediction_head(model, trunk, layer)
    device = next(model.parameters()).device
    if device.type == "meta":
        scale, cap = scales[0] if scales else 1.0, caps[0] if caps else None
        return layer if scale == 1.0 and cap is before is None else LogitsHead(layer, scale, cap, before)
    ids = torch.arange(4, device=device)[None]
    logits = model(input_ids=ids, use_cache=False).logits
    hidden = trunk(input_ids=ids, use_cache=False).last_hidden_state
    size = max(float(logits.float().abs().max()), 1.0)
    worst = float("inf")
    for transform in (None, before) if before is not None else (None,):
        plain = layer(hidden if transform is None else transform(hidden))
        for cap in (*caps, None):
            measured = _scale(logits.double(), plain.double(), cap)
            named = [s for s in (1.0, *scales) if (s == 1.0 and not caps) or abs(s - measured) <= 1e-2 * abs(measured)]
            for scale in (*named, measured):
                head = LogitsHead(layer, scale, cap, transform)
                found = float((head(hidden) - logits).float().abs().max())
                if found <= TOLERANCE * size:
                    return layer if scale == 1.0 and cap is transform is None else head
                worst = min(worst, found)
    raise ArtifactError.at(
        type(model).__name__,
        "its logits are not its output layer on its last hidden state, nor that scaled or capped",
        "a difference below 0.1 %",
        f"{worst:.3g}",
    )


def _prediction_head(model: nn.Module, trunk: nn.Module, layer: nn.Module) -> nn.Module | None:
    """What may stand between trunk and output layer: the one module beside the latter that makes of a state what it reads."""
    body = set(trunk.modules())
    parent = next(
        (part for part in model.modules() if part not in body and any(c is layer for c in part.children())), None
    )
    beside = [] if parent is None else [c for c in parent.children() if c is not layer and body.isdisjoint(c.modules())]
    found = [child for child in beside if next(child.parameters(), None) is not None]
    if len(found) != 1:
        return None
    like = next(found[0].parameters())
    width = int(model.config.get_text_config().hidden_size)  # type: ignore[union-attr,operator]
    try:
        made = found[0](like.new_zeros(1, 1, width))
    except Exception:  # a module of another kind: a tower, a projector, a head for images
        return None
    fits = isinstance(made, Tensor) and tuple(made.shape) == (1, 1, getattr(layer, "in_features", width))
    return found[0] if fits else None


def _scale(logits: Tensor, plain: Tensor, cap: float | None) -> float:
    """The factor between the output layer and the logits before their cap, by least squares."""
    if cap is not None:
        ratio = (logits / cap).clamp(-0.999, 0.999)
        logits = cap * torch.atanh(ratio)
        inside = ratio.abs() < 0.99
        logits, plain = logits[inside], plain[inside]
    square = float((plain * plain).sum())
    return float((logits * plain).sum()) / square if square else 1.0


def _numbers_of(config: Any) -> tuple[list[float], list[float]]:
    """Numbers of a config that could scale logits, themselves or as divisors, and that could cap them."""
    scales: list[float] = []
    caps: list[float] = []
    for name, value in config.to_dict().items():
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
            continue
        if "logit" in name and "cap" in name and "attn" not in name:
            caps.append(float(value))
        elif ("logit" in name or "lm_head" in name) and ("scal" in name or "multiplier" in name) and value != 1:
            scales += [float(value), 1.0 / float(value)]
    return scales, caps
