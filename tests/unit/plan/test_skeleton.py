"""Models without weights: sizes are those of the architecture, and a model that is not there is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.config import SFTConfig
from rlhf_ray.errors import ArtifactError, ConfigError
from rlhf_ray.plan.meta_tracker import MetaMemoryTracker
from rlhf_ray.plan.passes import Cast, SupervisedLearning
from rlhf_ray.plan.role_models import Made, supervised_models
from rlhf_ray.plan.skeleton import read_config, size_of, skeleton

D, I, L, H, KV, V = 64, 128, 2, 4, 2, 256
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": V, "hidden_size": D}
LLAMA |= {"intermediate_size": I, "num_hidden_layers": L, "num_attention_heads": H, "num_key_value_heads": KV}
LAYER = 2 * D * D + 2 * D * (D // H * KV) + 3 * D * I
"""Linear weights of a layer: q and o, k and v, the three of the MLP."""
NORMS = L * 2 * D + D
ROTARY = 2 * (D // H // 2) * 4
"""Bytes of the rotary frequencies, and of their original values."""


def folder(tmp_path: Path, **changes: Any) -> str:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    return str(tmp_path)


def job(path: str, **fields: Any) -> SFTConfig:
    return SFTConfig(output_dir="x", model_name_or_path=path, data={"train": "d"}, **fields)


def size(path: str, device: Any = "cuda", classifier: bool = False, **fields: Any) -> tuple[int, int]:
    return size_of(skeleton(job(path, **fields), path, read_config(path), device, classifier).model)


def test_weights_are_counted_from_config_json_alone(tmp_path: Path) -> None:
    linear, words = L * LAYER, V * D
    n = linear + 2 * words + NORMS
    for name in ("float32", "tied"):
        (tmp_path / name).mkdir()
    path = folder(tmp_path / "float32")
    assert size(path) == (n, 4 * n + ROTARY)
    assert size(path, dtype="bfloat16") == (n, 2 * n + ROTARY)
    tied = folder(tmp_path / "tied", tie_word_embeddings=True, dtype="bfloat16")
    assert size(tied) == (n - words, 2 * (n - words) + ROTARY)  # the checkpoint's own precision
    assert size(tied, device="cpu") == (n - words, 4 * (n - words) + ROTARY)  # float32 on the CPU
    assert size(path, classifier=True) == (n - words + D, 4 * (n - words + D) + ROTARY)


@pytest.mark.parametrize(
    ("bits", "linear_bytes"), [(4, LAYER // 2 + LAYER // 64 * 4), (8, LAYER + 4 * (D + D + D + 2 * I + 2 * D // 2))]
)
def test_quantised_bases(tmp_path: Path, bits: int, linear_bytes: int) -> None:
    """4 bits: half a byte and 4 bytes for every 64 weights. 8 bits: a byte, and 4 bytes for each row (q, o, down: D; k, v: D/2;
    gate, up: I). Embeddings, head and norms stay as they are."""
    n = L * LAYER + 2 * V * D + NORMS
    whole = 2 * (2 * V * D + NORMS)
    found = size(folder(tmp_path, dtype="bfloat16"), **{f"load_in_{bits}bit": True})
    assert found == (n, L * linear_bytes + whole + ROTARY)


def test_nothing_has_values(tmp_path: Path) -> None:
    path = folder(tmp_path)
    model = skeleton(job(path), path, read_config(path), "cpu").model
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}
    assert not any(p.requires_grad for p in model.parameters()) and model.dtype is torch.float32


def test_other_architectures_need_no_code(tmp_path: Path) -> None:
    gpt2 = {"model_type": "gpt2", "n_embd": D, "n_layer": L, "n_head": H, "vocab_size": V, "n_positions": 128}
    (tmp_path / "config.json").write_text(json.dumps(gpt2))
    weights, _ = size(str(tmp_path))
    assert weights == V * D + 128 * D + L * (12 * D * D + 13 * D) + 2 * D


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config.json; expected a folder that has one, weights or not"):
        read_config(str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"meta/none: no config.json on this machine.*fix: set model_name_or_path=FOLDER"
    ):
        read_config("meta/none")
    for wrong in ({"model_type": "no such thing"}, {"model_type": "llama", "hidden_size": "32"}):
        (tmp_path / "config.json").write_text(json.dumps(wrong))
        with pytest.raises(ArtifactError, match="cannot be read"):
            read_config(str(tmp_path))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kernel", ["auto", "eager"])
def test_models_attend_by_the_kernel_of_the_device(tmp_path: Path, device: Any, kernel: Any) -> None:
    """Scores [8, 4, 512, 512] would be 32 MiB in float32: eager attention makes them, the fused kernels do not."""
    path, scores = folder(tmp_path, max_position_embeddings=512), 8 * H * 512 * 512 * 4
    with MetaMemoryTracker(device) as tracker:
        base = skeleton(job(path, attn_implementation=kernel), path, read_config(path), device)
        ids = torch.zeros(8, 512, dtype=torch.int64, device="meta")
        with tracker.watch() as peak, torch.no_grad():
            base.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, logits_to_keep=1)
    assert (peak.total > scores) == (kernel == "eager")


EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_experts_and_latent_attention(tmp_path: Path, family: str, dtype: str, device: Any) -> None:
    """The meta kernel of grouped products knows bfloat16 alone, fused attention on the CPU one width for keys and values."""
    path = folder(tmp_path, model_type=family, **EXPERTS, **(LATENT if family == "deepseek_v3" else {"head_dim": 16}))
    config = job(path, dtype=dtype, max_length=64)
    cast = Cast(device, lambda: supervised_models(config, device, Made()))
    peak = SupervisedLearning(cast, config).training(4)
    rows, width = 4 * 64 * 2, 2 * 16  # a token's row for each of its two experts, and gate and up of them
    assert peak.bytes["activations"] > rows * width * (4 if dtype == "float32" else 2)
