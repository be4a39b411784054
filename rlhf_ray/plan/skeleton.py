"""Models without weights: the architecture that a config.json describes, on torch's meta device, in the precision of a job.

Parameter counts, shapes and code are those of transformers itself, whatever the architecture.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_ray.config import JobFields
from rlhf_ray.errors import ArtifactError, ConfigError
from rlhf_ray.models.backbone import Backbone, BaseIdentity, trunk
from rlhf_ray.models.context import context_length, encoder_context
from rlhf_ray.models.heads import ScalarHead, logits_head
from rlhf_ray.models.loading import (
    DTYPES,
    bits_of,
    causal_class,
    classifier_config,
    is_encoder,
    no_dropout,
    quiet,
)
from rlhf_ray.models.lora_compute import compute_adapters_in
from rlhf_ray.models.sources import CONFIG_ERRORS, one_line
from rlhf_ray.models.tokenizer import PadChoice
from rlhf_ray.plan.attention import fused
from rlhf_ray.plan.meta_tracker import Device

KEPT_WHOLE = ("lm_head", "embed_out", "score")
"""Linear layers that a quantised load leaves as they are (quantisation.py)."""

NF4_BLOCK = 64
"""Weights that share a scale of four bytes in 4 bits."""


def read_config(path: str, revision: str | None = None, where: str = "model_name_or_path") -> Any:
    """The transformers config of a folder or Hub id, from its config.json alone.

    ConfigError if there is none on this machine and none can be fetched; ArtifactError if transformers cannot read it."""
    from transformers import AutoConfig

    folder = Path(path).expanduser()
    file = folder / "config.json" if folder.is_dir() else _from_hub(path, revision, where)
    if not file.is_file():
        raise ConfigError.at(where, f"{path} has no config.json", "a folder that has one, weights or not")
    try:
        config = AutoConfig.from_pretrained(str(file.parent), trust_remote_code=False)
    except CONFIG_ERRORS as e:
        raise ArtifactError.at(str(file), f"cannot be read: {one_line(e)}") from e
    no_dropout(config)
    return config


def _from_hub(name: str, revision: str | None, where: str) -> Path:
    """config.json and nothing else: from the cache, or the Hub."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, "config.json", revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as e:
        raise ConfigError.at(
            where,
            f"{name}: no config.json on this machine or on the Hub",
            "a folder with a config.json (weights are not needed), or a Hub id that can be reached",
            fix=f"set {where}=FOLDER; a gated repository needs: hf auth login",
        ) from e


def precision(job: JobFields, config: Any, device: Device) -> torch.dtype:
    """The number format of a base's weights, as models/loading.py decides it; a checkpoint that does not say is float32."""
    if job.dtype != "auto":
        return DTYPES[job.dtype]
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    if device == "cpu":
        return torch.float32
    return torch.bfloat16 if stored is torch.float16 else stored


def skeleton(job: JobFields, path: str, config: Any, device: Device, classifier: bool = False) -> Backbone:
    """The base at `path` as a job on `device` would load it; its model is on the meta device. Make it inside a
    `MetaMemoryTracker`."""
    from transformers import AutoModelForSequenceClassification

    auto: Any = AutoModelForSequenceClassification if classifier else causal_class(config)
    config = copy.deepcopy(config)  # from_config writes the precision into it
    encoder = classifier and is_encoder(config)
    if classifier and not encoder:
        config = classifier_config(config, path)
    dtype, bits = precision(job, config, device), bits_of(job.load_in_8bit, job.load_in_4bit)
    bits = None if encoder else bits
    kernel = "eager" if job.attn_implementation == "eager" else "sdpa"
    with torch.device("meta"), quiet():
        try:
            model = auto.from_config(config, dtype=dtype, attn_implementation=kernel)
        except ValueError:  # it has no other attention
            kernel = "eager"
            model = auto.from_config(config, dtype=dtype, attn_implementation=kernel)
    if kernel == "sdpa":
        fused(model, device)
    if bits is not None:
        quantise(model, bits)
    if not classifier:
        compute_adapters_in(model, job.lora_compute_dtype, dtype)
    model.requires_grad_(False)
    model.eval()
    nothing: Any = None
    return Backbone(
        model=model,
        tokenizer=nothing,
        pad=PadChoice(0, "", ""),
        eos_ids=(),
        device=torch.device("meta"),
        dtype=dtype,
        identity=BaseIdentity(path, None, "", "", "", f"{bits}bit" if bits else str(dtype).removeprefix("torch.")),
        context_length=encoder_context(model) if encoder else context_length(model.config.get_text_config()),
        attn_implementation=kernel,
        head=None if classifier else logits_head(model, trunk(model)),
        is_encoder=encoder,
    )


class Head(ScalarHead):
    """A scalar head whose weights are on the meta device, which has no autocast to switch off."""

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.Linear.forward(self, hidden.float()).squeeze(-1)


def quantise(model: nn.Module, bits: int) -> None:
    """Put stand-ins in the place of the linear layers that bitsandbytes would replace."""
    for name, module in list(model.named_modules()):
        last = name.rpartition(".")[2]
        if type(module) is nn.Linear and last not in KEPT_WHOLE:
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, last, QuantisedLinear(module, bits))


class QuantisedLinear(nn.Linear):
    """Memory of bitsandbytes' linear layers: packed weights with their scales, whole weights for the length of a product.

    4 bits: n / 2 bytes and a float32 scale for every 64 weights. 8 bits: n bytes and a float32 scale for every row."""

    def __init__(self, layer: nn.Linear, bits: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bits = layer.in_features, layer.out_features, bits
        n = layer.in_features * layer.out_features
        scales = -(-n // NF4_BLOCK) if bits == 4 else layer.out_features
        packed = torch.empty(-(-n // 2) if bits == 4 else n, dtype=torch.uint8, device="meta")
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("scales", torch.empty(scales, dtype=torch.float32, device="meta"))
        self.bias = layer.bias

    def forward(self, input: Tensor) -> Tensor:
        out = _Product.apply(input, self.out_features, self.bits)
        return out if self.bias is None else out + self.bias


class _Product(torch.autograd.Function):
    """x W, W whole in half precision only meanwhile, forward and backward. 8 bits: x is kept for the backward pass, and quantised
    through float16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, width: int, bits: int) -> Tensor:
        ctx.shape, ctx.width = x.shape, width
        if bits == 8:
            ctx.kept = x
            half = x.to(torch.float16)
            _ = half.new_empty(half.shape, dtype=torch.int8)
            return x.new_empty(*x.shape[:-1], width)
        half = x.to(torch.bfloat16)
        _ = half.new_empty(width, x.shape[-1])
        return half.new_empty(*x.shape[:-1], width).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        _ = grad.new_empty(ctx.width, ctx.shape[-1], dtype=torch.bfloat16)
        return grad.new_empty(ctx.shape), None, None


def size_of(module: nn.Module) -> tuple[int, int]:
    """(weights, bytes) of a module; weights of a quantised layer are counted as what they stand for."""
    weights = 0
    for part in module.modules():
        if isinstance(part, QuantisedLinear):
            weights += part.in_features * part.out_features - part.weight.numel()
    seen = {id(p): p for p in module.parameters()}
    buffers = {id(b): b for b in module.buffers()}
    weights += sum(p.numel() for p in seen.values())
    return weights, sum(t.numel() * t.element_size() for t in (*seen.values(), *buffers.values()))
