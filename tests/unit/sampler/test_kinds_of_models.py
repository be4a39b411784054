"""The engine is general: other head layouts, attention kinds, precisions and architectures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_ray.config import LoraConfig
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.adapters import adapter_parameters, add_fresh, wrap
from rlhf_ray.sampler.engine import Sampler

PAD = 0
COMMON = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 160,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
KINDS = {
    "sliding window": ("mistral", {"sliding_window": 7}),
    "full and sliding layers": (
        "gemma3_text",
        {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "qk norm": ("qwen3", {}),
    "learned positions": ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 160, "vocab_size": 97}),
    "alibi": ("bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 97, "initializer_range": 0.2}),
    "partial rotary": ("gpt_neox", {**{k: COMMON[k] for k in list(COMMON) if k != "head_dim"}, "rotary_pct": 0.5}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_architectures(kind, make_requests, assert_plain):
    model_type, fields = KINDS[kind]
    common = COMMON if "hidden_size" not in fields and "n_embd" not in fields else {}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**common, **fields})).eval()
    requests = make_requests(10, stop_ids=(5,))
    assert_plain(model, requests, Sampler(model, PAD, max_rows=4).run(requests))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 1)], ids=["one key per query head", "one key head"])
def test_head_layouts_and_attention_implementations(make_llama, make_requests, assert_plain, heads, attention):
    model = make_llama(num_attention_heads=heads[0], num_key_value_heads=heads[1], attn_implementation=attention)
    assert model.config._attn_implementation == attention
    requests = make_requests(8)
    assert_plain(model, requests, Sampler(model, PAD, max_rows=3).run(requests))


def test_bfloat16(make_llama, make_requests, assert_plain):
    model = make_llama(initializer_range=0.05).bfloat16()
    requests = make_requests(8)
    sampler = Sampler(model, PAD, max_rows=3)
    results = sampler.run(requests)
    assert_plain(model, requests, results, atol=0.05)
    assert sampler.run(requests) == results


def test_models_with_other_state_are_refused():
    model = torch.nn.Module()
    model.config = AutoConfig.for_model("deepseek_v4")
    with pytest.raises(ConfigError, match="compressed_sparse_attention"):
        Sampler(model, PAD)
    with pytest.raises(ConfigError, match="encoder-decoder"):
        model.config = AutoConfig.for_model("t5", vocab_size=97)
        Sampler(model, PAD)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cuda(make_llama, make_requests, plain_logprobs, dtype):
    model = make_llama(initializer_range=0.05).to("cuda", getattr(torch, dtype))
    requests = make_requests(16)
    sampler = Sampler(model, PAD, max_rows=5)
    results = sampler.run(requests)
    assert sampler.run(requests) == results
    with torch.no_grad():
        for request, result in zip(requests, results):
            ids = torch.tensor([request.prompt_ids + result.token_ids], device="cuda")
            every = model(ids).logits[0, len(request.prompt_ids) - 1 : -1].float().log_softmax(-1).cpu()
            taken = every.gather(1, torch.tensor(result.token_ids)[:, None])[:, 0]
            atol = 1e-4 if dtype == "float32" else 0.05
            torch.testing.assert_close(torch.tensor(result.logprobs), taken, atol=atol, rtol=0)


LATENT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "initializer_range": 0.2,
}
MIXED = {
    "rows and tokens as one dimension": (
        "opt",
        {"hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2},
    ),
    "latent attention, shared experts": ("deepseek_v3", LATENT),
    "a dimension of heads": ("axk1", LATENT),
}


@pytest.mark.parametrize("kind", MIXED)
@pytest.mark.parametrize("rows", [2, 12], ids=["stacked factors", "factors of each row"])
def test_mixed_adapters_say_what_each_says_alone(kind, rows, make_requests):
    model_type, fields = MIXED[kind]
    common = {"vocab_size": 97, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 160}
    config = AutoConfig.for_model(
        model_type, **{**common, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **fields}
    )
    torch.manual_seed(0)
    model = wrap(AutoModelForCausalLM.from_config(config).eval(), LoraConfig(r=2), "ad_0", seed=0)
    for number in range(1, 5):
        add_fresh(model, f"ad_{number}", LoraConfig(r=2 + number), seed=number)
    for number in range(5):
        draw = torch.Generator().manual_seed(number)
        for parameter in adapter_parameters(model, f"ad_{number}").values():
            parameter.data = torch.randn(parameter.shape, generator=draw) * 0.2
    names = [None, "ad_0", "ad_1", "ad_2", "ad_3", "ad_4"]
    made = make_requests(rows, max_new_tokens=8, greedy=True)
    requests = [replace(r, adapter=names[i % len(names)]) for i, r in enumerate(made)]
    sampler = Sampler(model, PAD, max_rows=rows)
    alone = [sampler.run([request])[0].token_ids for request in requests]
    assert [result.token_ids for result in sampler.run(requests)] == alone
    assert len(set(alone)) > rows / 2
