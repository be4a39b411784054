"""A tiny base, adapters on it that say different things, and an engine over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.config import LoraConfig
from rlhf_ray.models.adapters import adapter_config, adapter_tensors, save_adapter, wrap
from rlhf_ray.models.backbone import Backbone, load_backbone


def load_tiny(folder: Path) -> Backbone:
    return load_backbone(
        path=str(folder),
        revision=None,
        dtype="float32",
        attn_implementation="auto",
        load_in_8bit=False,
        load_in_4bit=False,
        cpu_offload=False,
        device=torch.device("cpu"),
    )


@pytest.fixture(scope="session")
def base_dir(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama()


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory, base_dir: Path) -> Callable[..., Path]:
    """adapters(seed, head=False) -> plain PEFT folder of a random adapter; different seeds say different things."""
    root, made = tmp_path_factory.mktemp("adapters"), dict[str, Path]()

    def make(seed: int, head: bool = False, r: int = 4) -> Path:
        folder = root / f"{'reward' if head else 'policy'}_{seed}_{r}"
        if folder.name not in made:
            backbone = load_tiny(base_dir)
            model = wrap(backbone.model, LoraConfig(r=r, lora_alpha=2.0 * r), "ad", seed=seed)
            generator = torch.Generator().manual_seed(seed)
            tensors = {
                k: torch.randn(t.shape, generator=generator) * 0.3 if "lora_B" in k else t
                for k, t in adapter_tensors(model, "ad").items()
            }
            weight = torch.randn(1, backbone.hidden_size, generator=generator) if head else None
            kind: Any = "SEQ_CLS" if head else "CAUSAL_LM"
            save_adapter(folder, tensors, adapter_config(model, "ad"), kind, weight, str(base_dir))
            made[folder.name] = folder
        return made[folder.name]

    return make


@pytest.fixture
def backbone(base_dir: Path) -> Iterator[Backbone]:
    yield load_tiny(base_dir)
