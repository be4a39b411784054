"""Architectures beside the plain dense decoder, as tiny random models: experts, latent attention, other heads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, Gemma3TextConfig

from rlhf_ray.config import LoraConfig
from rlhf_ray.errors import ArtifactError, ConfigError
from rlhf_ray.models.adapter_files import read_adapter, save_adapter
from rlhf_ray.models.adapter_targets import resolve_targets
from rlhf_ray.models.adapters import (
    adapter_config,
    adapter_parameters,
    adapter_tensors,
    add_fresh,
    add_from_files,
    copy_adapter,
    remove_adapter,
    use_adapter,
    wrap,
)
from rlhf_ray.models.backbone import trunk
from rlhf_ray.models.coverage import adapter_notes
from rlhf_ray.models.heads import LogitsHead, logits_head
from rlhf_ray.models.loading import causal_class, refuse_unreadable_merge
from rlhf_ray.models.merge import merge_run
from rlhf_ray.models.tokenizer import load_tokenizer, tokenizer_sha256
from rlhf_ray.sampler.engine import DecodeRequest, Sampler
from rlhf_ray.sampler.probe import differences, tiny_config, tiny_model

from .conftest import IDS, hidden, logits

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
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16, "sliding_window": 64},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8},
}


TEXT = {**{k: v for k, v in COMMON.items() if not k.endswith("_token_id")}, "pad_token_id": 0}
SIGHT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28}
WRAPPERS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {**TEXT, "model_type": "gemma3_text", "sliding_window": 64},
        "vision_config": {**SIGHT, "model_type": "siglip_vision_model", "patch_size": 14},
        "mm_tokens_per_image": 4,
    },
    "mistral3": {
        "text_config": {**TEXT, "model_type": "mistral"},
        "vision_config": {**SIGHT, "model_type": "pixtral", "patch_size": 14, "head_dim": 8},
    },
    "qwen3_vl": {
        "text_config": {
            **TEXT,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4},
        },
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "depth": 1,
            "num_heads": 4,
            "out_hidden_size": 32,
            "deepstack_visual_indexes": [0],
        },
    },
}


SLIDES = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 16, "global_head_dim": 16}
GEMMA_4 = {**TEXT, **SLIDES, "num_hidden_layers": 4, "vocab_size_per_layer_input": 300, "final_logit_softcapping": 30.0}
SHARED_KEYS = {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "hidden_size_per_layer_input": 0}
GEMMAS_4: dict[str, dict[str, Any]] = {
    "E2B": {"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2, "use_double_wide_mlp": True},
    "31B": {**SHARED_KEYS, "use_bidirectional_attention": "vision"},
    "26B-A4B": {
        **SHARED_KEYS,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
    },
}
"""What the sizes of Gemma 4 differ in."""
ALSO_SEES: dict[str, dict[str, Any]] = {
    **{
        f"gemma4 {size}": {
            "text_config": {**GEMMA_4, **more},
            "vision_config": {**SIGHT, "num_key_value_heads": 4, "head_dim": 8, "position_embedding_size": 64},
            "audio_config": {
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "output_proj_dims": 32,
            },
            "image_token_id": 255,
            "video_token_id": 254,
            "audio_token_id": 253,
        }
        for size, more in GEMMAS_4.items()
    },
    "llama4": {
        "text_config": {**TEXT, "num_local_experts": 4, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2},
        "vision_config": {**SIGHT, "intermediate_size": 64, "patch_size": 14}
        | dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 32),
        "image_token_index": 255,
    },
}
"""Whole models that see and hear, as their checkpoints have them."""


def tiny(family: str, **changes: Any) -> nn.Module:
    """A random model whose logits are far from uniform."""
    values = {**(WRAPPERS.get(family) or {**COMMON, **FAMILIES.get(family, {})}), **changes}
    if "kv_lora_rank" in values:
        del values["head_dim"]
    known = AutoConfig.for_model(family)
    config = AutoConfig.for_model(family, **{k: v for k, v in values.items() if hasattr(known, k)})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return causal_class(config).from_config(config).eval()


@pytest.fixture
def written(tiny_llama: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """written(family, **changes of its config): the folder of `tiny`, with a byte tokenizer."""

    def write(family: str, **changes: Any) -> Path:
        folder = tmp_path / family
        tiny(family, **changes).save_pretrained(folder)  # type: ignore[operator]
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny_llama() / file, folder)
        return folder

    return write


HEADS: dict[str, tuple[dict[str, Any], tuple[float, float | None]]] = {
    "falcon_h1": ({"lm_head_multiplier": 0.5}, (0.5, None)),
    "hyperclovax": ({"logits_scaling": 8.0}, (8.0, None)),
    "recurrent_gemma": ({"logits_soft_cap": 2.0, "attention_window_size": 64, "lru_width": 32}, (1.0, 2.0)),
    "minicpm3": ({**LATENT, "dim_model_base": 8}, (0.25, None)),
}


class TestHeads:
    @pytest.mark.parametrize("family", HEADS)
    def test_logits_that_are_scaled_or_capped(self, family: str, written: Callable[..., Path], load: Any) -> None:
        changes, (scale, cap) = HEADS[family]
        base = load(written(family, **changes))
        assert isinstance(base.lm_head, LogitsHead)
        assert (base.lm_head.scale, base.lm_head.cap) == (pytest.approx(scale, rel=1e-5), cap)
        with torch.no_grad():
            torch.testing.assert_close(base.lm_head(hidden(base.model)), logits(base.model), atol=1e-4, rtol=1e-4)

    def test_a_prediction_head_before_the_output_layer(
        self, written: Callable[..., Path], load: Any, save_trained: Callable[..., str], tmp_path: Path
    ) -> None:
        """ModernBERT's decoder: dense, activation and norm of each state. Its classifier holds no linear head."""
        folder = written("modernbert-decoder", global_attn_every_n_layers=2)
        base = load(folder)
        assert isinstance(base.lm_head, LogitsHead) and base.lm_head.out_features == COMMON["vocab_size"]
        with torch.no_grad():
            torch.testing.assert_close(base.lm_head(hidden(base.model)), logits(base.model), atol=1e-5, rtol=1e-5)
            bare = base.lm_head.output_layer(hidden(base.model))
            assert (bare - logits(base.model)).abs().max() > 0.1
        with torch.device("meta"):
            shape = AutoModelForCausalLM.from_config(base.model.config)
        assert logits_head(shape, trunk(shape)).transform is shape.lm_head
        save_trained(folder, tmp_path / "policy")
        assert merge_run(tmp_path / "policy").is_dir()
        save_trained(folder, tmp_path / "reward", head=torch.linspace(-1, 1, 32)[None])
        with pytest.raises(
            ArtifactError, match=r"no sequence-classification class for model type modernbert-decoder.*reward run"
        ):
            merge_run(tmp_path / "reward")

    def test_a_trunk_under_another_name(self, written: Callable[..., Path], load: Any) -> None:
        base = load(written("llama4_text"))
        assert trunk(base.model) is base.model.model
        names = {k.split(".lora")[0] for k in adapter_parameters(wrap(base.model, LoraConfig(r=2), "policy"), "policy")}
        assert all(name.startswith("base_model.model.model.layers.") for name in names)

    def test_a_head_narrower_than_the_layers(
        self, written: Callable[..., Path], load: Any, save_trained: Callable[..., str], tmp_path: Path
    ) -> None:
        """OPT-350M: layers of 32, states of 16 (word_embed_proj_dim). Reward heads and value heads read those."""
        folder = written("opt", ffn_dim=48, word_embed_proj_dim=16, init_std=0.1)
        base = load(folder)
        assert base.hidden_size == hidden(base.model).shape[-1] == 16
        save_trained(folder, tmp_path / "reward", head=torch.linspace(-1, 1, 16)[None])
        assert merge_run(tmp_path / "reward").is_dir()

    def test_a_reward_model_that_no_class_could_hold(
        self, written: Callable[..., Path], save_trained: Callable[..., str], tmp_path: Path
    ) -> None:
        save_trained(written("granite"), tmp_path / "reward", head=torch.linspace(-1, 1, 32)[None])
        with pytest.raises(ArtifactError, match=r"no sequence-classification class for model type granite.*reward run"):
            merge_run(tmp_path / "reward")


class TestWrappers:
    @pytest.mark.parametrize("family", WRAPPERS)
    def test_the_decoder_of_a_model_that_sees(
        self, family: str, written: Callable[..., Path], load: Any, save_trained: Callable[..., str], tmp_path: Path
    ) -> None:
        """It loads, all-linear and plain names adapt the text decoder alone, and it merges."""
        folder = written(family)
        base = load(folder)
        for targets in ("all-linear", ("q_proj", "v_proj")):
            model = wrap(load(folder).model, LoraConfig(r=2, target_modules=targets), "policy")
            keys = list(adapter_parameters(model, "policy"))
            assert keys and all("language_model.layers." in key for key in keys)
        with torch.no_grad():
            torch.testing.assert_close(base.lm_head(hidden(base.model)), logits(base.model), atol=1e-4, rtol=1e-4)
        requests = [DecodeRequest(p, 0, 6, (), greedy=True) for p in ((5, 9, 33, 17, 8), (7, 7), (44, 9, 3))]
        for request, result in zip(requests, Sampler(base.model, 0, max_rows=2).run(requests)):
            plain = logits(base.model, torch.tensor([request.prompt_ids + result.token_ids]))[0].argmax(-1).tolist()
            assert plain[len(request.prompt_ids) - 1 : -1] == list(result.token_ids)
        save_trained(folder, tmp_path / "policy")
        merged = load(merge_run(tmp_path / "policy"))
        assert (logits(merged.model) - logits(base.model)).abs().max() > 1e-3

    def test_a_wrapper_that_is_loaded_as_its_decoder(
        self, written: Callable[..., Path], load: Any, save_trained: Callable[..., str], tmp_path: Path
    ) -> None:
        """Qwen3.5: policies and rewards become checkpoints of the text model, whose model type reads the tokenizer's files by
        another class."""
        rope = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e4, "partial_rotary_factor": 0.5}
        config = AutoConfig.for_model(
            "qwen3_5",
            text_config={**TEXT, "layer_types": ["full_attention"] * 2, "rope_parameters": rope},
            vision_config=WRAPPERS["qwen3_vl"]["vision_config"],
        )
        folder = written("llama4_text")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
        whole = {**load_file(folder / "model.safetensors"), "mtp.fc.weight": torch.ones(32, 64)}
        save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
        unused = sorted(name for name in whole if name.startswith(("model.visual.", "mtp.")))
        base = load(folder)
        (note,) = base.notes  # transformers leaves both out of its report
        assert len(unused) > 10 and note == (
            f"Qwen3_5ForCausalLM does not use {len(unused)} of the checkpoint's tensors: {', '.join(unused[:3])}"
            f" and {len(unused) - 3} more"
        )
        for name, head in (("policy", None), ("reward", torch.linspace(-1, 1, 32)[None])):
            save_trained(folder, tmp_path / name, head=head)
            told: list[str] = []
            merged = merge_run(tmp_path / name, log=told.append)
            assert tokenizer_sha256(load_tokenizer(str(merged))) == base.identity.tokenizer_sha256
            (lost,) = json.loads((merged / "rlhf_ray.json").read_text())["notes"]
            assert f"does not use {len(unused)} of the checkpoint's tensors" in lost and lost in told
            assert (
                lost.endswith("the merged checkpoint is without them")
                and load(tmp_path / "policy-adapter-merged").notes == ()
            )

    def test_a_decoder_that_could_not_be_loaded_again_is_not_merged(
        self, tiny_llama: Callable[..., Path], save_trained: Callable[..., str], tmp_path: Path
    ) -> None:
        """Mllama: transformers has a class for its decoder, and loads none of the decoder's own type. Refused before weights are
        read; it was said of the folder that had just been written, as "Unrecognized configuration class"."""
        save_trained(tiny_llama(), tmp_path / "a")
        folder = Path(shutil.copytree(tiny_llama(), tmp_path / "base"))
        AutoConfig.for_model("mllama").save_pretrained(folder)
        with pytest.raises(
            ArtifactError, match=r"models of type mllama cannot be merged: .*mllama_text_model.*unmerged"
        ):
            merge_run(tmp_path / "a", model=str(folder))
        for other in ("llama4", "qwen3_5", "gemma3", "llama"):
            refuse_unreadable_merge(AutoConfig.for_model(other), "base")

    @pytest.mark.parametrize("model", ALSO_SEES)
    def test_gemma_4_and_llama_4(
        self, model: str, written: Callable[..., Path], load: Any, save_trained: Callable[..., str], tmp_path: Path
    ) -> None:
        """Each token is read as itself, also one that stands for an image; rows of two adapters get the replies that they get
        alone; the merged model answers as the unmerged one, and its config is that of the base."""
        folder = written("llama4_text")
        config = AutoConfig.for_model(model.split()[0], **ALSO_SEES[model])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
        base = load(folder)
        ids = torch.cat([IDS, torch.tensor([[255, 254, 9, 253, 255, 7]])])
        with torch.no_grad():
            torch.testing.assert_close(
                base.lm_head(hidden(base.model, ids)), logits(base.model, ids), atol=1e-4, rtol=1e-4
            )
        for name in ("policy", "value"):
            save_trained(folder, tmp_path / name, seed=len(name))
        peft_model = wrap(load(folder).model, read_adapter(tmp_path / "policy"), "policy")
        add_from_files(peft_model, "value", read_adapter(tmp_path / "value"), trainable=False)
        prompts = ((5, 9, 255, 17, 8), (7, 7), (44, 9, 3), tuple(range(20, 44)))
        names = ("policy", None, "value", "policy")
        requests = [DecodeRequest(p, 0, 6, (), adapter=name, greedy=True) for p, name in zip(prompts, names)]
        sampler = Sampler(peft_model, 0, max_rows=4)
        alone = [sampler.run([request])[0].token_ids for request in requests]
        assert [result.token_ids for result in sampler.run(requests)] == alone
        expected = {}
        for name in ("policy", "value"):
            with use_adapter(peft_model, name):
                expected[name] = logits(peft_model, ids)
        assert (expected["policy"] - expected["value"]).abs().max() > 1e-3
        merged = merge_run(tmp_path / "policy")
        torch.testing.assert_close(logits(load(merged).model, ids), expected["policy"], atol=1e-4, rtol=1e-4)
        if model != "llama4":  # which is merged as its text decoder
            assert AutoConfig.from_pretrained(merged).image_token_id == 255

    @pytest.mark.parametrize("size", GEMMAS_4)
    def test_the_tiny_copy_of_gemma_4(self, size: str) -> None:
        """Layers of their own width stay so, as many as there are in the copy."""
        config = AutoConfig.for_model(
            "gemma4_text", **{**GEMMA_4, **GEMMAS_4[size], "hidden_size": 512, "head_dim": 32}
        )
        small = tiny_config(config)
        assert small.hidden_size == 128 and [layer.head_dim for layer in small.per_layer_config] == [8, 4]
        assert small.vocab_size == small.vocab_size_per_layer_input
        found = differences(tiny_model(config))
        assert max(found.values()) < 1e-3

    def test_a_model_whose_tokens_see_those_that_follow(self) -> None:
        for config in (AutoConfig.for_model("paligemma"), Gemma3TextConfig(use_bidirectional_attention=True)):
            with pytest.raises(
                ConfigError, match=rf"{config.model_type} cannot be used here: each of their tokens sees"
            ):
                causal_class(config)


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
        assert (
            "mlp.experts.down_proj (22%), mlp.gate (1%); lora.target_parameters=[mlp.experts.down_proj, mlp.exp" in line
        )
        assert adapter_notes(trunk(wrap(tiny("qwen3"), LoraConfig(r=4), "policy")), "policy") == []

    def test_so_it_is_for_a_quantised_load(self, written: Callable[..., Path], load: Any) -> None:
        pytest.importorskip("bitsandbytes")
        (line,) = load(written("qwen3_moe"), load_in_4bit=True).notes
        assert line.startswith(
            "load_in_4bit quantises 33% of the decoder's weights, and not mlp.experts.gate_up_proj (44%)"
        )
        assert load(written("qwen3"), load_in_4bit=True).notes == ()


STACKED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
"""Names of the stacked weights of all families here."""


class TestStackedExperts:
    """lora.target_parameters, PEFT's LoRA on the weights of all experts."""

    @pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
    def test_they_train_are_saved_merge_and_are_sampled(
        self, family: str, written: Callable[..., Path], load: Any, train: Callable[..., None], tmp_path: Path
    ) -> None:
        folder, lora = written(family), LoraConfig(r=4, target_parameters=STACKED)
        model = wrap(load(folder).model, lora, "policy", seed=1)
        train(model, "policy")
        model(input_ids=IDS, labels=IDS).loss.backward()
        parameters = adapter_parameters(model, "policy")
        experts = {key: p for key, p in parameters.items() if ".experts." in key}
        assert {p.shape[0] for key, p in experts.items() if "lora_A" in key} == {4 * 4}  # rank 4, 4 experts
        assert all(p.grad is not None and bool(p.grad.any()) for p in experts.values())
        expected, tensors, config = logits(model), adapter_tensors(model, "policy"), adapter_config(model, "policy")
        save_adapter(tmp_path / "a", tensors, config, "CAUSAL_LM", None, str(folder))

        again = wrap(load(folder).model, read_adapter(tmp_path / "a"), "policy")
        assert torch.equal(logits(again), expected)
        theirs = peft.PeftModel.from_pretrained(load(folder).model, str(tmp_path / "a")).eval()
        torch.testing.assert_close(logits(theirs), expected)
        torch.testing.assert_close(logits(load(merge_run(tmp_path / "a")).model), expected, atol=1e-4, rtol=1e-4)

        copy_adapter(again, "policy", "value")
        add_fresh(again, "fresh", LoraConfig(r=2), seed=3)
        names = ("policy", None, "fresh", "value", "policy")
        requests = [DecodeRequest((5 + i, 9, 7), 0, 6, (), adapter=name, greedy=True) for i, name in enumerate(names)]
        sampler = Sampler(again, 0, max_rows=8)
        alone = [sampler.run([request])[0].token_ids for request in requests]
        assert [result.token_ids for result in sampler.run(requests)] == alone
        remove_adapter(again, "value")
        assert torch.equal(logits(again), expected)

    def test_names_that_match_nothing_and_sets_that_differ(self) -> None:
        with pytest.raises(
            ConfigError, match=r"mlp.experts.w1 matches no stacked.*some of mlp.experts.down_proj, mlp.exp"
        ):
            wrap(tiny("qwen3_moe"), LoraConfig(target_parameters=("mlp.experts.w1",)), "policy")
        with pytest.raises(ConfigError, match="all its matrices are linear layers"):
            wrap(tiny("qwen3"), LoraConfig(target_parameters=STACKED), "policy")
        with pytest.raises(ValueError, match="set lora_dropout to 0"):
            LoraConfig(target_parameters=STACKED, lora_dropout=0.1)
        model = wrap(tiny("qwen3_moe"), LoraConfig(target_parameters=STACKED), "policy")
        with pytest.raises(ConfigError, match="target_parameters: differ from those of adapter policy"):
            add_fresh(model, "other", LoraConfig(target_parameters=STACKED[:1]))

    def test_nothing_is_left_to_tell(self) -> None:
        model = wrap(tiny("qwen3_moe"), LoraConfig(r=4, target_parameters=STACKED), "policy")
        (line,) = adapter_notes(trunk(model), "policy")
        assert line.startswith("all-linear adapts 99% of the decoder's weights, and not mlp.gate (1%)")
