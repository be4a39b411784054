"""Shared by the tests of `rlhf_ray.models`: loading with the usual settings, adapters that do something, outputs to compare."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf_ray.config import LoraConfig
from rlhf_ray.models.adapters import adapter_config, adapter_parameters, adapter_tensors, save_adapter, wrap
from rlhf_ray.models.backbone import Backbone, load_backbone, load_classifier, trunk

SETTINGS: dict[str, Any] = {
    "revision": None,
    "dtype": "auto",
    "attn_implementation": "auto",
    "load_in_8bit": False,
    "load_in_4bit": False,
    "cpu_offload": False,
    "device": "cpu",
}
IDS = torch.tensor([[5, 90, 17, 200, 33, 8], [7, 7, 130, 64, 250, 12]])


@pytest.fixture(scope="session")
def load() -> Callable[..., Backbone]:
    """load(folder, **fields): load_backbone with the fields of a job's defaults."""
    return lambda path, **fields: load_backbone(path=str(path), **{**SETTINGS, **fields})


@pytest.fixture(scope="session")
def load_reward() -> Callable[..., Backbone]:
    return lambda path, **fields: load_classifier(str(path), **{**SETTINGS, **fields})


@pytest.fixture(scope="session")
def train() -> Callable[..., None]:
    """train(peft_model, name, seed): give the adapter random A and B, as if it had been trained."""

    def randomise(peft_model: nn.Module, name: str, seed: int = 7, std: float = 0.05) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in adapter_parameters(peft_model, name).values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)

    return randomise


@pytest.fixture(scope="session")
def save_trained(load: Callable[..., Backbone], train: Callable[..., None]) -> Callable[..., str]:
    """save_trained(base, folder, head=None, **lora): write a trained-looking adapter on `base`; returns its sha256."""

    def save(base: Path, folder: Path, head: Tensor | None = None, seed: int = 7, **lora: Any) -> str:
        model = wrap(load(base).model, LoraConfig(**{"r": 4, **lora}), "policy", seed=1)
        train(model, "policy", seed)
        kind = "CAUSAL_LM" if head is None else "SEQ_CLS"
        tensors, config = adapter_tensors(model, "policy"), adapter_config(model, "policy")
        return save_adapter(folder, tensors, config, kind, head, str(base))

    return save


@torch.no_grad()
def hidden(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    return trunk(model)(input_ids=ids, use_cache=False).last_hidden_state


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits
