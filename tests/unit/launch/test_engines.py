"""A job that samples with vLLM is refused at its start where vLLM is not installed (exit 3)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.config import PipelineConfig, PPOConfig
from rlhf_ray.errors import ConfigError, ResourceError
from rlhf_ray.launch import engines
from rlhf_ray.launch.resources import ResourceRequest

PPO: dict[str, Any] = {"data": {"train": "p.jsonl"}, "rewards": [{"model": "r"}], "rollout": {"engine": "vllm"}}


def ppo(**changes: Any) -> PPOConfig:
    return PPOConfig(output_dir="x", model_name_or_path="m", **{**PPO, **changes})


def pipeline() -> PipelineConfig:
    return PipelineConfig(output_dir="x", model_name_or_path="m", stages=["ppo"], ppo=PPO)


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "is_installed", lambda module: False)
    monkeypatch.setattr(engines, "is_given_a_cluster", lambda: False)


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.parametrize("job", [ppo(), ppo(placement="split"), ppo(learner={"num_workers": 0}), pipeline()])
def test_here(job: Any) -> None:
    with pytest.raises(
        ResourceError, match=r"rollout.engine: vllm is not installed on this machine; expected vLLM; fix: pip"
    ):
        engines.check_engine_here(job)
    assert ResourceError.exit_code == 3


@pytest.mark.usefixtures("nothing_installed")
def test_a_cluster_is_asked_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The nodes that could take whoever samples: a generator, beside a learner the learner."""
    engines.check_engine_here(ppo(rollout={"engine": "builtin"}))
    monkeypatch.setattr(engines, "is_given_a_cluster", lambda: True)
    engines.check_engine_here(ppo())
    with pytest.raises(ResourceError):
        engines.check_engine_here(ppo(learner={"num_workers": 0}))  # runs here all the same
    asked: list[str] = []

    def ask(request: ResourceRequest, question: Any, module: str, here: bool) -> Any:
        asked.append(request.role)
        return iter([("10.0.0.1 (node a)", True), ("10.0.0.2 (node b)", False)])

    monkeypatch.setattr(engines, "ask_nodes", ask)
    roles = [ResourceRequest(name, 1, {"CPU": 1.0}) for name in ("generator", "scorer", "learner")]
    with pytest.raises(ResourceError, match=r"vllm is not installed on node 10.0.0.2 \(node b\)"):
        engines.check_engine_there(ppo(placement="split"), roles)
    with pytest.raises(ResourceError):
        engines.check_engine_there(ppo(), roles[-1:])
    engines.check_engine_there(ppo(rollout={"engine": "builtin"}), roles)
    assert asked == ["generator", "learner"]


def test_a_driver_imports_neither_torch_nor_vllm_for_it() -> None:
    code = (
        "import sys, rlhf_ray.launch.engines as e\ne.is_installed('vllm')\nprint({'torch', 'vllm'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"load_in_4bit": True}, "rollout.engine: vllm has a base that is not quantised"),
        ({"lora": {"target_parameters": ["mlp.experts.down_proj"]}}, "vLLM cannot adapt stacked expert weights"),
        ({"learner": {"num_workers": 2}, "per_device_train_batch_size": 8}, "beside a learner needs one worker"),
        (
            {"rollout": {"engine": "vllm", "kv_cache_gb": 1, "gpu_memory_utilization": 0.5}},
            "exclude each other; drop one",
        ),
        ({"rollout": {"engine": "sglang"}}, "engine"),
    ],
)
def test_what_the_job_alone_shows(changes: dict[str, Any], line: str) -> None:
    from rlhf_ray.config.load import load_dict

    values = {"output_dir": "x", "model_name_or_path": "m", **PPO, **changes}
    with pytest.raises(ConfigError, match=line):
        load_dict(PPOConfig, values)


def test_the_engine_itself_says_so_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf_ray.sampler import vllm_engine

    monkeypatch.setattr(vllm_engine, "is_installed", lambda module: False)
    with pytest.raises(ResourceError, match="vllm is not installed on this machine"):
        vllm_engine.VLLMEngine(vllm_engine.VLLMOptions(str(tmp_path), "float32", torch.device("cpu"), 64, 4, 8))
