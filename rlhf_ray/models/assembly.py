"""Builds the models of a job: one loaded base per distinct base, named adapters and heads on it, and who sits where.

One base carries the policy, its reference, the value model and every reward that is an adapter on it. A merged or full reward
model, or a policy that is a whole checkpoint, brings a base of its own; two roles that name the same checkpoint share it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from rlhf_ray.config import DPOConfig, JobFields, LoraConfig, PPOConfig, RewardConfig, SFTConfig
from rlhf_ray.errors import ArtifactError, ConfigError
from rlhf_ray.models.adapter_files import policy_files
from rlhf_ray.models.adapters import (
    AdapterFiles,
    adapter_config,
    add_fresh,
    add_from_files,
    copy_adapter,
    gradient_checkpointing,
    read_adapter,
    set_trainable,
    wrap,
)
from rlhf_ray.models.backbone import Backbone, load_backbone, load_classifier, trunk
from rlhf_ray.models.heads import ScalarHead
from rlhf_ray.models.lineage import header_line
from rlhf_ray.models.merge import merge_in_memory
from rlhf_ray.models.merge_by_peft import more_than_lora, read_for_merge
from rlhf_ray.models.packing import packing_of
from rlhf_ray.models.role_models import AdapterStack, RoleBinding, RoleModels
from rlhf_ray.models.shared_base import Place
from rlhf_ray.models.specs import ModelSpec

BASE = "base"
SYNCED_REFERENCE = "synced_reference"


class Assembly:
    """Add roles, then `finish`. `device`: where everything goes. `seed`: of fresh adapters.

    place: on bases that other runs of this process share; None: bases of its own.

    lineage: one line per role, for the header of the run."""

    def __init__(
        self,
        job: JobFields,
        device: torch.device,
        seed: int,
        stop_token_ids: tuple[int, ...] | None = None,
        place: Place | None = None,
    ) -> None:
        self.job, self.device, self.seed, self.place = job, device, seed, place
        self.stop_token_ids = stop_token_ids
        self.stacks: dict[str, AdapterStack] = {}
        self.bindings: dict[str, RoleBinding] = {}
        self.trained: dict[str, list[str]] = {}
        self.lineage: list[str] = []
        self.files: dict[str, AdapterFiles] = {}
        self.loaded: dict[str, str] = {}
        self.base = self._causal_lm(job.model_name_or_path, job.revision)
        self.stacks[BASE] = self._stack(self.base)

    def add_policy(self, role: str, source: ModelSpec) -> None:
        """A frozen policy: the base, an adapter on it, or a whole checkpoint. One that is more than plain LoRA is merged into
        a base of its own."""
        if source.kind == "base":
            self.bindings[role] = RoleBinding(BASE, None)
        elif source.kind == "adapter":
            more = self._read_more(source.path) if source.run is None else None
            if more is not None:
                self.bindings[role] = RoleBinding(self._merged(more), None)
            else:
                adapter = self._saved(BASE, role, policy_files(self._read(source.path), source.path), trainable=False)
                self.bindings[role] = RoleBinding(BASE, adapter)
        else:
            self.bindings[role] = RoleBinding(self._full(source, "causal_lm"), None)
        self.lineage.append(header_line(role, source.describe()))

    def add_trained_policy(self, source: ModelSpec | None, lora: LoraConfig, with_reference: bool = True) -> None:
        """`policy`, trainable, and `reference`, what it starts from: the SFT adapter frozen, or the base with adapters off.

        with_reference: false where another process holds the reference."""
        policy = self._name("policy")
        if source is None or source.kind == "base":
            self._fresh(BASE, policy, lora)
            if with_reference:
                self.bindings["reference"] = RoleBinding(BASE, None)
            self.lineage += [
                header_line("policy", "fresh adapter (B = 0) on the base"),
                header_line("reference", "the base, adapters off"),
            ]
        elif source.kind == "adapter":
            files = policy_files(self._read(source.path), source.path)
            self._saved(BASE, "policy", files, trainable=True)
            if with_reference:
                self.bindings["reference"] = RoleBinding(BASE, self._saved(BASE, "reference", files, trainable=False))
            self.lineage += [
                header_line("policy", f"copy of adapter {source.path}"),
                header_line("reference", f"adapter {source.path}, frozen"),
            ]
        else:
            raise ConfigError.at(
                "sft",
                "is a whole checkpoint, not an adapter",
                "an SFT run or a PEFT adapter folder",
                source.path,
                "set model_name_or_path to it and drop sft: the policy is then a fresh adapter on it",
            )
        self.bindings["policy"] = RoleBinding(BASE, policy)

    def add_synced_reference(self, lora: LoraConfig) -> None:
        """`synced_reference`, frozen, of the policy's shape: holds the policy as it was when the reference was reset.

        lora: of the policy, where it is fresh. The policy, or the reference that it starts from, must be there."""
        binding = self.bindings.get("policy") or self.bindings["reference"]
        name = self._name(SYNCED_REFERENCE)
        if binding.adapter is not None:
            self._copy(BASE, binding.adapter, name)
        else:
            self._fresh(BASE, name, lora, trained=False)
        self.bindings[SYNCED_REFERENCE] = RoleBinding(BASE, name)

    def add_reward(self, role: str, source: ModelSpec) -> None:
        """A reward model: an adapter with a scalar head on the base, or a classifier of its own, which may be an encoder."""
        if source.kind == "adapter":
            files = self._read(source.path)
            if files.head is None:
                raise ArtifactError.at(
                    source.path, "has no reward head", "the adapter of a reward run", "a policy adapter"
                )
            adapter = self._saved(BASE, role, files, trainable=False)
            self._head(BASE, role, files.head, files.offset)
            self.base.notes = tuple(dict.fromkeys((*self.base.notes, *files.notes)))
            self.bindings[role] = RoleBinding(BASE, adapter, role)
        else:
            stack = self._full(source, "classifier")
            if self.stacks[stack].backbone.is_encoder:
                self.bindings[role] = RoleBinding(stack, None)
                return
            classifier: Any = self.stacks[stack].backbone.model
            score = classifier.score
            self._head(stack, role, score.weight.detach(), 0.0 if score.bias is None else float(score.bias))
            self.bindings[role] = RoleBinding(stack, None, role)

    def add_value(self, init_from: str, adapter: str, lora: LoraConfig | None) -> None:
        """`value`, trainable, with a head that starts at zero.

        init_from: `policy`, or the role of a reward.   adapter: `shared` puts the head on the policy's own adapter.
        lora: the adapter when it is fresh. ConfigError if it is set where the value model copies a reward adapter."""
        if adapter == "shared":
            self.bindings["value"] = RoleBinding(BASE, self._name("policy"), "value")
            self._head(BASE, "value", None)
            self.lineage.append(header_line("value", "head on the policy's own adapter"))
            return
        binding, name = self.bindings[init_from], self._name("value")
        if binding.adapter is not None and lora is not None and init_from != "policy":
            raise ConfigError.at(
                "value.lora", f"the value model copies the r, alpha and targets of {init_from}", fix="drop value.lora"
            )
        if binding.adapter is not None and lora is None:
            self._copy(binding.stack, binding.adapter, name)
            self._mark_trained(binding.stack, name)
            how = f"copy of the adapter of {init_from}"
        else:
            self._fresh(binding.stack, name, lora or self._policy_shape())
            how = f"fresh adapter on the trunk of {init_from}"
        self._head(binding.stack, "value", None)
        self.bindings["value"] = RoleBinding(binding.stack, name, "value")
        self.lineage.append(header_line("value", f"{how}, head zero"))

    def finish(self) -> RoleModels:
        """All models in one module; only the trained adapters and heads need gradients."""
        models = RoleModels(self.stacks, self.bindings)
        models.requires_grad_(False)
        models.eval()
        for stack, names in self.trained.items():
            set_trainable(self.stacks[stack].peft, tuple(names))
        if "value" in self.bindings:
            models.head_of("value").requires_grad_(True)
        if self._checkpointing():
            models.recompute = True
            for stack in self.trained:
                gradient_checkpointing(self.stacks[stack].peft)
        if isinstance(self.job, PPOConfig) and self.job.has_packed_rows:
            for backbone in [holder.backbone for holder in self.stacks.values() if not holder.backbone.is_encoder]:
                body, kernel = trunk(backbone.model), backbone.attn_implementation
                backbone.packing = packing_of(body, kernel, skips=not models.recompute)
        if self.place is not None:
            self.place.trains(models)
        return models

    def describe(self) -> list[str]:
        """Header lines: which role is what, and how many bases are loaded."""
        bases = [s.backbone.identity.path for s in self.stacks.values()]
        shared = "all roles are adapters on it" if len(bases) == 1 else "one per distinct checkpoint"
        return [*self.lineage, header_line("bases", f"{len(bases)} loaded ({shared}): {', '.join(bases)}")]

    def _checkpointing(self) -> bool:
        wanted = self.job.gradient_checkpointing
        return self.device.type == "cuda" if wanted is None else wanted

    def _policy_shape(self) -> LoraConfig:
        config = adapter_config(self.stacks[BASE].peft, self._name("policy"))
        names = ("r", "lora_alpha", "target_modules", "target_parameters", "use_rslora")
        return LoraConfig(**{name: config[name] for name in names})

    def _fresh(self, stack: str, name: str, lora: LoraConfig, trained: bool = True) -> None:
        # Dropout in PPO would make the ratio of the very first minibatch differ from 1.
        lora = lora.model_copy(update={"lora_dropout": 0.0})
        self._check_stacked(lora.target_parameters)
        holder = self.stacks[stack]
        if isinstance(holder.model, PeftModel):
            add_fresh(self.stacks[stack].peft, name, lora, seed=self.seed)
        else:
            self._wrapped(stack, wrap(holder.backbone.model, lora, name, seed=self.seed))
        self._added(stack, name)
        if trained:
            self._mark_trained(stack, name)

    def _name(self, role: str) -> str:
        """Of the adapter that this run has for `role`."""
        return role if self.place is None else self.place.adapter(role)

    def _saved(self, stack: str, role: str, files: AdapterFiles, trainable: bool) -> str:
        """The name of the adapter that holds `files`: of this run, or of all that share the base and have it frozen."""
        self.files[role] = files
        name, is_new = self._name(role), True
        if self.place is not None and not trainable:
            name, is_new = self.place.frozen(self.stacks[stack].backbone, files)
        if is_new:
            self._load(stack, name, files, trainable)
        return name

    def _load(self, stack: str, name: str, files: AdapterFiles, trainable: bool) -> None:
        self._check_stacked(files.config.get("target_parameters") or ())
        if isinstance(self.stacks[stack].model, PeftModel):
            add_from_files(self.stacks[stack].peft, name, files, trainable)
        else:
            self._wrapped(stack, wrap(self.stacks[stack].backbone.model, files, name))
        self._added(stack, name)
        if trainable:
            self._mark_trained(stack, name)

    def _check_stacked(self, names: Sequence[str]) -> None:
        """ConfigError for adapters of stacked weights that will be cut up: PEFT adds their product to whole weights."""
        learner = getattr(self.job, "learner", None)
        if names and getattr(learner, "zero_stage", 0) == 3:
            raise ConfigError.at(
                "lora.target_parameters",
                "cannot be combined with ZeRO 3",
                "learner.zero_stage 0, 1 or 2",
                ", ".join(names),
            )

    def _stack(self, backbone: Backbone) -> AdapterStack:
        return AdapterStack(backbone, None if self.place is None else self.place.model(backbone))

    def _added(self, stack: str, name: str) -> None:
        if self.place is not None:
            self.place.added(self.stacks[stack].backbone, self.stacks[stack].peft, name)

    def _wrapped(self, stack: str, model: PeftModel) -> None:
        heads = self.stacks[stack].heads
        self.stacks[stack] = AdapterStack(self.stacks[stack].backbone, model)
        self.stacks[stack].heads = heads

    def _read(self, path: str) -> AdapterFiles:
        return read_adapter(path)

    def _read_more(self, path: str) -> AdapterFiles | None:
        """An adapter that is more than plain LoRA; None for a plain one."""
        return read_for_merge(path)

    def _copy(self, stack: str, source: str, target: str) -> None:
        copy_adapter(self.stacks[stack].peft, source, target)
        self._added(stack, target)

    def _mark_trained(self, stack: str, name: str) -> None:
        self.trained.setdefault(stack, []).append(name)

    def _head(self, stack: str, name: str, weight: torch.Tensor | None, offset: float = 0.0) -> None:
        holder = self.stacks[stack]
        weight = None if weight is None else weight.float().cpu()
        holder.heads[name] = ScalarHead(holder.backbone.hidden_size, weight, offset).to(self.device)

    def _full(self, source: ModelSpec, kind: str) -> str:
        """The stack of a whole checkpoint, loaded once however many roles name it."""
        key = f"{kind} {Path(source.path).absolute() if Path(source.path).exists() else source.path}"
        name = self.loaded.setdefault(key, f"{kind}_{len(self.loaded)}")
        if name not in self.stacks:
            backbone = self._classifier(source.path) if kind == "classifier" else self._causal_lm(source.path, None)
            self.stacks[name] = self._stack(backbone)
        return name

    def _merged(self, files: AdapterFiles) -> str:
        """The stack of a base of its own with an adapter merged into it, loaded once however many roles name it."""
        name = self.loaded.setdefault(f"merged {files.path}", f"merged_{len(self.loaded)}")
        if name not in self.stacks:
            self.stacks[name] = AdapterStack(self._merged_base(files), None)
        return name

    def _merged_base(self, files: AdapterFiles) -> Backbone:
        if self.place is not None:
            raise ConfigError.at(files.path, f"{more_than_lora(files)}: cannot be on a base that trials share")
        backbone = self._causal_lm(self.job.model_name_or_path, self.job.revision)
        merge_in_memory(backbone, files)
        return backbone

    def _causal_lm(self, path: str, revision: str | None) -> Backbone:
        how: dict[str, Any] = {"path": path, "revision": revision, "stop_token_ids": self.stop_token_ids}
        how["lora_compute_dtype"] = self.job.lora_compute_dtype
        return self._loaded(load_backbone, how | load_options(self.job, self.device))

    def _classifier(self, path: str) -> Backbone:
        return self._loaded(load_classifier, {"path": path, "revision": None} | load_options(self.job, self.device))

    def _loaded(self, load: Callable[..., Backbone], how: dict[str, Any]) -> Backbone:
        """A base, which another run of this process may have loaded already."""
        if self.place is None:
            return load(**how)
        return self.place.backbone(f"{load.__name__} {sorted(how.items())}", partial(load, **how))


def load_options(job: JobFields, device: torch.device) -> dict[str, Any]:
    """How a job wants its models loaded: keyword arguments of `load_backbone` and `load_classifier`, path and revision aside."""
    return {
        "dtype": job.dtype,
        "attn_implementation": job.attn_implementation,
        "load_in_8bit": job.load_in_8bit,
        "load_in_4bit": job.load_in_4bit,
        "cpu_offload": job.cpu_offload,
        "device": device,
        "trains": isinstance(job, (SFTConfig, DPOConfig, RewardConfig, PPOConfig)),
    }
