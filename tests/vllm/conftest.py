"""Tests of vLLM as the decode engine, on vLLM's CPU build: `make test-vllm`. Skipped where vLLM is not installed.

vLLM's attention on a CPU needs a head dimension of 32, 64, 80, 96, 112, 128, 160, 192, 224, 256 or 512; the tiny models have 32."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_ray.config import LoraConfig, PPOConfig
from rlhf_ray.models.adapters import adapter_config, adapter_tensors, load_adapter_tensors, wrap
from rlhf_ray.sampler.engine import Sampler
from rlhf_ray.sampler.requests import DecodeRequest
from rlhf_ray.sampler.vllm_engine import VLLMEngine, VLLMOptions
from tests.small_ppo import small_ppo, write_prompts, write_reward

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("vllm") is not None:
        return
    for item in items:
        if HERE in Path(item.path).parents:
            item.add_marker(pytest.mark.skip(reason="vLLM is not installed here: make test-vllm"))


def build_requests(count: int, seed: int = 0, vocabulary: int = 260, **fields: Any) -> list[DecodeRequest]:
    """Prompts of 1 to 24 tokens, replies of up to 1 to 40, unless `fields` say otherwise."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    made = []
    for _ in range(count):
        prompt = tuple(draw(3, vocabulary) for _ in range(draw(1, 25)))
        values: dict[str, Any] = {"prompt_ids": prompt, "max_new_tokens": draw(1, 41), "row_seed": draw(0, 2**62)}
        made.append(DecodeRequest(**{"stop_ids": (), **values, **fields}))
    return made


class Pair:
    """Both engines on one base, with adapter "policy" on each."""

    def __init__(self, folder: Path, lora: LoraConfig, longest: int = 128, rows: int = 16) -> None:
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.model = wrap(base, lora, "policy", seed=0).eval()
        self.config = adapter_config(self.model, "policy")
        self.shapes = {key: tensor.shape for key, tensor in adapter_tensors(self.model, "policy").items()}
        self.builtin = Sampler(self.model, 0, max_rows=rows)
        self.vllm = VLLMEngine(
            VLLMOptions(str(folder), "float32", torch.device("cpu"), longest, rows, max_rank=8, kv_cache_bytes=2**26)
        )

    def draw(self, seed: int, scale: float = 0.3) -> dict[str, Tensor]:
        noise = torch.Generator().manual_seed(seed)
        return {key: torch.randn(shape, generator=noise) * scale for key, shape in self.shapes.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Into both."""
        load_adapter_tensors(self.model, "policy", tensors)
        self.vllm.load_adapter("policy", self.config, tensors)


@pytest.fixture(scope="session")
def pair(tiny_llama: Callable[..., Path]) -> Pair:
    return Pair(tiny_llama(), LoraConfig(r=4, lora_alpha=8))


@pytest.fixture
def vllm_job(tmp_path: Path, tiny_llama: Callable[..., Path]) -> Callable[..., PPOConfig]:
    """vllm_job("name", field=value, ...) -> a job of 3 steps of 16 replies of up to 8 tokens, in this process."""
    prompts, reward = write_prompts(tmp_path), write_reward(tmp_path)

    def make(name: str, **changes: Any) -> PPOConfig:
        fields = small_ppo(tmp_path, name, tiny_llama(), prompts, reward)
        fields["rollout"] = {"engine": "vllm", "kv_cache_gb": 0.0625}
        return PPOConfig(**{**fields, **changes})

    return make
