"""A service by vLLM, as far as it is settled before vLLM starts. (What it answers: tests/vllm.)"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.config.load import load_dict
from rlhf_ray.config.resolved import to_dict
from rlhf_ray.config.serve import ServeConfig
from rlhf_ray.console import NullConsole
from rlhf_ray.errors import ConfigError, ResourceError
from rlhf_ray.launch import engines
from rlhf_ray.models.adapter_files import read_adapter
from rlhf_ray.models.backbone import Backbone, base_files
from rlhf_ray.plan.memory import GIB, Parts
from rlhf_ray.sampler import vllm_engine
from rlhf_ray.sampler.vllm_engine import VLLMOptions
from rlhf_ray.serve.decode_thread import DecodeThread
from rlhf_ray.serve.planning import plan_service
from rlhf_ray.serve.service import run_service
from rlhf_ray.serve.vllm import gpu_share, options

CPU = torch.device("cpu")


def job(path: str = "m", **changes: Any) -> ServeConfig:
    return ServeConfig(**{"output_dir": "x", "model_name_or_path": path, "engine": "vllm", **changes})


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"load_in_4bit": True}, "engine: vllm has a base that is not quantised"),
        ({"limits": {"max_cached_tokens": 4096}}, "limits.max_cached_tokens: has no effect with engine vllm"),
        ({"engine": "builtin", "vllm": {"max_lora_rank": 64}}, "vllm.max_lora_rank: has no effect with engine builtin"),
        ({"vllm": {"scoring_base": False}, "reward": "judge"}, "vllm.scoring_base: reward 'judge' needs it"),
        ({"vllm": {"kv_cache_gb": 1, "gpu_memory_utilization": 0.5}}, "exclude each other; drop one"),
        ({"vllm": {"max_lora_rank": 1000}}, "vllm.max_lora_rank"),
        ({"engine": "sglang"}, "engine"),
    ],
)
def test_what_the_job_alone_shows(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        load_dict(ServeConfig, {"output_dir": "x", "model_name_or_path": "m", "engine": "vllm", **changes})


@pytest.mark.parametrize("engine", ["builtin", "vllm"])
def test_a_job_that_is_written_out_in_full_is_the_same(engine: str) -> None:
    """As it is sent to replicas."""
    config = job(engine=engine)
    assert load_dict(ServeConfig, to_dict(config)) == config


def test_its_size(backbone: Backbone) -> None:
    found = options(job(backbone.identity.path), backbone, CPU)
    assert (found.longest, found.max_rows, found.adapters) == (backbone.context_length, 32, 32)
    assert (found.max_rank, found.step_tokens, found.kv_cache_bytes, found.where) == (16, 544, 2**30, "engine")
    small = {"max_context": 100, "max_batch_rows": 4, "max_loaded_adapters": 2, "prompt_chunk": 64}
    found = options(
        job(backbone.identity.path, limits=small, vllm={"max_lora_rank": 9, "kv_cache_gb": 2}), backbone, CPU
    )
    assert (found.longest, found.max_rows, found.adapters, found.step_tokens) == (100, 4, 2, 68)
    assert (found.max_rank, found.kv_cache_bytes) == (16, 2**31)
    assert gpu_share(job()) == 0.9 and gpu_share(job(replicas={"num_gpus": 0.5}), held=0.1) == pytest.approx(0.35)
    assert gpu_share(job(vllm={"gpu_memory_utilization": 0.6}), held=0.3) == 0.6


def test_a_gpu_that_is_not_the_first_its_process_sees() -> None:
    """vLLM would take another one than Ray gave this process."""
    second = VLLMOptions("m", "float32", torch.device("cuda", 1), 64, 4, 8, where="engine")
    with pytest.raises(ResourceError, match=r"engine: vLLM takes the first GPU .*; expected cuda:0; got cuda:1"):
        vllm_engine._refuse_device(second, "cuda")
    with pytest.raises(ResourceError, match=r"is made for cpu, and whoever samples has cuda"):
        vllm_engine._refuse_device(second, "cpu")


def test_where_vllm_is_not_installed_nothing_is_started(
    base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "is_installed", lambda module: False)
    monkeypatch.setattr(engines, "_elsewhere", lambda: False)
    config = job(str(base_dir), output_dir=str(tmp_path), port=8123)
    with pytest.raises(ResourceError, match=r"^engine: vllm is not installed on this machine.*set engine: builtin"):
        run_service(config, NullConsole())


def test_a_base_without_weights_is_the_base(backbone: Backbone, adapters: Callable[..., Path]) -> None:
    """Pad, ends, identity and shapes: an adapter fits it, or is refused, as it would be with weights."""
    empty = base_files(backbone.identity.path, None, "float32", CPU, None).without_weights()
    for name in ("pad", "eos_ids", "dtype", "identity", "context_length", "hidden_size"):
        assert getattr(empty, name) == getattr(backbone, name), name
    shapes = {name: p.shape for name, p in backbone.model.named_parameters()}
    assert {name: p.shape for name, p in empty.model.named_parameters()} == shapes
    assert all(p.device.type == "meta" for p in empty.model.parameters())
    threads = [DecodeThread(base, 4, lambda tokens: None) for base in (backbone, empty)]
    try:
        assert [thread.has_weights for thread in threads] == [True, False]
        one, other = (thread.pack(read_adapter(adapters(1))) for thread in threads)
        assert one is not None and other is not None and one.nbytes == other.nbytes
        held, same = (thread.pool.unpacked(p) for thread, p in zip(threads, (one, other)))
        assert held.keys() == same.keys() and all(torch.equal(held[key], same[key]) for key in held)
    finally:
        for thread in threads:
            thread.stop()


def test_plan_counts_both_bases_slots_and_cache(base_dir: Path) -> None:
    short = {"limits": {"max_tokens": 64}}

    def parts(**changes: Any) -> Parts:
        (process,) = plan_service(job(str(base_dir), **short, **changes), "cuda").stages[0].processes
        return process.parts

    builtin, both, alone = parts(engine="builtin"), parts(), parts(vllm={"scoring_base": False})
    assert both["bases"] == 2 * builtin["bases"] and alone["bases"] == builtin["bases"]
    assert both["adapters"] == builtin["adapters"] + alone["adapters"] and alone["adapters"] == builtin["adapters"]
    wide = parts(vllm={"max_lora_rank": 64, "scoring_base": False})
    assert wide["adapters"] == 4 * alone["adapters"] and wide["kv cache"] == alone["kv cache"]
    assert parts(vllm={"kv_cache_gb": 3, "scoring_base": False})["kv cache"] == 3 * GIB
    notes = plan_service(job(str(base_dir), **short), "cuda").stages[0].warnings
    assert any("vLLM takes 0.9 of its GPU (vllm.gpu_memory_utilization)" in note for note in notes)


def test_a_base_shorter_than_the_longest_reply_can_be_planned(base_dir: Path) -> None:
    """As it is served: a reply ends where the context does. The default limit, 1,024 tokens, is longer than this base reads."""
    for engine in ("builtin", "vllm"):
        plan = plan_service(job(str(base_dir), engine=engine), "cpu")
        assert plan.stages[0].processes[0].total > 0
        assert any("replies of 255 tokens" in note for note in plan.stages[0].warnings)


def test_a_plan_counts_no_row_longer_than_the_context(base_dir: Path) -> None:
    """Prompts of 1,793 tokens were counted before replies of 255, where the base reads 256 in all."""

    def cached(engine: str, prompt: int | None = None, **limits: int) -> int:
        config = job(str(base_dir), engine=engine, limits=limits)
        (process,) = plan_service(config, "cuda", prompt_tokens=prompt).stages[0].processes
        return process.phases["sampling"]["kv cache"]

    whole = cached("vllm")
    assert cached("vllm", prompt=192) == cached("vllm", prompt=2000) == whole
    assert cached("vllm", max_context=128) == whole / 2 and cached("vllm", max_tokens=32) == whole / 4
    assert max(cached("builtin"), cached("builtin", prompt=192)) < 2 * whole, (
        "a cache that grows is there twice for a moment"
    )
    notes = plan_service(job(str(base_dir), engine="builtin"), "cpu").stages[0].warnings
    assert any("kept to 8,192 tokens" in note and "replies of 255 tokens to prompts of 1" in note for note in notes)
