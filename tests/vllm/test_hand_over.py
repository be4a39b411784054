"""A generator whose engine is vLLM, as an actor builds it: it samples with the adapter named, tells what its layers hold, and
refuses what the builtin one refuses (tests/unit/roles/test_loading_generator.py)."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_ray.batches import Rollout
from rlhf_ray.config import PPOConfig
from rlhf_ray.data.collate import prompt_batch
from rlhf_ray.errors import ConfigError, InvariantError
from rlhf_ray.ppo.actors import build_generator
from rlhf_ray.ppo.vllm import policy_engine
from rlhf_ray.roles.generator import ActiveAdapter, Decoding
from rlhf_ray.roles.loading_generator import LoadingGenerator
from rlhf_ray.storage.files import sha256_tensors

Job = Callable[..., PPOConfig]


@pytest.fixture(scope="module")
def both(tiny_llama: Callable[..., Path]) -> tuple[LoadingGenerator, LoadingGenerator]:
    """The builtin one, and vLLM's."""
    fields: dict[str, Any] = {
        "output_dir": "x",
        "model_name_or_path": str(tiny_llama()),
        "data": {"train": "prompts.jsonl"},
        "rewards": [{"model": "r"}],
        "lora": {"r": 4, "lora_alpha": 8},
        "rollout_chunk_size": 4,
        "placement": "split",
    }
    vllm = PPOConfig(**fields, rollout={"engine": "vllm", "kv_cache_gb": 0.0625})
    return build_generator(PPOConfig(**fields), num_gpus=0.0), build_generator(vllm, num_gpus=0.0)


def adapter(both: tuple[LoadingGenerator, LoadingGenerator], version: int) -> tuple[ActiveAdapter, dict[str, Tensor]]:
    noise = torch.Generator().manual_seed(version)
    tensors = {k: torch.randn(t.shape, generator=noise) * 0.3 for k, t in both[0].tensors().items()}
    return ActiveAdapter("policy", version, sha256_tensors(tensors)), tensors


def sample(generator: LoadingGenerator, named: ActiveAdapter, tensors: dict[str, Tensor]) -> Rollout:
    prompts = prompt_batch([[1, 40, 41], [1, 50]], [0, 1], [6, 6], generator.pad_id)
    arrays = {k: t.numpy() for k, t in tensors.items()}
    return generator.generate_with(prompts, named, arrays, Decoding((2,)), "rollout", 1)


def test_the_rollout_of_the_builtin_generator(both: tuple[LoadingGenerator, LoadingGenerator]) -> None:
    """Tokens, masks, pads, version and hash; and both say that they have the same base."""
    builtin, vllm = both
    assert vllm.describe() == builtin.describe() and builtin.pad_id == vllm.pad_id
    for version in (1, 2, 1):
        named, tensors = adapter(both, version)
        one, other = sample(builtin, named, tensors), sample(vllm, named, tensors)
        assert torch.equal(one.tokens, other.tokens) and torch.equal(one.response_mask, other.response_mask)
        torch.testing.assert_close(one.sample_logprobs, other.sample_logprobs, atol=1e-4, rtol=0)
        assert (other.adapter_version, other.adapter_sha256) == (version, named.sha256)
        assert all(torch.equal(vllm.tensors()[key], tensor) for key, tensor in tensors.items())


def test_what_is_refused_and_that_it_goes_on(both: tuple[LoadingGenerator, LoadingGenerator]) -> None:
    """Poisoned, and another adapter than the one named; then a good one."""
    vllm = both[1]
    named, tensors = adapter(both, 3)
    victim = list(tensors)[3]
    spoilt = {**tensors, victim: tensors[victim] * float("nan")}
    with pytest.raises(InvariantError, match=f"adapter version 3: {victim} is not finite"):
        sample(vllm, named, spoilt)
    other, others = adapter(both, 4)
    with pytest.raises(InvariantError, match=f"expected sha256 {named.sha256}; got sha256 {other.sha256}"):
        sample(vllm, named, others)
    assert sample(vllm, named, tensors).adapter_sha256 == named.sha256


def test_weights_that_change_after_loading_are_told(both: tuple[LoadingGenerator, LoadingGenerator]) -> None:
    """The rollout names the hash of what the layers hold, which is no adapter that anybody published."""
    vllm = both[1]
    named, tensors = adapter(both, 5)
    assert sample(vllm, named, tensors).adapter_sha256 == named.sha256

    def spoil(worker: Any) -> None:
        manager = worker.model_runner.lora_manager._adapter_manager
        manager.modules["model.layers.1.self_attn.qkv_proj"].lora_a_stacked[2][0] *= 1.5

    vllm.adapter.engine._in_worker(spoil)  # type: ignore[attr-defined]
    assert sample(vllm, named, tensors).adapter_sha256 not in ("", named.sha256)
    vllm.adapter.version = None  # as after a restart
    assert sample(vllm, named, tensors).adapter_sha256 == named.sha256


def test_an_engine_that_is_closed_gives_its_memory_back(vllm_job: Job) -> None:
    """One after the other in one process, as the trials of a sweep have them."""
    for _ in range(2):
        _, adapter = policy_engine(vllm_job("x"), torch.device("cpu"), "generator")
        engine: Any = adapter.engine
        held = engine._in_worker(lambda worker: [weakref.ref(t) for t in worker.model_runner.kv_caches])
        held += engine._in_worker(lambda worker: [weakref.ref(p) for p in worker.model_runner.model.parameters()])
        assert len(held) > 10 and all(ref() is not None for ref in held)
        engine.close()
        assert [ref for ref in held if ref() is not None] == []


def test_a_rank_that_vllm_has_not_is_refused_before_it_starts(vllm_job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_ray.ppo.vllm.VLLMEngine", None)
    with pytest.raises(ConfigError, match=r"lora\.r: rank above what vLLM takes; expected at most 512; got 600"):
        policy_engine(vllm_job("x", lora={"r": 600, "lora_alpha": 1.0}), torch.device("cpu"), "generator")
