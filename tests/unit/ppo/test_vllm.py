"""How large vLLM's engine is in a PPO run, and what the header says of it. (What it does: tests/vllm.)"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.config import LoraConfig, PPOConfig
from rlhf_ray.errors import ConfigError
from rlhf_ray.launch.resources import role_requests
from rlhf_ray.models.adapters import adapter_config, adapter_tensors, save_adapter, wrap
from rlhf_ray.models.backbone import Backbone, base_files
from rlhf_ray.ppo import actors, vllm
from rlhf_ray.ppo.vllm import engine_lines, gpu_share, longest_row, options, policy_engine, policy_shape

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def job(path: str = "m", **changes: Any) -> PPOConfig:
    fields: dict[str, Any] = {"data": {"train": "p.jsonl"}, "rewards": [{"model": "r"}], "rollout": {"engine": "vllm"}}
    return PPOConfig(output_dir="x", model_name_or_path=path, **{**fields, **changes})


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_base_on_disk_is_what_would_be_loaded(make_backbone: Callable[..., Backbone], dtype: str) -> None:
    """Pad, identity, context and number format, without loading it."""
    for family in ("llama", "gpt2"):
        backbone = make_backbone(family)
        files = base_files(backbone.identity.path, None, dtype, "cpu", None)
        assert (files.pad, files.context_length) == (backbone.pad, backbone.context_length)
        assert files.identity.manifest() | {"precision": ""} == backbone.identity.manifest() | {"precision": ""}
        assert files.dtype is (torch.float32 if dtype == "auto" else torch.bfloat16)
        assert files.identity.precision == str(files.dtype).removeprefix("torch.")


def test_the_longest_row() -> None:
    assert longest_row(job(response_length=100), 8192) == 1124  # max_prompt_length is 1024
    assert longest_row(job(response_length=100, max_length=600), 8192) == 600
    assert longest_row(job(response_length=100, max_prompt_length=None), 8192) == 8192
    assert longest_row(job(response_length=100), 256) == 256


def test_its_memory(tiny_llama: Callable[..., Path]) -> None:
    """On a CPU a cache of 1 GiB; on CUDA a share of the GPU: 0.9 of what a generator has, 0.3 beside a learner; as the job says."""
    base = base_files(str(tiny_llama()), None, "float32", "cpu", None)
    half = {"placement": "split", "generator": {"num_gpus": 0.5}}
    assert options(job(), base, CPU, 16).kv_cache_bytes == 2**30
    assert options(job(), base, CUDA, 16).kv_cache_bytes is None
    shares = [
        options(job(**more), base, CUDA, 16).gpu_memory_utilization for more in ({}, half, {"placement": "split"})
    ]
    assert shares == [0.3, 0.45, 0.9]
    given = job(rollout={"engine": "vllm", "gpu_memory_utilization": 0.5, "enable_sleep_mode": True})
    found = options(given, base, CUDA, 16)
    assert found.gpu_memory_utilization == 0.5 and found.enable_sleep_mode
    assert options(job(rollout={"engine": "vllm", "kv_cache_gb": 2.0}), base, CUDA, 16).kv_cache_bytes == 2**31
    assert [options(job(sampler_rows=n), base, CPU, 16).max_rows for n in (None, 8, 999)] == [64, 8, 64]


def test_its_memory_is_of_what_was_placed(tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Generator and scorer shared the second of two GPUs, and vLLM took 0.9 of the whole: the scorer had no memory."""
    config = job(str(tiny_llama()), placement="split")
    placed = {one.role: one.each["GPU"] for one in role_requests(config, {"GPU": 2.0, "CPU": 8.0}, own_ray=True)}
    assert placed == {"generator": 0.5, "scorer": 0.5, "learner": 1.0}
    started = list[float]()

    def engine(options: Any) -> None:  # there is no GPU to start it on
        started.append(options.gpu_memory_utilization)
        raise ConfigError.at("test", "started")

    monkeypatch.setattr(vllm, "VLLMEngine", engine)
    monkeypatch.setattr(actors, "own_device", lambda: CUDA)
    with pytest.raises(ConfigError, match="started"):
        actors.build_generator(config, num_gpus=placed["generator"])
    assert started == [0.45] and gpu_share(config) == 0.9


def test_the_shape_of_the_policy(make_backbone: Callable[..., Backbone], tmp_path: Path) -> None:
    """Of a fresh adapter as the job says, else of the SFT adapter that it starts from."""
    assert policy_shape(job(lora={"r": 4, "lora_alpha": 6.0, "use_rslora": True}))["r"] == 4
    backbone = make_backbone()
    peft = wrap(backbone.model, LoraConfig(r=3, lora_alpha=6.0, target_modules=("q_proj",)), "sft", seed=0)
    tensors, config = adapter_tensors(peft, "sft"), adapter_config(peft, "sft")
    save_adapter(tmp_path / "sft", tensors, config, "CAUSAL_LM", None, backbone.identity.path)
    shape = policy_shape(job(sft=str(tmp_path / "sft")))
    assert (shape["r"], shape["lora_alpha"], list(shape["target_modules"])) == (3, 6.0, ["q_proj"])


def test_what_the_header_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine_lines(job(rollout={"engine": "builtin"}), CPU) == []
    for version, lines in (("0.30.0", 1), ("0.31.2", 2)):
        monkeypatch.setattr(vllm, "vllm_version", lambda version=version: version)
        said = engine_lines(job(importance_sampling_cap=1.5), CPU)
        assert len(said) == lines and f"vLLM {version}" in said[0] and "at most 1.5" in said[0]


def test_sleep_needs_a_gpu(tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's CPU build takes no notice of it: memory that was to be given back would stay. Before the engine is started."""
    monkeypatch.setattr(vllm, "VLLMEngine", None)
    asleep = job(str(tiny_llama()), rollout={"engine": "vllm", "enable_sleep_mode": True})
    with pytest.raises(
        ConfigError, match=r"rollout.enable_sleep_mode: vLLM on a CPU cannot sleep.*; got cpu; fix: drop it"
    ):
        policy_engine(asleep, CPU, "generator")
