"""Who sits where in each process of a job, decided by the code that the job itself runs, on models without weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from rlhf_ray.config import (
    DPOConfig,
    EvaluateConfig,
    JobFields,
    LoraConfig,
    PipelineConfig,
    PolicySpec,
    PPOConfig,
    RewardConfig,
    RewardSource,
    SFTConfig,
)
from rlhf_ray.models.adapter_files import CONFIG, AdapterFiles, check_config, targets_of
from rlhf_ray.models.adapters import add_fresh, wrap
from rlhf_ray.models.assembly import BASE, Assembly
from rlhf_ray.models.backbone import Backbone
from rlhf_ray.models.loading import is_encoder
from rlhf_ray.models.role_models import RoleModels
from rlhf_ray.models.sources import ModelSource
from rlhf_ray.models.specs import ModelSpec, policy_source, reward_source
from rlhf_ray.models.tokenizer import tokenizer_of, tokenizer_sha256
from rlhf_ray.plan.meta_tracker import Device
from rlhf_ray.plan.skeleton import Head, read_config, skeleton
from rlhf_ray.ppo.models import add_generator_roles, add_learner_roles, add_scorer_roles
from rlhf_ray.stages.evaluation_models import add_evaluation_roles
from rlhf_ray.storage.files import read_json


@dataclass(frozen=True)
class Made:
    """Adapters that the job's earlier stages will make: run folder -> the shape of its adapter."""

    adapters: Mapping[str, LoraConfig] = field(default_factory=dict)

    @classmethod
    def by(cls, job: PipelineConfig) -> Made:
        shapes: dict[str, LoraConfig] = {}
        made = cls(shapes)
        for stage in job.stages:
            config = job.stage_config(stage)
            if isinstance(config, (SFTConfig, DPOConfig, RewardConfig, PPOConfig)):
                shapes[config.output_dir] = made.lora_of(config.sft) if config.sft else config.lora
        return made

    def source(self, spec: str, reward: bool = False) -> ModelSpec:
        if spec in self.adapters:
            return ModelSpec("adapter", spec)
        return reward_source(spec) if reward else policy_source(spec)

    def lora_of(self, path: str) -> LoraConfig:
        """The shape of a saved adapter, or of one to be made."""
        if path in self.adapters:
            return self.adapters[path]
        source = policy_source(path) if not (Path(path) / CONFIG).is_file() else ModelSpec("adapter", path)
        file = Path(source.path) / CONFIG
        config = check_config(read_json(file), str(file))
        targets = targets_of(Path(source.path), config["target_modules"])
        return LoraConfig(
            r=config["r"],
            lora_alpha=config["lora_alpha"],
            target_modules="all-linear" if isinstance(targets, str) else tuple(targets),
            target_parameters=tuple(config["target_parameters"]),
            use_rslora=config["use_rslora"],
        )


class PlannedAssembly(Assembly):
    """`Assembly` with bases and adapters that are only described."""

    def __init__(self, job: JobFields, device: Device, made: Made) -> None:
        self.target, self.made = device, made
        super().__init__(job, torch.device("meta"), seed=0)

    def _causal_lm(self, path: str, revision: str | None) -> Backbone:
        return skeleton(self.job, path, read_config(path, revision), self.target)

    def _classifier(self, path: str) -> Backbone:
        return skeleton(self.job, path, read_config(path, None, "rewards.model"), self.target, classifier=True)

    def _merged_base(self, files: AdapterFiles) -> Backbone:
        return self._causal_lm(self.job.model_name_or_path, self.job.revision)

    def _read(self, path: str) -> AdapterFiles:
        lora = self.made.lora_of(path)
        return AdapterFiles(lora.model_dump(), {}, torch.empty(1, self.base.hidden_size, device="meta"), "", path)

    def _read_more(self, path: str) -> AdapterFiles | None:
        return None if path in self.made.adapters else super()._read_more(path)

    def _load(self, stack: str, name: str, files: AdapterFiles, trainable: bool) -> None:
        self.put(stack, name, LoraConfig(**{**files.config, "preset": None}), trainable)

    def _copy(self, stack: str, source: str, target: str) -> None:
        config: Any = self.stacks[stack].peft.peft_config[source]
        modules, parameters = tuple(config.target_modules), tuple(config.target_parameters or ())
        lora = LoraConfig(r=config.r, target_modules=modules, target_parameters=parameters)
        self.put(stack, target, lora, trainable=False)

    def _fresh(self, stack: str, name: str, lora: LoraConfig, trained: bool = True) -> None:
        self.put(stack, name, lora, trainable=trained)

    def put(self, stack: str, name: str, lora: LoraConfig, trainable: bool) -> None:
        """An adapter of this shape. PEFT moves only a layer's first adapter to the meta device, so all are made there."""
        lora = lora.model_copy(update={"lora_dropout": 0.0})
        with torch.device("meta"):
            if isinstance(self.stacks[stack].model, PeftModel):
                add_fresh(self.stacks[stack].peft, name, lora, trainable=trainable)
            else:
                self._wrapped(stack, wrap(self.stacks[stack].backbone.model, lora, name))
        if trainable:
            self._mark_trained(stack, name)

    def _head(self, stack: str, name: str, weight: torch.Tensor | None, offset: float = 0.0) -> None:
        holder = self.stacks[stack]
        holder.heads[name] = Head(holder.backbone.hidden_size).to("meta")

    def _checkpointing(self) -> bool:
        wanted = self.job.gradient_checkpointing
        return self.target == "cuda" if wanted is None else wanted


def learner_models(job: PPOConfig, device: Device, made: Made) -> tuple[Assembly, RoleModels]:
    """Of a learner, with reference and rewards where every role is colocated."""
    assembly = PlannedAssembly(job, device, made)
    add_reward = partial(_add_reward, assembly, made)
    add_learner_roles(assembly, job, _start(job, made), add_reward, lambda: _foreign(job, made))
    return assembly, assembly.finish()


def generator_models(job: PPOConfig, device: Device, made: Made) -> tuple[Assembly, RoleModels]:
    assembly = PlannedAssembly(job, device, made)
    add_generator_roles(assembly, job, _start(job, made))
    return assembly, assembly.finish().requires_grad_(False)


def scorer_models(job: PPOConfig, device: Device, made: Made) -> tuple[Assembly, RoleModels]:
    assembly = PlannedAssembly(job, device, made)
    add_scorer_roles(assembly, job, _start(job, made), partial(_add_reward, assembly, made))
    return assembly, assembly.finish()


def supervised_models(
    job: SFTConfig | DPOConfig | RewardConfig, device: Device, made: Made
) -> tuple[Assembly, RoleModels]:
    """The base with adapter `trained` on it; of DPO also the frozen `reference`, where that is not the base itself."""
    assembly = PlannedAssembly(job, device, made)
    lora = made.lora_of(job.sft) if job.sft is not None else job.lora
    assembly.put(BASE, "trained", lora, trainable=True)
    if isinstance(job, DPOConfig) and job.sft is not None:
        assembly.put(BASE, "reference", lora, trainable=False)
    return assembly, assembly.finish()


def evaluation_models(job: EvaluateConfig, device: Device, made: Made) -> tuple[Assembly, RoleModels]:
    """Every policy and every reward of an evaluation."""
    assembly = PlannedAssembly(job, device, made)

    def add_policy(role: str, policy: PolicySpec) -> None:
        source = made.source(policy.policy or "base")
        same = source.kind == "full" and source.path == job.model_name_or_path
        assembly.add_policy(role, ModelSpec("base", "base") if same else source)

    def add_reward(role: str, reward: RewardSource) -> None:
        for name, path in reward.models(role).items():
            assembly.add_reward(name, made.source(path, reward=True))

    add_evaluation_roles(job, add_policy, add_reward)
    return assembly, assembly.finish()


def _start(job: PPOConfig, made: Made) -> ModelSpec | None:
    return made.source(job.sft) if job.sft is not None else None


def _add_reward(assembly: Assembly, made: Made, reward: RewardSource, load: Collection[str]) -> None:
    for role, path in reward.models(reward.name).items():
        if role in load:
            assembly.add_reward(role, made.source(path, reward=True))


def _foreign(job: PPOConfig, made: Made) -> set[str]:
    """Rewards that read text by themselves: encoders, and those with another tokenizer than the base's. Where a tokenizer is not on
    this machine it is taken for the same."""
    models = {r.name: made.source(path, reward=True) for r in job.rewards for path in r.models(r.name).values()}
    own, whole = _tokenizer(job.model_name_or_path), {n: s.path for n, s in models.items() if s.kind == "full"}
    theirs = {name: _tokenizer(path) for name, path in whole.items()}
    found = {name for name, sha256 in theirs.items() if own is not None and sha256 not in (None, own)}
    return found | {name for name, path in whole.items() if is_encoder(read_config(path, None, "rewards.model"))}


def _tokenizer(path: str) -> str | None:
    folder = Path(path).expanduser()
    if not (folder / "tokenizer.json").is_file():
        return None
    return tokenizer_sha256(tokenizer_of(ModelSource(folder, path)))
