"""Architectures beside the plain dense decoder, as tiny random models: experts, latent attention, other heads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_ray.config import LoraConfig
from rlhf_ray.errors import ArtifactError, ConfigError
from rlhf_ray.models.adapter_files import read_adapter, save_adapter
from rlhf_ray.models.adapter_targets import resolve_targets
from rlhf_ray.models.adapters import adapter_config, adapter_parameters, adapter_tensors, wrap
from rlhf_ray.models.backbone import trunk
from rlhf_ray.models.coverage import adapter_notes

from .conftest import logits

COMMON: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
ROUTED = {
    **EXPERTS,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**ROUTED, **LATENT},
    "deepseek_v3": {**ROUTED, **LATENT},
    "glm4_moe": ROUTED,
    "glm4_moe_lite": {**ROUTED, **LATENT},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_intermediate_size": 16,
    },
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "num_shared_expert": 1},
    "exaone_moe": {
        **EXPERTS,
        "num_experts": 4,
        "num_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "solar_open": ROUTED,
    "afmoe": {**EXPERTS, "num_experts": 4, "num_local_experts": 4, "num_shared_experts": 1, "num_dense_layers": 1},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 48},
    "qwen3_moe": {**EXPERTS, "num_experts": 4},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8},
}


def tiny(family: str, **changes: Any) -> nn.Module:
    """A random model whose logits are far from uniform."""
    values = {**COMMON, **FAMILIES.get(family, {}), **changes}
    if "kv_lora_rank" in values:
        del values["head_dim"]
    known = AutoConfig.for_model(family)
    config = AutoConfig.for_model(family, **{k: v for k, v in values.items() if hasattr(known, k)})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


class TestAllLinear:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_an_adapter_is_saved_and_read_back(self, family: str, train: Callable[..., None], tmp_path: Path) -> None:
        """Where experts stand beside dense layers, PEFT used to adapt their stacked parameters instead of the layers named."""
        model = wrap(tiny(family), LoraConfig(r=4), "policy", seed=1)
        train(model, "policy")
        assert all(4 in p.shape for p in adapter_parameters(model, "policy").values())
        saved = adapter_tensors(model, "policy"), adapter_config(model, "policy")
        save_adapter(tmp_path / "adapter", *saved, "CAUSAL_LM", None, "base")
        again = wrap(tiny(family), read_adapter(tmp_path / "adapter"), "policy")
        assert torch.equal(logits(again), logits(model))
        with torch.no_grad():
            assert (logits(model) - logits(tiny(family))).abs().max() > 1e-3

    def test_names_that_peft_refuses(self, tmp_path: Path) -> None:
        for family, name in (("glm4_moe", "gate_proj"), ("falcon_h1", "out_proj")):
            with pytest.raises(ConfigError, match=rf"{name}: PEFT .* {family}.*all-linear, or some of .*q_proj"):
                resolve_targets(tiny(family), ("q_proj", name))
        model = wrap(tiny("qwen3"), LoraConfig(r=4, target_modules=("q_proj", "gate_proj")), "policy", seed=1)
        save_adapter(
            tmp_path / "a", adapter_tensors(model, "policy"), adapter_config(model, "policy"), "CAUSAL_LM", None, "base"
        )
        with pytest.raises(ArtifactError, match=r"target gate_proj: PEFT takes .*merge it into its base with PEFT"):
            wrap(tiny("glm4_moe"), read_adapter(tmp_path / "a"), "policy")

    def test_what_it_leaves_out_is_told_with_its_share(self) -> None:
        """hidden 32, 4 heads of 8, 2 of keys, 4 experts of 16, 2 layers. A layer has q 32 x 32, k and v 16 x 32, o 32 x 32:
        3,072 adapted; experts 4 x (32 x 32 + 32 x 16) = 6,144 and router 4 x 32 = 128 not. Adapted: 3,072 / 9,344 = 33 %."""
        model = wrap(tiny("qwen3_moe"), LoraConfig(r=4), "policy", seed=1)
        (line,) = adapter_notes(trunk(model), "policy")
        assert line.startswith("all-linear adapts 33% of the decoder's weights, and not mlp.experts.gate_up_proj (44%)")
        assert "mlp.experts.down_proj (22%), mlp.gate (1%)" in line
        assert adapter_notes(trunk(wrap(tiny("qwen3"), LoraConfig(r=4), "policy")), "policy") == []
