"""Which engine samples the rollouts and evaluations of PPO, and how much memory it may take."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf_ray.config.sections import Float, Positive, Section, field


class RolloutConfig(Section):
    """The decode engine of PPO."""

    engine: Literal["builtin", "vllm"] = field(
        "builtin",
        "builtin: the decode engine of this package; vllm: vLLM in the process that samples, with a base of its own and the same"
        " random numbers (needs vLLM there: pip install 'rlhf_ray[vllm]')",
    )
    cuda_graphs: bool = field(
        False,
        "builtin on CUDA: decode steps as CUDA graphs over buffers of few shapes, where rows share an adapter and no layer slides"
        " or keeps a state; on a CPU the same buffers without graphs, which is how it is tested: it has not been run on a GPU yet",
    )
    gpu_memory_utilization: Annotated[Float, Field(gt=0, lt=1)] | None = field(
        None,
        "vllm on CUDA: share of the GPU's memory for its weights and its keys and values; default: 0.9 times what a"
        " generator has of its GPU (placement: split), 0.3 beside a learner (vLLM's name; TRL: 0.3)",
    )
    kv_cache_gb: Positive | None = field(
        None,
        "vllm: GiB of keys and values, instead of what gpu_memory_utilization leaves for them; default on a CPU: 1",
    )
    enforce_eager: bool = field(
        False, "vllm on CUDA: no CUDA graphs; it starts faster and decodes more slowly (vLLM's name)"
    )
    enable_sleep_mode: bool = field(
        False,
        "vllm on CUDA beside a learner: give the engine's GPU memory back while the learner learns, its weights kept on the host"
        " (vLLM's name)",
    )

    @model_validator(mode="after")
    def _one_size(self) -> RolloutConfig:
        if self.kv_cache_gb is not None and self.gpu_memory_utilization is not None:
            raise ValueError("kv_cache_gb and gpu_memory_utilization exclude each other; drop one")
        return self
