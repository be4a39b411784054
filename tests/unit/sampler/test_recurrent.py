"""Models with states beside or instead of keys and values: what is sampled is what a plain forward pass says, padding changes
nothing, rows keep their states when they move, adapters share a batch."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_ray.batches import Sequences
from rlhf_ray.errors import ArtifactError, ConfigError
from rlhf_ray.models.adapters import lora_layers
from rlhf_ray.models.backbone import trunk
from rlhf_ray.models.forward import response_states
from rlhf_ray.models.merge import merge_run
from rlhf_ray.models.recurrent import hidden_states, one_recurrence
from rlhf_ray.sampler import probe
from rlhf_ray.sampler.engine import Sampler
from rlhf_ray.sampler.requests import DecodeRequest

PAD, VOCABULARY = 0, 97
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
DELTA = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 32}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
CONV = {"layer_types": ["conv", "full_attention", "conv"]}
ZAMBA = {
    "mamba_d_state": 8,
    "n_mamba_heads": 4,
    "attention_hidden_size": 128,
    "attention_head_dim": 32,
    "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    "num_hidden_layers": 4,
    "use_mamba_kernels": False,
}
FIRST = {
    "qwen3_5": ("qwen3_5_text", DELTA),
    "lfm2": ("lfm2", {**CONV, "conv_bias": True, "block_auto_adjust_ff_dim": False}),
    "granitemoehybrid": (
        "granitemoehybrid",
        {**MAMBA2, "num_local_experts": 4, "shared_intermediate_size": 32, "mamba_proj_bias": True}
        | {"layer_types": ["mamba", "attention", "mamba"]},
    ),
}
FAMILIES = FIRST | {
    "qwen3_5_moe": ("qwen3_5_moe_text", {**DELTA, **SHARED}),
    "qwen3_next": ("qwen3_next", {**DELTA, **SHARED}),
    "olmo_hybrid": ("olmo_hybrid", {**DELTA, "linear_num_value_heads": 2, "num_key_value_heads": 4}),
    "lfm2_moe": ("lfm2_moe", {**CONV, **EXPERTS, "num_dense_layers": 1}),
    "falcon_h1": ("falcon_h1", {**MAMBA2, "mamba_d_ssm": 128, "mamba_proj_bias": True, "lm_head_multiplier": 2.0}),
    "nemotron_h": (
        "nemotron_h",
        {
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 8,
            "head_dim": 16,
        }
        | {"moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32, "n_routed_experts": 4}
        | {"layers_block_type": ["mamba", "moe", "attention", "mlp"]},
    ),
    "jamba": ("jamba", {"attn_layer_period": 3, "attn_layer_offset": 1, "num_experts": 4, "mamba_d_state": 8}),
    "bamba": ("bamba", {**MAMBA2, "attn_layer_indices": [1], "attn_rotary_emb": 8}),
    "zamba": ("zamba", {**ZAMBA, "mamba_dt_rank": 4}),
    "zamba2": (
        "zamba2",
        {**ZAMBA, "mamba_headdim": 32, "hybrid_layer_ids": [1, 3], "chunk_size": 8, "adapter_rank": 4},
    ),
    "minimax": (
        "minimax",
        {"layer_types": DELTA["layer_types"], "head_dim": 16, "block_size": 8, "num_local_experts": 4},
    ),
    "mamba": ("mamba", {"state_size": 8, "time_step_rank": 4}),
    "mamba2": ("mamba2", {"state_size": 8, "num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 8}),
    "recurrent_gemma": (
        "recurrent_gemma",
        {
            "num_hidden_layers": 4,
            "block_types": ["recurrent", "recurrent", "attention"],
            "lru_width": 64,
            "head_dim": 16,
        }
        | {"attention_window_size": 8},
    ),
    "falcon_mamba": ("falcon_mamba", {"state_size": 8, "time_step_rank": 4, "use_bias": True}),
}
every_family = pytest.mark.parametrize("family", FAMILIES)
first_families = pytest.mark.parametrize("family", FIRST)


def config_of(family):
    model_type, fields = FAMILIES[family]
    return AutoConfig.for_model(model_type, **{**COMMON, **fields})


@pytest.fixture(scope="module")
def make():
    made = {}

    def build(family):
        if family not in made:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config_of(family), dtype=torch.float32).eval()
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1 and "norm" not in name and "A_log" not in name:
                    torch.nn.init.normal_(parameter, std=0.1)
                elif name.endswith("bias") and "dt" not in name:
                    torch.nn.init.normal_(parameter, std=0.3)  # what padding would put into a state
            one_recurrence(model)
            made[family] = model
        return made[family]

    return build


@every_family
def test_replies_are_those_of_a_plain_forward_pass(family, make, make_requests, assert_plain):
    """Unequal prompts, one of a single token; rows come, leave and move."""
    model = make(family)
    requests = make_requests(7, stop_ids=(5,), max_new_tokens=14)
    requests[0] = dataclasses.replace(requests[0], max_new_tokens=3)
    requests[2] = dataclasses.replace(requests[2], prompt_ids=(7,))
    requests[5:7] = [dataclasses.replace(r, greedy=True) for r in requests[5:7]]
    sampler = Sampler(model, PAD, max_rows=4)
    results = sampler.run(requests)
    assert_plain(model, requests, results)
    assert sampler.run(requests) == results


@every_family
def test_greedy_replies_are_those_of_generate(family, make, make_requests):
    model = make(family)
    requests = make_requests(5, seed=1, greedy=True, max_new_tokens=12, stop_ids=(2,))
    for request, result in zip(requests, Sampler(model, PAD, max_rows=4).run(requests)):
        ids = torch.tensor([request.prompt_ids])
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert alone[0, ids.shape[1] :].tolist() == list(result.token_ids)


@pytest.mark.parametrize("family", [*FIRST, "recurrent_gemma", "minimax", "mamba2"])
def test_rows_keep_their_states_in_groups_by_length(family, make, make_requests):
    """RG-LRU's blocks hold a state for one batch alone, and groups take turns on them."""
    model = make(family)
    requests = make_requests(9, seed=2, max_new_tokens=10, greedy=True)
    requests[1] = dataclasses.replace(requests[1], prompt_ids=requests[1].prompt_ids * 6)
    expected = Sampler(model, PAD, max_rows=4).run(requests)
    sampler = Sampler(model, PAD, max_rows=4, max_cached=len(requests[1].prompt_ids) + 100)
    ids = [sampler.submit(one) for one in requests]
    tokens, groups = {i: [] for i in ids}, 0
    while sampler.busy:
        for event in sampler.step():
            tokens[event.request_id].append(event.token_id)
        groups = max(groups, len(sampler._groups))
    assert [tuple(tokens[i]) for i in ids] == [one.token_ids for one in expected] and groups > 1


@every_family
def test_rows_do_not_see_their_padding(family, make):
    """As the learner pads: prompts on the left, replies on the right. Gradients too."""
    model = make(family)
    body = trunk(model)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, VOCABULARY, (3, 14), generator=generator)
    mask = torch.ones(3, 14, dtype=torch.bool)
    mask[0, :5], mask[1, 11:], mask[2, :2], mask[2, 9:] = False, False, False, False
    other = torch.where(mask, tokens, PAD)
    seq = Sequences(tokens, mask, mask[:, 7:])
    weight = body.get_input_embeddings().weight.requires_grad_()
    padded = hidden_states(body, tokens, mask)
    grad = torch.autograd.grad(padded[mask].square().sum(), weight)[0]
    torch.testing.assert_close(hidden_states(body, other, mask)[mask], padded[mask], atol=1e-5, rtol=1e-5)
    cut = hidden_states(
        body, other, mask, length=11
    )  # the longest row: what all others have behind them is not computed
    torch.testing.assert_close(cut[mask], padded[mask], atol=1e-5, rtol=1e-5)
    alone = [body(input_ids=row[real][None]).last_hidden_state[0] for row, real in zip(tokens, mask)]
    torch.testing.assert_close(padded[mask], torch.cat(alone), atol=1e-4, rtol=1e-4)
    expected = torch.autograd.grad(torch.cat(alone).square().sum(), weight)[0]
    torch.testing.assert_close(grad, expected, atol=1e-3, rtol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(response_states(body, seq)[0], padded[0, 6:], atol=1e-5, rtol=1e-5)


@first_families
def test_rows_of_different_adapters_share_a_batch(family, make, make_requests, assert_plain):
    """Adapters on the linear layers of the recurrences too; rows without one among them."""
    model = make(family)
    names = ["one", "two", None]
    own = {name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in name}
    targets = sorted(n for n in own if not {"router", "block_sparse_moe", "gate"} & set(n.split(".")))
    peft_model = get_peft_model(model, LoraConfig(r=4, target_modules=targets), "one")
    peft_model.add_adapter("two", LoraConfig(r=2, lora_alpha=16, target_modules=targets))
    torch.manual_seed(1)
    adapted = [name for name, layer in lora_layers(peft_model)]
    assert any("full" not in name and ("linear_attn" in name or "conv" in name or "mamba" in name) for name in adapted)
    for _, layer in lora_layers(peft_model):
        for part in layer.lora_B.values():
            torch.nn.init.normal_(part.weight, std=0.3)
    try:
        requests = [
            dataclasses.replace(r, adapter=names[i % 3], max_new_tokens=8) for i, r in enumerate(make_requests(9))
        ]
        together = Sampler(peft_model, PAD, max_rows=5).run(requests)
        for kind in range(3):
            alone = Sampler(peft_model, PAD, max_rows=5).run(requests[kind::3])
            for mixed, own_batch in zip(together[kind::3], alone):
                assert mixed.token_ids == own_batch.token_ids
                torch.testing.assert_close(
                    torch.tensor(mixed.logprobs), torch.tensor(own_batch.logprobs), atol=1e-4, rtol=0
                )
        first, second, base = (r.logprobs[0] for r in Sampler(peft_model, PAD).run(
            [dataclasses.replace(requests[0], adapter=name) for name in names]))  # fmt: skip
        assert len({round(p, 3) for p in (first, second, base)}) == 3
    finally:
        peft_model.unload()


@pytest.mark.parametrize("family", ["jamba", "falcon_mamba", "zamba2"])
def test_adapters_merge(family, tiny_hybrid, tiny_run, tmp_path):
    """Mamba reads dt_proj past an adapter, which a merge would have put into effect; Zamba's blocks share one weight, which cannot
    hold the updates of all places."""
    model_type, fields = FAMILIES[family]
    base = tiny_hybrid(model_type=model_type, **{k: v for k, v in fields.items() if k != "vocab_size"})
    run = tiny_run(tmp_path / "run", base)
    if family == "zamba2":
        with pytest.raises(
            ArtifactError, match=r"2 layers have one weight and an adapter each.*in_proj, linear, out_proj"
        ) as told:
            merge_run(run, tmp_path / "refused")
        assert "\n" not in str(told.value)
        run = tiny_run(tmp_path / "unshared", base, targets=("in_proj", "out_proj"))
    else:
        assert "dt_proj" not in (run / "adapter" / "adapter_config.json").read_text()
    assert (merge_run(run, tmp_path / "merged") / "model.safetensors").is_file()


def test_training_does_not_go_past_adapters(make, monkeypatch):
    """mamba_ssm's fused kernel takes the weight of out_proj as it is; a layer in training mode would call it."""
    model = make("granitemoehybrid")
    monkeypatch.setattr(
        sys.modules[type(model).__module__], "mamba2_split_conv1d_scan_combined", lambda *args, **kwargs: pytest.fail()
    )
    try:
        model.train()(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
        assert model.model.layers[1].training and not model.model.layers[0].mamba.training
    finally:
        model.eval()


@every_family
def test_the_probe_lets_through_what_works(family):
    probe.check_family(config_of(family))


@pytest.mark.parametrize("model_type", ["rwkv"])
def test_states_outside_a_cache_are_refused(model_type):
    """Before anything is loaded, and where a loaded model is to be decoded."""
    config = AutoConfig.for_model(model_type, **{**COMMON, "attention_window_size": 16, "lru_width": 64})
    with pytest.raises(
        ConfigError, match=rf"^model_name_or_path: models of type {model_type} cannot be used here"
    ) as told:
        probe.check_family(config)
    assert "inside its own modules" in str(told.value) and "\n" not in str(told.value)
    with pytest.raises(ConfigError, match="inside its own modules"):
        Sampler(probe.tiny_model(config), PAD).run([DecodeRequest((5, 6, 7), 0, 2, ())])


def test_the_probe_finds_a_decoding_step_that_is_not_the_forward_pass(make):
    """transformers clamps time steps where it reads a prompt and not where it decodes: 0.5 instead of Zamba's 0.001 shows it."""
    model = probe.tiny_model(config_of("zamba2"))
    assert max(probe.differences(model).values()) < probe.TOLERANCE / 10
    mixers = [module for module in model.modules() if hasattr(module, "time_step_limit")]
    for mixer in mixers:
        mixer.time_step_limit = (0.5, float("inf"))
    off = probe.differences(model)
    assert off["the sampler"] > 10 * probe.TOLERANCE > 100 * off["padded rows"]
    one_recurrence(model)
    assert max(probe.differences(model).values()) < probe.TOLERANCE / 10
