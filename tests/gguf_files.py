"""GGUF files as llama.cpp's converter writes them, from a small Llama whose weights are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TOKENS = (*CONTROL, *bytes_to_unicode().values(), "ĊĊ")
"""Ids 0 to 2, 256 bytes from 3 on, and a token of two line ends: 260 tokens."""
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
    "model.layers": "blk",
}


def known_llama(**config: Any) -> LlamaForCausalLM:
    torch.manual_seed(5)
    values = {
        "vocab_size": len(TOKENS),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        **config,
    }
    return LlamaForCausalLM(LlamaConfig(**values)).eval()


def gguf_name(name: str) -> str:
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q and k as llama.cpp keeps them: the two halves of every head alternate (convert_hf_to_gguf.py, permute)."""
    rows = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, rows, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: LlamaForCausalLM, *, kind: str = "F32", arch: str = "llama", **fields: Any) -> Path:
    """fields: values of the file's settings under their names; None leaves one out. `extra`: further tensors."""
    extra: dict[str, np.ndarray] = fields.pop("extra", {})
    config = model.config
    settings: dict[str, Any] = {
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": 2,
        f"{arch}.attention.head_count_kv": 1,
        f"{arch}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{arch}.rope.dimension_count": 32,
        f"{arch}.rope.freq_base": 10000.0,
        f"{arch}.vocab_size": len(TOKENS),
        "general.name": "tiny",
        "general.license": "apache-2.0",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": list(TOKENS),
        "tokenizer.ggml.token_type": [3] * len(CONTROL) + [1] * (len(TOKENS) - len(CONTROL)),
        "tokenizer.ggml.merges": ["Ċ Ċ"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.chat_template": CHATML,
        **fields,
    }
    writer = gguf.GGUFWriter(path, arch)
    adders = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, list: writer.add_array}
    adders[bool] = writer.add_bool
    for name, value in settings.items():
        if value is not None:
            adders[type(value)](name, value)
    for name, tensor in model.state_dict().items():
        weight = tensor.numpy()
        for heads, part in ((2, "q_proj"), (1, "k_proj")):
            weight = interleaved(weight, heads) if part in name else weight
        if kind == "Q8_0" and weight.ndim == 2:
            q8 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(weight, q8), raw_dtype=q8)
        else:
            writer.add_tensor(gguf_name(name), weight.astype(np.float16) if kind == "F16" else weight)
    for name, value in extra.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
