"""Whether whoever samples has the decode engine that a job names, asked before anything is loaded."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rlhf_ray.config import JobFields, PipelineConfig, PPOConfig
from rlhf_ray.launch.ask_nodes import ask_nodes
from rlhf_ray.launch.preflight import is_given_a_cluster
from rlhf_ray.launch.resources import ResourceRequest
from rlhf_ray.runtime.imports import is_installed, vllm_missing


def check_engine_here(config: JobFields) -> None:
    """ResourceError if vLLM is not installed where a job runs that brings its own Ray, or none. Imports nothing of it."""
    if _samples_with_vllm(config) and not (_elsewhere() and config.learner.num_workers) and not is_installed("vllm"):
        raise vllm_missing("this machine")


def check_service_engine() -> None:
    """The same of a service whose replicas are to decode with vLLM. Replicas on a cluster say so themselves."""
    if not _elsewhere() and not is_installed("vllm"):
        raise vllm_missing("this machine", "engine")


def _elsewhere() -> bool:
    """Whether a job would run on a Ray that is there already."""
    ray = sys.modules.get("ray")
    return is_given_a_cluster() or (ray is not None and bool(ray.is_initialized()))


def check_engine_there(config: JobFields, requests: Sequence[ResourceRequest]) -> None:
    """The same of the nodes of a cluster, those that could take a process that samples."""
    if not _samples_with_vllm(config):
        return
    sampling = next((r for r in requests if r.role == "generator"), requests[-1])
    for node, installed in ask_nodes(sampling, is_installed, "vllm", here=True):
        if not installed:
            raise vllm_missing(f"node {node}")


def _samples_with_vllm(config: JobFields) -> bool:
    if isinstance(config, PipelineConfig):
        rollout = config.ppo.get("rollout")
        return isinstance(rollout, dict) and rollout.get("engine") == "vllm"
    return isinstance(config, PPOConfig) and config.rollout.engine == "vllm"
