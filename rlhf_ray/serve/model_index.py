"""Which names are served, and what each stands for: versions in a registry, and runs that the job file names.

Names are resolved in memory: an unknown one costs no access to the disk, and none ever becomes a path.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from rlhf_ray.config.serve import ServeConfig
from rlhf_ray.data.templates import Template, load_template
from rlhf_ray.errors import ArtifactError, ConfigError
from rlhf_ray.models.adapter_files import AdapterFiles
from rlhf_ray.models.backbone import Backbone
from rlhf_ray.models.lineage import (
    check_lineage,
    recorded_add_eos_token,
    recorded_date,
    recorded_kwargs,
    recorded_template,
)
from rlhf_ray.models.merge_by_peft import more_than_lora, read_any
from rlhf_ray.models.specs import policy_source
from rlhf_ray.registry import Registry
from rlhf_ray.registry.alias import Alias
from rlhf_ray.registry.entry import Entry

BASE = "base"
RETRY_S = 30.0
"""A version that was refused is read again for a request after so long."""
LISTED_ANEW = 1000
"""Up to so many versions, each one that is loaded is told of in the list of models at once."""


@dataclass(frozen=True)
class ModelCheckpoint:
    """The files of a version, read and checked. kind: policy or reward.  stop_ids: tokens that end a response.
    add_eos_token: of a reward model.  lineage: for people."""

    id: str
    kind: Literal["policy", "reward"]
    files: AdapterFiles
    template: Template
    stop_ids: tuple[int, ...]
    add_eos_token: bool = True
    lineage: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        return self.files.sha256

    def without_tensors(self) -> ModelCheckpoint:
        """To be kept: the tensors of an adapter that is loaded are in the model, those of another one on disk."""
        return replace(self, files=replace(self.files, tensors={}))


@dataclass(frozen=True)
class ModelVersion:
    """id: `helper@v3-1a2b3c4d`.  load: from disk, with every check; raises RlhfRayError.
    problem: why it cannot be served, as far as that is known without reading it; None if nothing is."""

    id: str
    name: str
    number: int
    sha256: str
    created: int
    kind: Literal["policy", "reward"]
    load: Callable[[], ModelCheckpoint]
    problem: ArtifactError | None = None


@dataclass
class ModelIndex:
    """versions: by id.  desired: name -> id that the registry says is live.  live: name -> id that is served under it.
    checkpoints: of versions that were loaded, by id, without tensors.  refused: id -> why it is not served.
    revision: counts what changes the list of models."""

    versions: dict[str, ModelVersion] = field(default_factory=dict)
    desired: dict[str, str] = field(default_factory=dict)
    live: dict[str, str] = field(default_factory=dict)
    checkpoints: dict[str, ModelCheckpoint] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    revision: int = 0
    _by_number: dict[str, str] = field(default_factory=dict)
    _retry_at: dict[str, float] = field(default_factory=dict)

    def update(self, found: Mapping[str, tuple[list[ModelVersion], str]]) -> None:
        """Add names, with their versions and the id of the live one."""
        for name, (versions, live) in found.items():
            self.versions.update({v.id: v for v in versions})
            self._by_number.update({f"{name}@v{v.number}": v.id for v in versions})
            self.desired[name] = live
        self.revision += bool(found)

    def behind(self) -> list[ModelVersion]:
        """The live versions of names that are served by another one, or not at all."""
        return [self.versions[id] for name, id in self.desired.items() if self.live.get(name) != id]

    def serve(self, version: ModelVersion) -> None:
        """Its name means it from now on."""
        self.live[version.name] = version.id
        self._retry_at.pop(version.id, None)
        self.refused.pop(version.id, None)
        self.revision += 1

    def refuse(self, version: ModelVersion, why: str) -> None:
        """It is not served, and not read again for RETRY_S."""
        self.refused[version.id] = why
        self._retry_at[version.id] = time.monotonic() + RETRY_S
        self.revision += 1

    def loaded(self, version: ModelVersion, checkpoint: ModelCheckpoint) -> None:
        """Read, and fit to be served. What is told of a version is more from now on; many versions are not listed anew for that."""
        if self.refused.pop(version.id, None) is not None or (
            version.id not in self.checkpoints and len(self.versions) <= LISTED_ANEW
        ):
            self.revision += 1
        self.checkpoints[version.id] = checkpoint

    def may_be_read(self, version: ModelVersion) -> bool:
        """Not while it was refused a moment ago; after that the files, or the disk, may be in order again."""
        return version.id not in self.refused or time.monotonic() >= self._retry_at.get(version.id, 0.0)

    def resolve(self, model: str) -> ModelVersion | None:
        """The version that NAME, NAME@v3 or NAME@v3-hash8 stands for now."""
        return self.versions.get(self.live.get(model) or self._by_number.get(model) or model)

    def is_refused(self, model: str) -> bool:
        """Whether `model` is a name with versions, none of which is fit to be served."""
        return model in self.desired and model not in self.live

    def reward_models(self) -> list[str]:
        """Names of live reward adapters."""
        return [name for name, id in self.live.items() if self.versions[id].kind == "reward"]


def registry_versions(
    registry: Registry, aliases: Mapping[str, Alias], backbone: Backbone
) -> dict[str, tuple[list[ModelVersion], str]]:
    """The versions of these names, and the id of the live one: nothing of the adapters is read. Names without a live one are left
    out."""
    found = {}
    for name, alias in aliases.items():
        if alias.live is None:
            continue
        versions = [
            ModelVersion(
                recorded["id"],
                name,
                number,
                recorded["adapter_sha256"],
                _unix_seconds(recorded.get("created", "")),
                "reward" if recorded.get("kind") == "reward" else "policy",
                partial(_load_version, registry, recorded["id"], backbone),
                _base_problem(recorded, backbone),
            )
            for number, recorded in alias.versions.items()
        ]
        found[name] = versions, alias.versions[alias.live]["id"]
    return found


def _base_problem(recorded: Mapping[str, Any], backbone: Backbone) -> ArtifactError | None:
    """By what the name's file records of the base."""
    base, identity = recorded["base"], backbone.identity
    for what, key, loaded in (
        ("base (weights)", "weights_sha256", identity.weights_sha256),
        ("base (config)", "config_sha256", identity.config_sha256),
    ):
        if base.get(key) not in (None, loaded):
            got = f"sha256 {base[key]}"
            return ArtifactError.at(
                f"adapter {recorded['id']}", f"was trained on another {what}", f"sha256 {loaded}", got
            )
    return None


def _load_version(registry: Registry, id: str, backbone: Backbone) -> ModelCheckpoint:
    return load_entry(registry.resolve(id), backbone)


def load_entry(entry: Entry, backbone: Backbone) -> ModelCheckpoint:
    """A promoted adapter, compared with the base and the tokenizer that are loaded. ArtifactError if it belongs on others."""
    where, identity = f"adapter {entry.id}", backbone.identity
    for what, recorded, loaded in (
        ("base (weights)", entry.base.get("weights_sha256"), identity.weights_sha256),
        ("base (config)", entry.base.get("config_sha256"), identity.config_sha256),
        ("tokenizer", entry.manifest.get("tokenizer_sha256"), identity.tokenizer_sha256),
    ):
        if recorded != loaded:
            raise ArtifactError.at(where, f"was trained on another {what}", f"sha256 {loaded}", f"sha256 {recorded}")
    reward, template = entry.manifest.get("reward") or {}, entry.template(backbone.tokenizer)
    return ModelCheckpoint(
        entry.id,
        "reward" if entry.kind == "reward" else "policy",
        _check_kind(entry.load(), entry.kind == "reward", where),
        template,
        _check_stop_ids(entry.stop_token_ids, backbone, template, where),
        bool(reward.get("add_eos_token", True)),
        {
            "stage": entry.manifest["source"].get("stage"),
            "step": entry.manifest["source"].get("step"),
            "parents": _parents(entry.manifest["lineage"].get("parents") or ()),
            "metrics": (entry.manifest.get("metrics") or {}).get("after") or {},
        },
    )


def run_versions(
    adapters: Mapping[str, str],
    backbone: Backbone,
    template: Template,
    check: Callable[[AdapterFiles], Any] | None = None,
) -> dict[str, tuple[list[ModelVersion], str]]:
    """The adapters that a job file names, as version 0 of their names. Raises ConfigError, ArtifactError.

    template: of those that record none.   check: raises for one that the engine cannot have."""
    found = {}
    for name, spec in adapters.items():
        checkpoint = load_run(name, spec, backbone, template)
        if check is not None:
            check(checkpoint.files)
        reload = partial(_reload_run, name, spec, backbone, template, checkpoint.sha256)
        version = ModelVersion(checkpoint.id, name, 0, checkpoint.sha256, int(time.time()), checkpoint.kind, reload)
        found[name] = [version], version.id
    return found


def to_be_merged(config: ServeConfig) -> AdapterFiles | None:
    """The one adapter that a job file names, if it is more than plain LoRA: it is served alone, merged into the base.

    ConfigError if it is not alone, since it changes weights that all adapters and the base share, or if vLLM loads the base."""
    for name, spec in config.adapters.items():
        source = policy_source(spec)
        files = read_any(source.path) if source.kind == "adapter" and source.run is None else None
        kind = "" if files is None else more_than_lora(files)
        if kind and (len(config.adapters) > 1 or config.registry is not None or config.engine == "vllm"):
            got = f"{len(config.adapters)} adapters{'' if config.registry is None else ' and a registry'}"
            raise ConfigError.at(
                f"adapters.{name}",
                f"{kind}: changes weights that all adapters share",
                "this adapter alone under engine builtin, which merges it into the base; or plain LoRA",
                f"{got}, engine {config.engine}",
                "serve it alone, or merge it (rlhf-ray merge) and set model_name_or_path to the result",
            )
        if kind:
            return files
    return None


def _reload_run(name: str, spec: str, backbone: Backbone, template: Template, sha256: str) -> ModelCheckpoint:
    checkpoint = load_run(name, spec, backbone, template)
    if checkpoint.sha256 != sha256:
        raise ArtifactError.at(f"adapters.{name}", "has changed since the service started", sha256, checkpoint.sha256)
    return checkpoint


def load_run(name: str, spec: str, backbone: Backbone, template: Template) -> ModelCheckpoint:
    """A run, RUN@STEP or an adapter folder, compared with the base, tokenizer and template that it records; `template` is of one
    that records none."""
    source = policy_source(spec)
    if source.kind != "adapter":
        raise ConfigError.at(f"adapters.{name}", "is no adapter", "a run, RUN@STEP or an adapter folder", spec)
    if (recorded := recorded_template(source)) is not None:
        template = load_template(recorded, backbone.tokenizer, recorded_date(source), recorded_kwargs(source))
    check_lineage(source, backbone.identity, template, role=name)
    files = read_any(source.path)
    stage = source.run.stage if source.run is not None else None
    is_reward = files.head is not None
    lineage: dict[str, Any] = {"stage": stage, "parents": [], "metrics": {}}
    if source.run is not None:
        lineage["parents"] = _parents(source.run.manifest().get("parents") or ())
    return ModelCheckpoint(
        f"{name}@v0-{files.sha256[:8]}",
        "reward" if is_reward else "policy",
        _check_kind(files, is_reward, f"adapter {name}"),
        template,
        _check_stop_ids(
            (source.run.manifest() if source.run is not None else {}).get("stop_token_ids"), backbone, template, name
        ),
        recorded_add_eos_token(source),
        lineage,
    )


def _check_kind(files: AdapterFiles, is_reward: bool, where: str) -> AdapterFiles:
    if is_reward != (files.head is not None):
        expected = "an adapter with a reward head" if is_reward else "a policy adapter, without a head"
        raise ArtifactError.at(where, "is of another kind than it says", expected)
    return files


def _check_stop_ids(recorded: Any, backbone: Backbone, template: Template, where: str) -> tuple[int, ...]:
    ids = tuple(recorded) if recorded is not None else backbone.stop_ids(template)
    rows = int(backbone.model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    if not all(isinstance(i, int) and 0 <= i < rows for i in ids):
        raise ArtifactError.at(where, "stop_token_ids are not in the vocabulary", f"0 <= id < {rows}", str(ids)[:80])
    return ids


def _parents(parents: Any) -> list[dict[str, Any]]:
    """Role and hash of each parent, and of theirs; their paths stay private."""
    return [
        {"role": p.get("role"), "sha256": p.get("sha256"), "parents": _parents(p.get("parents") or ())} for p in parents
    ]


def _unix_seconds(created: str) -> int:
    from datetime import datetime

    try:
        return int(datetime.fromisoformat(created).timestamp())
    except ValueError:
        return 0


def list_models(model_index: ModelIndex, started_at: int, with_base: bool = True) -> list[dict[str, Any]]:
    """OpenAI's model objects: the base, then every name (root: its version), then every version that is not refused.

    started_at: of the service, Unix seconds.   with_base: False where an adapter is merged into it."""
    found = [_model_object(BASE, BASE, None, started_at, {})] if with_base else []
    for name, id in sorted(model_index.live.items()):
        version = model_index.versions[id]
        found.append(_model_object(name, id, BASE, version.created, _metadata(model_index, version)))
    for id, version in sorted(model_index.versions.items()):
        if id not in model_index.refused:
            found.append(_model_object(id, id, BASE, version.created, _metadata(model_index, version)))
    return found


def _metadata(model_index: ModelIndex, version: ModelVersion) -> dict[str, Any]:
    metadata: dict[str, Any] = {"version": version.number, "sha256": version.sha256, "kind": version.kind}
    checkpoint = model_index.checkpoints.get(version.id)
    if checkpoint is None:
        return metadata
    return {**metadata, "template": checkpoint.template.name, "lineage": checkpoint.lineage}


def _model_object(id: str, root: str, parent: str | None, created: int, metadata: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": id,
        "object": "model",
        "created": created,
        "owned_by": "rlhf_ray",
        "root": root,
        "parent": parent,
        **metadata,
    }
