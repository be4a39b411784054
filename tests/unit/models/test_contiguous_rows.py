"""Rows without padding between prompt and reply, without a mask, or packed into one: what is read is what each row alone says.

By families that differ in what they do with positions and masks: rotary, learned, ALiBi, windows, chunks, experts.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_ray.batches import Sequences
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.backbone import trunk
from rlhf_ray.models.forward import response_logprobs, response_states
from rlhf_ray.models.packing import packed_response_states, packing_of
from rlhf_ray.supervised.trained_model import check_packing, packed_states

VOCABULARY, PAD = 97, 0
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": PAD,
}
WINDOW = {"sliding_window": 4, "head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
    "mistral": {"sliding_window": 4},
    "gemma3_text": {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma2": {**WINDOW, "query_pre_attn_scalar": 8},
    "gpt_oss": {**WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {
        **{"head_dim": 8, "attention_chunk_size": 4, "num_local_experts": 2, "intermediate_size_mlp": 48},
        **{"layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]},
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_neox": {"num_key_value_heads": None},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"n_head": 4, "n_layer": 2},
    "falcon": {"alibi": True, "new_decoder_architecture": False},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "expansion_ratio": 2},
    "phi": {"partial_rotary_factor": 0.5},
    "cohere2": {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
}
PACKED = sorted(set(FAMILIES) - {"bloom", "falcon", "mpt", "opt", "gpt_oss"})
"""The others take positions from the columns of a mask, or make their mask without looking at positions: refused."""

LENGTHS = ((9, 4), (1, 12), (3, 1), (6, 6))
"""Tokens of prompt and reply."""


def make(family: str) -> Any:
    fields = {k: v for k, v in {**COMMON, **FAMILIES.get(family, {})}.items() if v is not None}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields), dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "norm" not in name and "ln" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def rows() -> tuple[Tensor, Tensor, Tensor]:
    """tokens, prompt and reply masks as a rollout has them: prompts padded on the left, replies on the right, wider than needed."""
    draw = torch.Generator().manual_seed(1)
    before, after = 11, 14
    prompts, replies = (torch.zeros(len(LENGTHS), width, dtype=torch.bool) for width in (before, after))
    for i, (prompt, reply) in enumerate(LENGTHS):
        prompts[i, before - prompt :], replies[i, :reply] = True, True
    tokens = torch.randint(3, VOCABULARY, (len(LENGTHS), before + after), generator=draw)
    return torch.where(torch.cat([prompts, replies], 1), tokens, PAD), prompts, replies


def alone(model: Any) -> list[Tensor]:
    """Of each row, the hidden states of its real tokens, read without padding and without a mask."""
    tokens, prompts, replies = rows()
    real = torch.cat([prompts, replies], 1)
    return [
        trunk(model)(input_ids=row[mask][None], use_cache=False).last_hidden_state[0] for row, mask in zip(tokens, real)
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("contiguous", [True, False])
def test_rows_are_read_as_each_alone(family: str, contiguous: bool) -> None:
    """States, log-probabilities and gradients of the embeddings, by the layout of today and by that of older runs."""
    model = make(family)
    seq = Sequences.trim(*rows(), contiguous)
    assert seq.length == (13 if contiguous else None)
    states = response_states(trunk(model), seq)
    _compare(model, seq, states)


APART = sorted(set(PACKED) - {"gemma2"} | {"opt"})
"""Whose rows attention can read one by one: not where sdpa caps scores; also where positions, but not masks, tell rows apart."""
FULL = sorted(set(APART) - {"cohere2", "gemma3_text", "llama4_text", "mistral", "qwen2"})
"""Those whose layers all see whole rows; the others read packed rows that are no longer than their windows."""


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_who_reads_packed_rows(family: str) -> None:
    model = make(family)
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    packing = packing_of(trunk(model), model.config._attn_implementation)
    if family not in APART:
        assert packing is None
        return
    assert packing is not None and packing.takes(Sequences.trim(*rows(), packed=True)) == (family in FULL)
    assert packing.longest == (2**31 if family in FULL else 4)
    assert packing_of(trunk(model), "eager") is None


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("family", FULL)
def test_rows_as_one_are_read_as_each_alone(family: str, skips: bool) -> None:
    """States, log-probabilities and gradients; with and without leaving out what the last layer makes of prompts."""
    model = make(family)
    packing = packing_of(trunk(model), "sdpa", skips)
    assert packing is not None and bool(packing.by_position) == (skips and family != "opt"), (
        "whose layers have other parts"
    )
    seq = Sequences.trim(*rows(), packed=True)
    states = packed_response_states(trunk(model), packing, seq)
    assert states.shape == (4, 13, 32)
    _compare(model, seq, states)


def _compare(model: Any, seq: Sequences, states: Tensor) -> None:
    expected = [row[p - 1 : p + n] for row, (p, n) in zip(alone(model), LENGTHS)]
    for found, row in zip(states, expected):
        torch.testing.assert_close(found[: len(row)], row, atol=2e-5, rtol=2e-5)
    head = model.get_output_embeddings()
    logprobs, _ = response_logprobs(states, head, seq, 0.7)
    assert not logprobs[~seq.response_mask].any()
    one_by_one = [head(row[:-1]).div(0.7).log_softmax(-1) for row in expected]
    said = [row.tokens[0, -n:] for row, n in zip(map(_one_row, range(len(LENGTHS))), (n for _, n in LENGTHS))]
    wanted = torch.cat([every.gather(1, ids[:, None])[:, 0] for every, ids in zip(one_by_one, said)])
    torch.testing.assert_close(logprobs[seq.response_mask], wanted, atol=2e-5, rtol=2e-5)
    weight = model.get_input_embeddings().weight
    gradient = torch.autograd.grad(logprobs.sum(), weight)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted.sum(), weight)[0], atol=1e-4, rtol=1e-4)


def test_what_each_layer_computes_of_packed_rows() -> None:
    """42 real tokens in four rows; the last layer's pointwise parts the 27 that are read, its keys all; attention row by row."""
    model, seen = make("llama"), {}

    def note(name: str) -> Any:
        return lambda module, args, output: seen.setdefault(name, []).append(tuple(args[0].shape[:2]))

    for layer, block in enumerate(trunk(model).layers):
        for name in ("mlp.gate_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj"):
            # The hooks of a pass come before these: what is noted is what the module itself was given.
            block.get_submodule(name).register_forward_hook(note(f"{layer}.{name}"))
    packing = packing_of(trunk(model), "sdpa")
    assert packing is not None
    seen.clear()
    attended: list[int] = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def attend(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        attended.append(query.shape[2])
        assert kwargs["attn_mask"] is None and kwargs["is_causal"]
        return plain(query, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
        packed_response_states(trunk(model), packing, Sequences.trim(*rows(), packed=True))
    real, read = sum(p + n for p, n in LENGTHS), sum(n + 1 for _, n in LENGTHS)
    assert (real, read) == (42, 27)
    assert attended == [p + n for p, n in LENGTHS] * 2
    assert {key: shapes for key, shapes in seen.items() if key.startswith("0")} == {
        f"0.{name}": [(1, real)]
        for name in ("mlp.gate_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj")
    }
    assert seen["1.mlp.gate_proj"] == [(1, read)] and seen["1.self_attn.k_proj"] == [(1, real)]


def test_no_hook_is_left_behind_and_other_passes_are_as_before() -> None:
    model = make("llama")
    before = torch.cat(alone(model))
    packing = packing_of(trunk(model), "sdpa")
    assert packing is not None
    packed_response_states(trunk(model), packing, Sequences.trim(*rows(), packed=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.cat(alone(model)), before)


def _one_row(index: int) -> Sequences:
    return Sequences.trim(*(t[index : index + 1] for t in rows()))


def test_the_head_sees_the_states_of_reply_tokens_alone() -> None:
    """Not those of prompts, and not those of padding behind short replies."""
    model, seen = make("llama"), []

    def head(states: Tensor) -> Tensor:
        seen.append(len(states))
        return model.lm_head(states)

    seq = Sequences.trim(*rows())
    logprobs, entropy = response_logprobs(response_states(trunk(model), seq), head, seq, 1.0, with_entropy=True)
    assert sum(seen) == sum(n for _, n in LENGTHS) == 23
    assert (
        entropy is not None and bool((entropy[seq.response_mask] > 0).all()) and not entropy[~seq.response_mask].any()
    )
    assert logprobs.shape == seq.response_mask.shape == (4, 12)


# ------------------------------------------------------------------------------------------------------------------ packed


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("family", PACKED)
def test_packed_rows_are_read_as_each_alone(family: str, kernel: str) -> None:
    model = make(family)
    if kernel == "sdpa" and not model._supports_sdpa:
        pytest.skip("transformers has no sdpa for it")
    model.set_attn_implementation(kernel)
    tokens, prompts, replies = rows()
    packed = packed_states(trunk(model), tokens, torch.cat([prompts, replies], 1))
    torch.testing.assert_close(packed, torch.cat(alone(model)), atol=2e-5, rtol=2e-5)


class Model:
    """What `check_packing` asks a trained model for."""

    def __init__(self, model: Any, targets: Any = "all-linear") -> None:
        self.peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
        self.backbone = type("B", (), {"model": model, "device": torch.device("cpu"), "pad_id": PAD})()


ROWS = [[3, 4, 5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16, 17]]


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(PACKED)))
def test_families_that_do_not_keep_packed_rows_apart_are_refused_by_name(family: str) -> None:
    with pytest.raises(ConfigError, match=f"packing: models of type {family} do not read packed rows") as caught:
        check_packing(Model(make(family)), ROWS)  # type: ignore[arg-type]
    assert caught.value.problems[0].fix == "set packing: false"


def test_a_state_goes_over_the_ends_of_rows_and_is_refused() -> None:
    config = AutoConfig.for_model("mamba", **{**COMMON, "state_size": 8, "time_step_rank": 4})
    mamba = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with pytest.raises(ConfigError, match="models of type mamba do not read packed rows"):
        check_packing(Model(mamba, ["in_proj"]), ROWS)  # type: ignore[arg-type]
    check_packing(Model(make("llama")), ROWS)  # type: ignore[arg-type]
