"""Adapters of a pool are what PEFT would make of the same files: on all layers or some, with rsLoRA, on Conv1D, in bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rlhf_ray.config import LoraConfig
from rlhf_ray.errors import ArtifactError, InvariantError
from rlhf_ray.models import adapter_targets
from rlhf_ray.models.adapter_files import AdapterFiles, adapter_sha256
from rlhf_ray.models.adapter_pool import AdapterPool
from rlhf_ray.models.adapters import adapter_config, adapter_tensors, add_from_files, use_adapter, wrap


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=97, num_key_value_heads=2, **sizes)).eval()


@pytest.fixture
def files_of() -> Callable[..., AdapterFiles]:
    def make(base: nn.Module, seed: int = 1, **lora: Any) -> AdapterFiles:
        model = wrap(base, LoraConfig(**{"r": 4, "lora_alpha": 6.0, **lora}), "x", seed=seed)
        draw = torch.Generator().manual_seed(seed)
        tensors = {k: torch.randn(t.shape, generator=draw) * 0.3 for k, t in adapter_tensors(model, "x").items()}
        return AdapterFiles(adapter_config(model, "x"), tensors, None, adapter_sha256(tensors), "x")

    return make


CASES: dict[str, dict[str, Any]] = {
    "all layers": {},
    "some layers": {"target_modules": ("q_proj", "down_proj"), "r": 2},
    "one layer of a group": {"target_modules": ("model.layers.1.self_attn.k_proj",)},
    "rslora": {"use_rslora": True},
}


@pytest.mark.parametrize("case", [*CASES, "conv1d", "bfloat16"])
def test_a_forward_under_an_adapter_of_the_pool_is_pefts(files_of: Callable[..., AdapterFiles], case: str) -> None:
    make = gpt2 if case == "conv1d" else llama
    dtype = torch.bfloat16 if case == "bfloat16" else torch.float32
    files = files_of(make(), **CASES.get(case, {}))
    model = wrap(make().to(dtype), LoraConfig(r=1, lora_alpha=1.0), "placeholder", seed=0).eval()
    pool = AdapterPool(model)
    pool.add("ad", pool.pack(files))
    add_from_files(model, "peft", files, trainable=False)
    model.eval()
    ids = torch.randint(3, 90, (3, 7), generator=torch.Generator().manual_seed(0))
    found = {}
    with torch.no_grad():
        for name in ("ad", "peft", None):
            with use_adapter(model, name):
                found[name] = model(input_ids=ids).logits
    atol = 0.05 if case == "bfloat16" else 1e-5
    torch.testing.assert_close(found["ad"], found["peft"], atol=atol, rtol=atol)
    assert (found["ad"] - found[None]).abs().max() > 0.02
    assert not any(module._forward_hooks for module in model.modules())


def test_what_does_not_fit_or_is_not_what_was_read_is_refused(files_of: Callable[..., AdapterFiles]) -> None:
    files, model = files_of(llama()), wrap(llama(), LoraConfig(r=1, lora_alpha=1.0), "placeholder", seed=0)
    pool = AdapterPool(model)
    key = next(iter(files.tensors))
    for tensors, what in (
        ({k: t for k, t in files.tensors.items() if k != key}, "lacks tensor"),
        ({**files.tensors, key: files.tensors[key].t().contiguous()}, "wrong shape"),
        ({**files.tensors, key: files.tensors[key] + 1}, "is not the one that was read"),
    ):
        with pytest.raises(ArtifactError, match=what):
            pool.pack(AdapterFiles(files.config, tensors, None, files.sha256, "x"))
    packed = pool.pack(files)
    pool.add("ad", packed)
    with pytest.raises(InvariantError, match="already"):
        pool.add("ad", packed)
    assert packed.nbytes == sum(t.numel() * 4 for t in files.tensors.values())
    pool.remove("ad")
    with pytest.raises(InvariantError, match="no such adapter"):
        use_adapter(model, "ad")


def test_peft_is_asked_once_which_layers_it_refuses(
    files_of: Callable[..., AdapterFiles], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was asked again with every adapter that a service loads, which took longer than reading it."""
    first, second = (files_of(llama(), seed=seed) for seed in (1, 2))
    pool = AdapterPool(wrap(llama(), LoraConfig(r=1, lora_alpha=1.0), "placeholder", seed=0))
    asked: list[str] = []
    ask = adapter_targets._why_refused

    def asking(base: Any, name: str) -> str | None:
        asked.append(name)
        return ask(base, name)

    monkeypatch.setattr(adapter_targets, "_why_refused", asking)
    pool.pack(first)
    pool.pack(second)
    assert len(asked) == len(set(asked))
