"""Policies and rewards on loaded models, ready to answer prompts side by side: what `evaluate` and `generate` share.

One base carries every policy that is an adapter on it; a whole checkpoint brings its own. Every policy answers the same prompts
with the same row seeds, so that what differs between two replies is the policies' doing. Best-of-n (`best_of`) samples n replies to
each prompt, the first of them with the seed that the others have, and answers with the best under a reward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch

from rlhf_ray.batches import Rollout
from rlhf_ray.config import EvaluateConfig, PolicySpec, RewardSource
from rlhf_ray.data.collate import Tokenised, TokenisedPrompt, tokenise_prompts
from rlhf_ray.data.records import Row
from rlhf_ray.data.templates import Template, load_template
from rlhf_ray.data.tokenise import TooLong
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.assembly import Assembly
from rlhf_ray.models.backbone import Backbone
from rlhf_ray.models.batching import Batching
from rlhf_ray.models.context import rope_note, shortened_note
from rlhf_ray.models.lineage import check_lineage, header_line, parent_of
from rlhf_ray.models.role_models import RoleModels
from rlhf_ray.models.sources import resolve_source
from rlhf_ray.models.specs import ModelSpec, policy_source
from rlhf_ray.ppo.models import decoding, text_maker
from rlhf_ray.rewards.build import ANSWERS, RewardBuilder
from rlhf_ray.rewards.llm_judge import LLMJudge
from rlhf_ray.rewards.protocol import Reward, Texts
from rlhf_ray.rewards.sources import none_broken
from rlhf_ray.roles.checked_generator import CheckedGenerator
from rlhf_ray.roles.collector import Collected, LocalCollector
from rlhf_ray.roles.generator import ActiveAdapter
from rlhf_ray.roles.heldout import HeldOut
from rlhf_ray.roles.invariants import tolerance
from rlhf_ray.roles.scorer import Scorer
from rlhf_ray.runtime.session import Session
from rlhf_ray.sampler.engine import Sampler, rows_at_once
from rlhf_ray.stages.other_policies import Replies, ServedPolicy, as_rollout, replies_in_file
from rlhf_ray.storage.answers import Answers
from rlhf_ray.storage.run_folder import sha256_file

RANDOMNESS = "evaluate"
"""Role of the row seeds: apart from those of training rollouts."""


@dataclass(frozen=True)
class PolicyResponses:
    """One policy's replies to all prompts, in prompt order: per-reply figures and texts. k1 and k3 are NaN where they say nothing
    of a KL: of a policy that is not loaded here, of a choice among replies, without a reference, and in an evaluation whose replies
    are not drawn from the whole distribution (`answer_all`)."""

    figures: HeldOut
    texts: Texts


@dataclass(frozen=True)
class Policy:
    """role: its name among the loaded models.  active: which adapter samples."""

    name: str
    role: str
    source: ModelSpec
    active: ActiveAdapter


@dataclass(frozen=True)
class OtherPolicy:
    """A policy that is not loaded here. Either `served`, or `outputs`, {canonical prompt: reply}."""

    name: str
    served: ServedPolicy | None = None
    outputs: Mapping[str, str] | None = None


@dataclass
class EvaluationModels:
    """Made by `load_evaluation_models`. parents: what a manifest records of every policy and reward.  lines, warnings: for the
    header.

    reference: name of the policy that KL is measured against, None for no KL.  judges: LLM judges by name.
    readers: stacks of rewards that read text by themselves, and cut it to what they can read."""

    config: EvaluateConfig
    session: Session
    backbone: Backbone
    template: Template
    models: RoleModels
    policies: dict[str, Policy | OtherPolicy]
    rewards: list[Reward]
    reference: str | None
    parents: list[dict[str, str]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    judges: dict[str, LLMJudge] = field(default_factory=dict)
    readers: frozenset[str] = frozenset()

    def loaded(self) -> list[Policy]:
        """The policies that are models here, in the job's order."""
        return [policy for policy in self.policies.values() if isinstance(policy, Policy)]

    @property
    def limit(self) -> int:
        """Tokens of prompt and reply together: what every model that sees them can read, or max_length if that is less."""
        context = self._shortest().context_length
        return min(self.config.max_length or context, context)

    def _shortest(self) -> Backbone:
        """Of the bases that see the tokens, the one that reads the fewest."""
        stacks: Any = self.models.stacks.items()
        bases = [stack.backbone for name, stack in stacks if name not in self.readers]
        return min(bases, key=lambda base: base.context_length)

    def notes(self) -> list[str]:
        """A line if replies are shorter than the job allows."""
        shortest, wanted = self._shortest(), self.config.max_length or 0
        if wanted <= shortest.context_length:
            return []
        return [shortened_note(wanted, shortest.context_length, shortest.model.config.get_text_config())]

    def tokenise(self, rows: Sequence[Row], too_long: TooLong) -> Tokenised[TokenisedPrompt]:
        """Prompts that leave room for the longest reply. Raises ConfigError if none could, DataError."""
        longest = self.config.response_length
        if longest >= self.limit:
            rope = rope_note(self._shortest().model.config.get_text_config())
            expected = f"below {self.limit} (max_length, or the shortest context of the models{rope})"
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
        spec = next(p for p in self.config.policies if p.name == name)
        rows, policy = list(prompts) * spec.best_of, self.policies[name]
        found = self._read(policy, rows) if isinstance(policy, OtherPolicy) else self._sample(policy, rows)
        for reward, values in found.figures.parts.items():
            none_broken(values, f"policy {name}, reward {reward}")
        if spec.best_of > 1:
            return best_of(found, spec.best_of, self._chooser(spec))
        return found

    def _chooser(self, spec: PolicySpec) -> RewardSource:
        rewards = self.config.rewards
        return next((r for r in rewards if r.name == spec.best_of_reward), rewards[0])

    def _read(self, policy: OtherPolicy, prompts: Sequence[TokenisedPrompt]) -> PolicyResponses:
        """Replies that were written elsewhere, scored on rank 0: other ranks would ask the same servers the same."""

        def work() -> tuple[PolicyResponses, int]:
            if policy.served is not None:
                replies = policy.served.answer(prompts, RANDOMNESS)
            else:
                texts = [(policy.outputs or {})[prompt.row.prompt.canonical()] for prompt in prompts]
                replies = Replies(texts, [True] * len(texts))
            end = self.backbone.stop_ids(self.template)[0]
            rollout, cut = as_rollout(prompts, replies, self.backbone, end, self.limit)
            rows = [prompt.row for prompt in prompts]
            ids = [response[mask].tolist() for response, mask in zip(rollout.response_ids, rollout.response_mask)]
            texts_ = Texts(
                [self.template.render(row.prompt) for row in rows], replies.texts, ids, [row.columns for row in rows]
            )
            scorer = self._scorer(lambda *_: texts_, Batching(self.config.per_device_eval_batch_size), None)
            collected = Collected(rollout, scorer.score(rollout, rows), {})
            return PolicyResponses(without_kl(HeldOut.of(collected)), texts_), cut

        found, cut = self.session.on_main(work)
        if cut and self.session.is_main:
            what = f"{cut} of {len(prompts)} replies are longer than the models here can read"
            self.session.console.warn(f"{policy.name}: {what}: reward models see their start, and lengths count that")
        return cast(PolicyResponses, found)

    def _sample(self, policy: Policy, prompts: Sequence[TokenisedPrompt]) -> PolicyResponses:
        stack, config = self.models.stack_of(policy.role), self.config
        to_texts = text_maker(self.backbone, self.template)
        quantised = config.load_in_8bit or config.load_in_4bit
        pad_id, device = self.backbone.pad_id, self.session.device
        batching = Batching(config.per_device_eval_batch_size)
        at_once = rows_at_once(config.sampler_rows, config.rollout_chunk_size, device.type)
        generator = CheckedGenerator(
            Sampler(stack.model, stack.backbone.pad_id, at_once),
            pad_id,
            config.seed,
            self.models,
            policy.role,
            batching,
            device,
            tolerance(stack.backbone.dtype, quantised),
        )
        collector = LocalCollector(
            generator,
            self._scorer(to_texts, batching, self.reference),
            self.session,
            config.rollout_chunk_size,
            pad_id,
        )
        how = decoding(config.sampling, stack.backbone.stop_ids(self.template))
        budgets = [config.response_length] * len(prompts)
        collected = collector.collect(prompts, budgets, policy.active, how, RANDOMNESS, 0)
        figures = HeldOut.of(collected)
        if self.reference is None:
            figures = without_kl(figures)
        return PolicyResponses(figures, to_texts(collected.rollout, [p.row for p in prompts]))

    def _scorer(
        self, to_texts: Callable[[Rollout, Sequence[Row]], Texts], batching: Batching, against: str | None
    ) -> Scorer:
        found = self.policies[against] if against is not None else None
        reference = found.role if isinstance(found, Policy) else None
        temperature, device = self.config.sampling.temperature, self.session.device
        return Scorer(self.models, self.rewards, to_texts, temperature, batching, device, reference)


def best_of(found: PolicyResponses, n: int, chooser: RewardSource) -> PolicyResponses:
    """The best of n replies to each prompt. found: of all prompts n times over, one block of all prompts after the other.

    The highest score under `chooser` (the lowest of a cost, which has a negative weight), the first of equal ones; a reply that the
    reward does not apply to is taken only where there is no other."""
    sign = -1.0 if chooser.weight < 0 else 1.0
    scores = (sign * found.figures.parts[chooser.name]).nan_to_num(-torch.inf).reshape(n, -1)
    rows = scores.argmax(dim=0) * scores.shape[1] + torch.arange(scores.shape[1])
    texts = found.texts
    parts = (
        [part[i] for i in rows.tolist()]
        for part in (texts.prompts, texts.completions, texts.completion_ids, texts.columns)
    )
    return PolicyResponses(without_kl(found.figures.where(rows)), Texts(*parts))


def without_kl(figures: HeldOut) -> HeldOut:
    unknown = torch.full_like(figures.k1, torch.nan)
    return replace(figures, k1=unknown, k3=unknown)


def add_evaluation_roles(
    config: EvaluateConfig,
    add_policy: Callable[[str, PolicySpec], None],
    add_reward: Callable[[str, RewardSource], None],
) -> None:
    """Every policy that is loaded here and every reward of the job under its role. Used on loaded models and, by `plan`, on planned
    ones. Roles are numbered, since a policy's name need not be a legal adapter name."""
    for number, policy in enumerate(config.policies):
        if policy.policy is not None:
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
    policies: dict[str, Policy | OtherPolicy] = {p.name: builder.other(p) for p in config.policies if p.policy is None}

    def add_policy(role: str, policy: PolicySpec) -> None:
        policies[policy.name] = builder.policy(policy.name, policy.policy or "base", role)

    def add_reward(role: str, reward: RewardSource) -> None:
        roles.add(reward, role, f"reward:{reward.name}")

    add_evaluation_roles(config, add_policy, add_reward)
    models = assembly.finish()
    bases = [stack.backbone.identity.path for stack in assembly.stacks.values()]
    notes = [note for stack in assembly.stacks.values() for note in stack.backbone.notes]
    found = EvaluationModels(
        config,
        session,
        assembly.base,
        template,
        models,
        policies,
        roles.build(models, Batching(config.per_device_eval_batch_size), session.device),
        reference,
        [*builder.parents, *roles.parents],
        [*builder.lines, *roles.lines, header_line("bases", f"{len(bases)} loaded: {', '.join(bases)}")],
        [*builder.warnings, *roles.warnings, *dict.fromkeys(notes)],
        roles.judges,
        frozenset(assembly.bindings[role].stack for role in roles.readers),
    )
    found.warnings += found.notes()
    return found


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
        self.lines.append(header_line("policy", f"{name}: {here.describe()}"))
        return Policy(name, role, source, ActiveAdapter(self.assembly.bindings[role].adapter, 0, sha256))

    def other(self, spec: PolicySpec) -> OtherPolicy:
        """A policy that is not loaded: its replies are read, or its endpoint is looked for."""
        job = self.assembly.job
        assert isinstance(job, EvaluateConfig)
        if spec.endpoint is not None:
            self.lines.append(header_line("policy", f"{spec.name}: {spec.endpoint.model} at {spec.endpoint.base_url}"))
            answers = Answers(Path(job.output_dir).absolute() / ANSWERS / f"policy_{spec.name}")
            return OtherPolicy(spec.name, ServedPolicy(spec.name, spec.endpoint, job, answers))
        path = str(spec.outputs)
        self.parents.append({"role": f"policy:{spec.name}", "path": path, "sha256": sha256_file(Path(path))})
        outputs = replies_in_file(spec, job)
        self.lines.append(header_line("policy", f"{spec.name}: {len(outputs):,} replies in {path}"))
        return OtherPolicy(spec.name, outputs=outputs)

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
