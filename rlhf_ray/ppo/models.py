"""Which models each role of a PPO run loads, and who sits where: all on one rank (colocate), or each role its own (split)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from rlhf_ray.batches import Rollout
from rlhf_ray.config import PPOConfig, RewardSource
from rlhf_ray.data.continuation import decoder
from rlhf_ray.data.records import Row
from rlhf_ray.data.templates import Template, load_template
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.assembly import SYNCED_REFERENCE, Assembly
from rlhf_ray.models.backbone import Backbone
from rlhf_ray.models.lineage import check_lineage
from rlhf_ray.models.role_models import RoleModels
from rlhf_ray.models.shared_base import Place
from rlhf_ray.models.specs import ModelSpec, policy_source
from rlhf_ray.rewards.build import RewardBuilder
from rlhf_ray.rewards.protocol import Texts
from rlhf_ray.roles.generator import Decoding
from rlhf_ray.roles.loaded_adapter import LoadedAdapter
from rlhf_ray.sampler.engine import Sampler, rows_at_once

AddReward = Callable[[RewardSource, Collection[str]], None]
"""(a reward of the job, the roles of its models that this process loads)."""


def add_learner_roles(
    assembly: Assembly,
    config: PPOConfig,
    start: ModelSpec | None,
    add_reward: AddReward,
    foreign: Callable[[], Collection[str]],
) -> None:
    """Which models a learner has. Used on loaded models and, by `plan`, on planned ones, so that a plan cannot drift from the job.

    Under `placement: split` reference and rewards are the scorers' affair, but for the reward that the value model starts from.
    start: of the policy.  foreign: names of rewards that read text by themselves."""
    alone, has_value = config.placement == "colocate", config.advantage_estimator == "gae"
    assembly.add_trained_policy(start, config.lora, with_reference=alone)
    if alone and config.ref_model_sync_steps is not None:
        assembly.add_synced_reference(config.lora)
    init_from = value_init_role(config, foreign()) if has_value and not alone else None
    for reward in config.rewards:
        add_reward(reward, [role for role in reward.models(reward.name) if alone or role == init_from])
    if has_value:
        assembly.add_value(init_from or value_init_role(config, foreign()), config.value.adapter, config.value.lora)


def add_generator_roles(assembly: Assembly, config: PPOConfig, start: ModelSpec | None) -> None:
    """An adapter of the policy's shape; its weights come with the requests."""
    assembly.add_trained_policy(start, config.lora, with_reference=False)


def add_scorer_roles(assembly: Assembly, config: PPOConfig, start: ModelSpec | None, add_reward: AddReward) -> None:
    """The reference, with room for the adapter that replaces it, and the rewards."""
    assembly.add_policy("reference", start or ModelSpec("base", "base"))
    if config.ref_model_sync_steps is not None:
        assembly.add_synced_reference(config.lora)
    for reward in config.rewards:
        add_reward(reward, list(reward.models(reward.name)))


def assemble(config: PPOConfig, device: torch.device, place: Place | None = None) -> tuple[Assembly, RewardBuilder]:
    """Load the base and what the learner has on it, with the lineage of each checked.

    place: on bases that other runs of this process share."""
    assembly, start = _base(config, device, place)
    template = load_template(
        config.template, assembly.base.tokenizer, config.template_date, config.chat_template_kwargs
    )
    rewards = RewardBuilder(assembly, template, config.template)
    if start is not None:
        rewards.warnings += check_lineage(start, assembly.base.identity, template, role="sft")

    def add_reward(reward: RewardSource, load: Collection[str]) -> None:
        told = len(rewards.lines)
        rewards.add(reward, reward.name, load=load)
        assembly.lineage += rewards.lines[told:]

    def foreign() -> Collection[str]:
        if config.placement == "colocate":
            return rewards.readers
        return {reward.name for reward in config.rewards if rewards.is_foreign(reward)}

    add_learner_roles(assembly, config, start, add_reward, foreign)
    return assembly, rewards


def assemble_generator(config: PPOConfig, device: torch.device) -> Assembly:
    """Load the base and what a generator has on it."""
    assembly, start = _base(config, device)
    add_generator_roles(assembly, config, start)
    return assembly


def assemble_scorer(config: PPOConfig, device: torch.device) -> tuple[Assembly, RewardBuilder]:
    """Load the base and what a scorer has on it."""
    assembly, start = _base(config, device)
    rewards = RewardBuilder(
        assembly,
        _template(config, assembly),
        config.template,
    )
    add_scorer_roles(assembly, config, start, lambda reward, load: rewards.add(reward, reward.name, load=load))
    return assembly, rewards


def policy_sampler(config: PPOConfig, assembly: Assembly, model: Any, forward: Any = None) -> Sampler:
    """The sampler of rollouts and evaluations. model: the base with its adapters.  forward: see `Sampler`."""
    rows = rows_at_once(config.sampler_rows, config.chunk_rows, assembly.device.type)
    return Sampler(model, assembly.base.pad_id, rows, forward, static=config.rollout.cuda_graphs)


def synced_reference(models: RoleModels) -> LoadedAdapter | None:
    """What takes the policy's weights when the reference is reset; None where this process holds no such adapter."""
    if SYNCED_REFERENCE not in models.bindings:
        return None
    name = str(models.bindings[SYNCED_REFERENCE].adapter)
    return LoadedAdapter(models.stack_of(SYNCED_REFERENCE).peft, name, "scorer")


def value_init_role(config: PPOConfig, foreign: Collection[str] = ()) -> str:
    """The role the value model starts from: as the job says, else the first reward model that it can start from, else the policy.

    foreign: rewards that read text by themselves; a value model must read the policy's tokens. Raises ConfigError."""
    models = [role for r in config.rewards if r.name not in foreign for role in r.models(r.name)]
    if config.value.init_from is None:
        return models[0] if models and config.value.adapter == "own" else "policy"
    if config.value.init_from == "policy":
        return "policy"
    name = config.value.init_from.removeprefix("reward:")
    if name in foreign:
        raise ConfigError.at(
            "value.init_from",
            f"reward {name!r} has another tokenizer than the policy, or is an encoder; a value model reads the policy's tokens",
            "policy, or a reward model on the policy's own tokens",
            fix="set it to policy",
        )
    if name not in models:
        raise ConfigError.at(
            "value.init_from",
            f"reward {name!r} is no model that is loaded here",
            "a reward model",
            fix="set it to policy",
        )
    return name


def decoding(sampling: Any, stop_ids: tuple[int, ...]) -> Decoding:
    """A SamplingConfig as the generator takes it."""
    return Decoding(stop_ids, sampling.temperature, sampling.top_p, sampling.top_k, greedy=not sampling.do_sample)


def text_maker(backbone: Backbone, template: Template) -> Callable[[Rollout, Sequence[Row]], Texts]:
    """Replies as text without special tokens, prompts as the model saw them, and the rows' raw columns."""
    reply_text = decoder(backbone.tokenizer, template)

    def to_texts(rollout: Rollout, rows: Sequence[Row]) -> Texts:
        ids = [response[mask].tolist() for response, mask in zip(rollout.response_ids, rollout.response_mask)]
        prompts = [prompt[mask].tolist() for prompt, mask in zip(rollout.prompt_ids, rollout.prompt_mask)]
        responses = list(map(reply_text, prompts, ids))
        return Texts([template.render(row.prompt) for row in rows], responses, ids, [row.columns for row in rows])

    return to_texts


def _template(config: PPOConfig, assembly: Assembly) -> Template:
    told = config.template_date, config.chat_template_kwargs
    return load_template(config.template, assembly.base.tokenizer, *told)


def _base(config: PPOConfig, device: torch.device, place: Place | None = None) -> tuple[Assembly, ModelSpec | None]:
    assembly = Assembly(config, device, config.seed, config.stop_token_ids, place)
    return assembly, policy_source(config.sft) if config.sft is not None else None
