"""Which models each role of a PPO run loads, and who sits where: all on one rank (colocate), or each role its own (split)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from rlhf_ray.batches import Rollout
from rlhf_ray.config import PPOConfig
from rlhf_ray.data.records import Row
from rlhf_ray.data.templates import Template, load_template
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.assembly import Assembly
from rlhf_ray.models.backbone import Backbone
from rlhf_ray.models.lineage import check_lineage
from rlhf_ray.models.specs import ModelSpec, policy_source
from rlhf_ray.rewards.build import RewardBuilder
from rlhf_ray.rewards.protocol import Texts
from rlhf_ray.roles.generator import Decoding
from rlhf_ray.sampler.engine import Sampler

SAMPLER_ROWS = 64


def assemble(config: PPOConfig, device: torch.device) -> tuple[Assembly, RewardBuilder]:
    """Load the base and put policy, reference, rewards and critic on it, with their lineage checked.

    Under `placement: split` this is the learner: reference and rewards are the scorers' affair, but for the reward that the value
    model starts from."""
    alone = config.placement == "colocate"
    assembly, start = _base(config, device)
    template = load_template(config.template, assembly.base.tokenizer)
    roles = RewardBuilder(assembly, template, config.template)
    if start is not None:
        roles.warnings += check_lineage(start, assembly.base.identity, template, role="sft")
    assembly.add_trained_policy(start, config.lora, with_reference=alone)
    needed = None
    if config.advantage_estimator == "gae" and not alone:
        needed = value_init_role(config, {r.name for r in config.rewards if roles.is_foreign(r)})
    for reward in config.rewards:
        roles.add(reward, reward.name, load=alone or reward.name == needed)
    assembly.lineage += roles.lines
    if config.advantage_estimator == "gae":
        assembly.add_value(needed or value_init_role(config, roles.readers), config.value.adapter, config.value.lora)
    return assembly, roles


def assemble_generator(config: PPOConfig, device: torch.device) -> Assembly:
    """The base with an adapter of the policy's shape on it; its weights come with the requests."""
    assembly, start = _base(config, device)
    assembly.add_trained_policy(start, config.lora, with_reference=False)
    return assembly


def assemble_scorer(config: PPOConfig, device: torch.device) -> tuple[Assembly, RewardBuilder]:
    """The base with the reference and the rewards."""
    assembly, start = _base(config, device)
    assembly.add_policy("reference", start or ModelSpec("base", "base"))
    roles = RewardBuilder(assembly, load_template(config.template, assembly.base.tokenizer), config.template)
    for reward in config.rewards:
        roles.add(reward, reward.name)
    return assembly, roles


def policy_sampler(config: PPOConfig, assembly: Assembly, model: Any, forward: Any = None) -> Sampler:
    """The sampler of rollouts and evaluations. model: the base with its adapters.  forward: see `Sampler`."""
    return Sampler(model, assembly.base.pad_id, max_rows=min(SAMPLER_ROWS, config.rollout_chunk_size), forward=forward)


def value_init_role(config: PPOConfig, foreign: Collection[str] = ()) -> str:
    """The role the value model starts from: as the job says, else the first reward model that it can start from, else the policy.

    foreign: rewards with a tokenizer of their own; a value model must read the policy's tokens. Raises ConfigError."""
    models = [r.name for r in config.rewards if r.function is None and r.name not in foreign]
    if config.value.init_from is None:
        return models[0] if models and config.value.adapter == "own" else "policy"
    if config.value.init_from == "policy":
        return "policy"
    name = config.value.init_from.removeprefix("reward:")
    if name in foreign:
        raise ConfigError.at(
            "value.init_from",
            f"reward {name!r} has another tokenizer than the policy, whose tokens the value model must read",
            "policy, or a reward model on the policy's own tokens",
            fix="set it to policy",
        )
    if name not in models:
        raise ConfigError.at(
            "value.init_from", f"reward {name!r} is a Python function", "a reward model", fix="set it to policy"
        )
    return name


def decoding(sampling: Any, stop_ids: tuple[int, ...]) -> Decoding:
    """A SamplingConfig as the generator takes it."""
    return Decoding(stop_ids, sampling.temperature, sampling.top_p, sampling.top_k, greedy=not sampling.do_sample)


def text_maker(backbone: Backbone, template: Template) -> Callable[[Rollout, Sequence[Row]], Texts]:
    """Replies as text without special tokens, prompts as the model saw them, and the rows' raw columns."""
    decode = backbone.tokenizer.decode

    def to_texts(rollout: Rollout, rows: Sequence[Row]) -> Texts:
        ids = [response[mask].tolist() for response, mask in zip(rollout.response_ids, rollout.response_mask)]
        responses = [str(decode(i, skip_special_tokens=True)) for i in ids]
        return Texts([template.render(row.prompt) for row in rows], responses, ids, [row.columns for row in rows])

    return to_texts


def _base(config: PPOConfig, device: torch.device) -> tuple[Assembly, ModelSpec | None]:
    assembly = Assembly(config, device, config.seed, config.stop_token_ids)
    return assembly, policy_source(config.sft) if config.sft is not None else None
