"""Puts the rewards of a job on its loaded models: what ppo and evaluate share."""

from __future__ import annotations

from typing import Any

from rlhf_ray.config import RewardSource
from rlhf_ray.data.templates import Template, load_template
from rlhf_ray.errors import ArtifactError
from rlhf_ray.models.assembly import Assembly
from rlhf_ray.models.lineage import check_lineage, header_line, parent_of, recorded_reward, recorded_template
from rlhf_ray.models.sources import resolve_source
from rlhf_ray.models.specs import ModelSpec, reward_source
from rlhf_ray.models.tokenizer import tokenizer_of, tokenizer_sha256
from rlhf_ray.models.zero3 import MaxOverRanks
from rlhf_ray.rewards.retokenised import Reader, RetokenisedReward, Reward
from rlhf_ray.rewards.scoring_model import reader_of
from rlhf_ray.rewards.sources import FunctionReward, ModelReward


class RewardRoles:
    """`add` each reward of the job, finish the assembly, then `build`.

    template: of the job.  template_name: as the job file has it.  readers: by role, of those with a tokenizer of their own.
    parents: what a manifest records.  lines, warnings: for the header."""

    def __init__(self, assembly: Assembly, template: Template, template_name: str) -> None:
        self.assembly, self.template, self.template_name = assembly, template, template_name
        self.roles: list[tuple[RewardSource, str]] = []
        self.readers: dict[str, Reader] = {}
        self.functions: dict[str, FunctionReward] = {}
        self.parents: list[dict[str, str]] = []
        self.lines: list[str] = []
        self.warnings: list[str] = []

    def add(self, reward: RewardSource, role: str, label: str | None = None, load: bool = True) -> None:
        """Load it as `role` and check its lineage. Raises ConfigError, ArtifactError.

        label: how a manifest's parents call it; default: `role`.   load: false checks and records it, another process scores."""
        label = label or role
        self.roles.append((reward, role))
        if reward.function is not None:
            function = FunctionReward(reward.name, reward.weight, reward.function)
            self.functions[role] = function
            self.parents.append({"role": label, "path": function.spec, "sha256": function.sha256})
            self.lines.append(header_line("reward", f"{reward.name}: Python function {function.spec}"))
            return
        source = reward_source(reward.run or reward.model or "")
        foreign = self._has_own_tokenizer(source)
        self.warnings += check_lineage(
            source,
            self.assembly.base.identity,
            None if foreign else self.template,
            role=label,
            same_tokenizer=not foreign,
        )
        self.parents.append(parent_of(source, label).manifest())
        self.lines.append(header_line("reward", f"{reward.name}: {source.describe()}"))
        if load:
            self.assembly.add_reward(role, source)
        if not foreign and recorded_reward(source).get("add_eos_token") is False:
            self.warnings.append(
                f"{label}: was trained on replies without their end token, and scores sampled ones with it: train it with"
                " add_eos_token: true"
            )
        if foreign:
            if load:
                self._read_text(reward, source, role)
        elif reward.template is not None:
            raise ArtifactError.at(
                f"rewards.{reward.name}.template",
                "is set, and the reward model reads the policy's own tokens",
                "a template only where the reward model has another tokenizer",
                fix="drop it",
            )

    def kinds_of_parents(self) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
        """`parents`: of models, and of functions."""
        specs = {function.spec for function in self.functions.values()}
        models = [parent for parent in self.parents if parent["path"] not in specs]
        return models, [parent for parent in self.parents if parent["path"] in specs]

    def build(self, models: Any, rows_per_forward: int, max_over_ranks: MaxOverRanks = int) -> list[Reward]:
        """What scores, in the job's order, over the finished models. agree: as the scorer's."""
        return [self._build(reward, role, models, rows_per_forward, max_over_ranks) for reward, role in self.roles]

    def _build(
        self, reward: RewardSource, role: str, models: Any, rows_per_forward: int, max_over_ranks: MaxOverRanks
    ) -> Reward:
        if role in self.functions:
            return self.functions[role]
        if role in self.readers:
            reader, writer = self.readers[role], self.assembly.base
            return RetokenisedReward(
                reward.name, reward.weight, models, role, reader, writer, rows_per_forward, max_over_ranks
            )
        return ModelReward(reward.name, reward.weight, models, role)

    def is_foreign(self, reward: RewardSource) -> bool:
        """Whether it reads text through a tokenizer of its own. Loads nothing."""
        return reward.function is None and self._has_own_tokenizer(reward_source(reward.run or reward.model or ""))

    def _has_own_tokenizer(self, source: ModelSpec) -> bool:
        """A whole checkpoint with another tokenizer; an adapter stands on the job's base, so it reads what that reads."""
        if source.kind != "full":
            return False
        return (
            tokenizer_sha256(tokenizer_of(resolve_source(source.path))) != self.assembly.base.identity.tokenizer_sha256
        )

    def _read_text(self, reward: RewardSource, source: ModelSpec, role: str) -> None:
        backbone = self.assembly.stacks[self.assembly.bindings[role].stack].backbone
        name = reward.template or recorded_template(source) or self.template_name
        prompt_template = load_template(name, backbone.tokenizer)
        self.readers[role] = reader_of(source, backbone, prompt_template)
        how = f"replies are decoded, put in template {prompt_template.name}, encoded again"
        self.lines.append(header_line("", f"{reward.name} has its own tokenizer: {how}"))
