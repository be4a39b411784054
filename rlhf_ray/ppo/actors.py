"""Generator and scorer of a split run, as an actor builds them: plain objects, each with a base of its own."""

from __future__ import annotations

from typing import Any

import torch

from rlhf_ray.config import PPOConfig
from rlhf_ray.console import counted
from rlhf_ray.errors import ArtifactError
from rlhf_ray.models.backbone import BaseIdentity
from rlhf_ray.models.batching import Batching
from rlhf_ray.models.lineage import header_line
from rlhf_ray.ppo.models import assemble_generator, assemble_scorer, policy_sampler, synced_reference, text_maker
from rlhf_ray.ppo.vllm import policy_engine
from rlhf_ray.roles.loaded_adapter import LoadedAdapter
from rlhf_ray.roles.loading_generator import LoadingGenerator
from rlhf_ray.roles.scorer import Scorer
from rlhf_ray.runtime.devices import own_device


def build_generator(config: PPOConfig, num_gpus: float) -> LoadingGenerator:
    """A generator with a base of its own. num_gpus: that it was given, 0.5 for half of one."""
    device = _device(num_gpus)
    if config.rollout.engine == "vllm":
        files, engine = policy_engine(config, device, "generator", num_gpus)
        generator = LoadingGenerator(engine.engine, files.pad.id, config.seed, engine)
        generator.about = _about(files.identity, 1, device)
        return generator
    assembly = assemble_generator(config, device)
    models = assembly.finish().requires_grad_(False)
    stack = models.stack_of("policy")
    sampler = policy_sampler(config, assembly, stack.model)
    adapter = LoadedAdapter(stack.model, "policy", "generator")
    generator = LoadingGenerator(sampler, assembly.base.pad_id, config.seed, adapter)
    generator.about = _about(assembly.base.identity, len(assembly.stacks), device)
    return generator


def build_scorer(config: PPOConfig, num_gpus: float) -> Scorer:
    """Reference and rewards on bases of their own."""
    device = _device(num_gpus)
    assembly, roles = assemble_scorer(config, device)
    models = assembly.finish()
    batching = Batching.of(config)
    to_texts = text_maker(assembly.base, roles.template)
    rewards, synced = roles.build(models, batching, device), synced_reference(models)
    scorer = Scorer(models, rewards, to_texts, config.temperature, batching, device, synced=synced)
    scorer.about = _about(assembly.base.identity, len(assembly.stacks), device)
    return scorer


def check_and_describe(actors: list[tuple[str, Any]], identity: BaseIdentity) -> list[str]:
    """Header lines, one for each actor: process, node, GPU, device, threads, bases. ArtifactError if one loaded another base than
    the learner, whose identity this is.

    actors: name and what it says of itself, from `RemoteRoles.introduce`."""
    lines = []
    for name, about in actors:
        if about["base"] != identity.weights_sha256:
            raise ArtifactError.at(
                name,
                "loaded another base than the learner",
                identity.weights_sha256,
                about["base"],
                "load one revision",
            )
        gpus = f"GPU {', '.join(about['gpus'])}" if about["gpus"] else "no GPU"
        threads, bases = counted(about["threads"], "thread"), counted(about["bases"], "base")
        where = f"pid {about['pid']} on {about['node']}"
        lines.append(header_line(name, f"{where}, {gpus}, {about['device']}, {threads}, {bases}"))
    return lines


def _device(num_gpus: float) -> torch.device:
    return own_device() if num_gpus else torch.device("cpu")


def _about(base: BaseIdentity, bases: int, device: torch.device) -> dict[str, Any]:
    return {
        "device": str(device),
        "base": base.weights_sha256,
        "bases": bases,
        "threads": torch.get_num_threads(),
    }
