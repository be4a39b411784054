"""Policies and rewards on loaded models, ready to answer prompts side by side: what `evaluate` and `generate` share.

One base carries every policy that is an adapter on it; a whole checkpoint brings its own. Every policy answers the same prompts
with the same row seeds, so that what differs between two replies is the policies' doing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_ray.batches import Rollout
from rlhf_ray.config import EvaluateConfig, PolicySpec, RewardSource
from rlhf_ray.data.collate import Tokenised, TokenisedPrompt, tokenise_prompts
from rlhf_ray.data.records import Row
from rlhf_ray.data.templates import Template, load_template
from rlhf_ray.data.tokenise import TooLong
from rlhf_ray.errors import ArtifactError, ConfigError
from rlhf_ray.models.assembly import Assembly
from rlhf_ray.models.backbone import Backbone
from rlhf_ray.models.lineage import check_lineage, header_line, parent_of
from rlhf_ray.models.role_models import RoleModels
from rlhf_ray.models.sources import resolve_source
from rlhf_ray.models.specs import ModelSpec, policy_source
from rlhf_ray.ppo.models import decoding, text_maker
from rlhf_ray.rewards.build import RewardBuilder
from rlhf_ray.rewards.protocol import Reward, Texts
from rlhf_ray.rewards.sources import none_broken
from rlhf_ray.roles.checked_generator import CheckedGenerator
from rlhf_ray.roles.collector import LocalCollector
from rlhf_ray.roles.generator import ActiveAdapter
from rlhf_ray.roles.heldout import HeldOut
from rlhf_ray.roles.invariants import tolerance
from rlhf_ray.roles.scorer import Scorer
from rlhf_ray.runtime.session import Session
from rlhf_ray.sampler.engine import Sampler, rows_at_once

RANDOMNESS = "evaluate"
"""Role of the row seeds: apart from those of training rollouts."""


@dataclass(frozen=True)
class PolicyResponses:
    """One policy's replies to all prompts, in prompt order: per-reply figures and texts."""

    figures: HeldOut
    texts: Texts


@dataclass(frozen=True)
class Policy:
    """role: its name among the loaded models.  active: which adapter samples."""

    name: str
    role: str
    source: ModelSpec
    active: ActiveAdapter


@dataclass
class EvaluationModels:
    """Made by `load_evaluation_models`. parents: what a manifest records of every policy and reward.  lines, warnings: for the
    header.

    reference: name of the policy that KL is measured against, None for no KL."""

    config: EvaluateConfig
    session: Session
    backbone: Backbone
    template: Template
    models: RoleModels
    policies: dict[str, Policy]
    rewards: list[Reward]
    reference: str | None
    parents: list[dict[str, str]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def limit(self) -> int:
        """Tokens of prompt and reply together: what every model involved can read, or max_length if that is less."""
        stacks: Any = self.models.stacks.values()
        context = min(stack.backbone.context_length for stack in stacks)
        return min(self.config.max_length or context, context)

    def tokenise(self, rows: Sequence[Row], too_long: TooLong) -> Tokenised[TokenisedPrompt]:
        """Prompts that leave room for the longest reply. Raises ConfigError if none could, DataError."""
        longest = self.config.response_length
        if longest >= self.limit:
            expected = f"below {self.limit} (max_length, or the shortest context of the models)"
            raise ConfigError.at("response_length", "leaves no room for a prompt", expected, str(longest))
        return tokenise_prompts(
            rows,
            self.template,
            self.backbone.tokenizer,
            max_length=self.limit,
            response_length=longest,
            too_long=too_long,
            on_bad_row=self.config.data.on_bad_row,
            special_tokens=self.config.data.special_tokens,
        )

    def answer(self, name: str, prompts: Sequence[TokenisedPrompt]) -> PolicyResponses:
        """Sample and score a reply of policy `name` to each prompt. Every rank calls it and gets all rows."""
        policy = self.policies[name]
        stack, config = self.models.stack_of(policy.role), self.config
        to_texts = text_maker(self.backbone, self.template)
        quantised = config.load_in_8bit or config.load_in_4bit
        pad_id, rows, device = self.backbone.pad_id, config.per_device_eval_batch_size, self.session.device
        at_once = rows_at_once(config.sampler_rows, config.rollout_chunk_size, device.type)
        generator = CheckedGenerator(
            Sampler(stack.model, stack.backbone.pad_id, at_once),
            pad_id,
            config.seed,
            self.models,
            policy.role,
            rows,
            device,
            tolerance(stack.backbone.dtype, quantised),
        )
        collector = LocalCollector(
            generator, self._scorer(to_texts, rows), self.session, config.rollout_chunk_size, pad_id
        )
        how = decoding(config.sampling, stack.backbone.stop_ids(self.template))
        budgets = [config.response_length] * len(prompts)
        collected = collector.collect(prompts, budgets, policy.active, how, RANDOMNESS, 0)
        for reward, values in collected.scores.parts.items():
            none_broken(values, f"policy {name}, reward {reward}")
        return PolicyResponses(HeldOut.of(collected), to_texts(collected.rollout, [p.row for p in prompts]))

    def _scorer(self, to_texts: Callable[[Rollout, Sequence[Row]], Texts], rows: int) -> Scorer:
        reference = self.policies[self.reference].role if self.reference is not None else None
        temperature, device = self.config.sampling.temperature, self.session.device
        return Scorer(self.models, self.rewards, to_texts, temperature, rows, device, reference)


def add_evaluation_roles(
    config: EvaluateConfig,
    add_policy: Callable[[str, PolicySpec], None],
    add_reward: Callable[[str, RewardSource], None],
) -> None:
    """Every policy and every reward of the job under its role. Used on loaded models and, by `plan`, on planned ones. Roles are
    numbered, since a policy's name need not be a legal adapter name."""
    for number, policy in enumerate(config.policies):
        add_policy(f"policy_{number}", policy)
    for number, reward in enumerate(config.rewards):
        add_reward(f"reward_{number}", reward)


def load_evaluation_models(config: EvaluateConfig, session: Session, reference: str | None) -> EvaluationModels:
    """Load the base, every policy of the job and every reward, with base, tokenizer and template of each checked.

    Raises ConfigError for what does not exist, ArtifactError for what does not fit."""
    assembly = Assembly(config, session.device, config.seed, config.stop_token_ids)
    template = load_template(
        config.template, assembly.base.tokenizer, config.template_date, config.chat_template_kwargs
    )
    builder = _PolicyLoader(assembly, template)
    roles = RewardBuilder(assembly, template, config.template)
    policies: dict[str, Policy] = {}

    def add_policy(role: str, policy: PolicySpec) -> None:
        policies[policy.name] = builder.policy(policy.name, policy.policy, role)

    def add_reward(role: str, reward: RewardSource) -> None:
        roles.add(reward, role, f"reward:{reward.name}")

    add_evaluation_roles(config, add_policy, add_reward)
    models = assembly.finish()
    bases = [stack.backbone.identity.path for stack in assembly.stacks.values()]
    return EvaluationModels(
        config,
        session,
        assembly.base,
        template,
        models,
        policies,
        roles.build(models, config.per_device_eval_batch_size, session.device),
        reference,
        [*builder.parents, *roles.parents],
        [*builder.lines, *roles.lines, header_line("bases", f"{len(bases)} loaded: {', '.join(bases)}")],
        [*builder.warnings, *roles.warnings],
    )


def decoding_line(config: EvaluateConfig) -> str:
    """How replies are decoded, for the header."""
    sampling = config.sampling
    knobs = f"temperature {sampling.temperature:g}, top_p {sampling.top_p:g}, top_k {sampling.top_k}"
    how = knobs if sampling.do_sample else "greedy"
    return f"{how}, at most {config.response_length} tokens, seed {config.seed}"


class _PolicyLoader:
    """Puts policies on an assembly."""

    def __init__(self, assembly: Assembly, template: Template) -> None:
        self.assembly, self.template = assembly, template
        self.parents: list[dict[str, str]] = []
        self.lines: list[str] = []
        self.warnings: list[str] = []

    def policy(self, name: str, spec: str, role: str) -> Policy:
        source = policy_source(spec)
        sha256 = self._check(source, f"policy:{name}")
        here = ModelSpec("base", "base") if self._is_base(source) else source
        self.assembly.add_policy(role, here)
        files = self.assembly.files.get(role)
        if files is not None and files.head is not None:
            raise ArtifactError.at(spec, "is a reward model", "a policy", "an adapter with a reward head")
        self.lines.append(header_line("policy", f"{name}: {here.describe()}"))
        return Policy(name, role, source, ActiveAdapter(self.assembly.bindings[role].adapter, 0, sha256))

    def _check(self, source: ModelSpec, role: str) -> str:
        """Refuse what does not fit this base and template, note where it is from, and return its hash."""
        identity = self.assembly.base.identity
        if source.kind == "base":
            parent = {"role": role, "path": identity.path, "sha256": identity.weights_sha256}
        else:
            self.warnings += check_lineage(source, identity, self.template, role=role)
            parent = parent_of(source, role).manifest()
        self.parents.append(parent)
        return parent["sha256"]

    def _is_base(self, source: ModelSpec) -> bool:
        """A whole checkpoint that is the job's base already, and need not be loaded twice."""
        return source.kind == "full" and resolve_source(source.path).name == self.assembly.base.identity.path
