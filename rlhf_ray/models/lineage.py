"""Lineage: what an artefact was made from, compared with what it is about to be used on.

Base, tokenizer and prompt template travel with every run and merged checkpoint. An adapter on another base of the same shapes loads
without an error and answers nonsense; a reward model that meets another template or tokenizer scores nonsense. So each link of the
chain is compared by hash, and a difference names both hashes. A plain PEFT folder records less: what it says is checked, and what
it cannot say is told as a warning.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rlhf_ray.config import JobFields, RewardConfig
from rlhf_ray.errors import ArtifactError, Problem
from rlhf_ray.models.adapter_files import read_adapter
from rlhf_ray.models.merge_by_peft import read_any
from rlhf_ray.models.sources import resolve_source, weights_sha256
from rlhf_ray.models.specs import ModelSpec
from rlhf_ray.models.tokenizer import tokenizer_of, tokenizer_sha256
from rlhf_ray.storage.run_folder import read_json

if TYPE_CHECKING:
    from rlhf_ray.models.backbone import BaseIdentity

MERGED = "rlhf_ray.json"
"""Manifest of a merged checkpoint, beside its config.json."""
PROMOTED = "manifest.json"
"""Manifest of an adapter in the registry, beside its adapter_config.json."""


class Digest(Protocol):
    """A prompt template, as far as lineage cares; one that says the date also has a `date`."""

    @property
    def name(self) -> str: ...
    @property
    def sha256(self) -> str: ...


@dataclass(frozen=True)
class Parent:
    """One thing a run is made from, as it describes itself. None: it does not say.

    role: sft, reward:<name>, policy, base.  path: where it is.  sha256: of the adapter's tensors, or of a checkpoint's weights.
    base: the manifest's "base" entry.  template: {name, sha256}."""

    role: str
    path: str
    sha256: str
    stage: str | None = None
    base: Mapping[str, Any] | None = None
    tokenizer_sha256: str | None = None
    template: Mapping[str, str] | None = None

    def manifest(self) -> dict[str, str]:
        """Its entry among a manifest's "parents"."""
        return {"role": self.role, "path": self.path, "sha256": self.sha256}


def parent_of(source: ModelSpec, role: str) -> Parent:
    """What `source` says of itself: the manifest of a run, merged checkpoint or promoted adapter, else its adapter_config.json."""
    if source.kind == "adapter":
        return _adapter_parent(source, role)
    found = resolve_source(source.path)
    merged = merged_manifest(found.folder) or {}
    return Parent(
        role,
        found.name,
        weights_sha256(found.folder),
        merged.get("stage"),
        None,
        tokenizer_sha256(tokenizer_of(found)),
        merged.get("template"),
    )


def _adapter_parent(source: ModelSpec, role: str) -> Parent:
    files = read_any(source.path) if source.run is None else read_adapter(source.path)
    path = str(Path(source.path).absolute())
    promoted = promoted_manifest(source.path) if source.run is None else None
    if source.run is None and promoted is None:
        name, revision = files.config["base_model_name_or_path"], files.config["revision"]
        return Parent(role, path, files.sha256, base={"path": name, "revision": revision} if name else None)
    manifest = source.run.manifest() if source.run is not None else promoted or {}
    if promoted is not None and files.sha256 != promoted["adapter"]["sha256"]:
        raise ArtifactError.at(
            path, "is not the adapter that was promoted", promoted["adapter"]["sha256"], files.sha256
        )
    return Parent(
        role,
        path,
        files.sha256,
        promoted["source"]["stage"] if promoted is not None else manifest["stage"],
        manifest.get("base"),
        manifest.get("tokenizer_sha256"),
        manifest.get("template"),
    )


def merged_manifest(folder: Path | str) -> dict[str, Any] | None:
    """What a merged checkpoint records of itself, None for any other folder."""
    path = Path(folder) / MERGED
    return read_json(path) if path.is_file() else None


def promoted_manifest(folder: Path | str) -> dict[str, Any] | None:
    """What a promoted adapter records of itself, None for any other folder."""
    path = Path(folder) / PROMOTED
    found = read_json(path) if path.is_file() else {}
    whole = all(isinstance(found.get(part), dict) for part in ("adapter", "source", "base", "template"))
    return found if whole and isinstance(found.get("kind"), str) else None


def check_lineage(
    source: ModelSpec,
    identity: BaseIdentity,
    template: Digest | None,
    *,
    role: str = "",
    same_tokenizer: bool = True,
) -> list[str]:
    """Compare `source` with the base it is to be used on or beside, and with the template of this job; returns warnings.

    An adapter must have been trained on this very base; a whole checkpoint is its own base, and only has to read the same tokens
    and prompts.   identity: of the base as loaded.   template: None where no prompt is rendered.
    same_tokenizer: false where text is decoded and encoded again between the two.
    ArtifactError, with every difference and both hashes of each, if base, tokenizer or template differ."""
    parent = parent_of(source, role or source.kind)
    where = f"{parent.role} {parent.path}"
    problems, warnings = _base_differences(where, parent, identity) if source.kind == "adapter" else ([], [])
    if same_tokenizer and parent.tokenizer_sha256 not in (None, identity.tokenizer_sha256):
        problems.append(
            Problem(
                where,
                "reads text with another tokenizer",
                f"tokenizer sha256 {identity.tokenizer_sha256} ({identity.path})",
                str(parent.tokenizer_sha256),
            )
        )
    problems += _template_difference(where, parent, template)
    ArtifactError.raise_all(problems)
    return warnings + _another_date(where, parent, template)


def _base_differences(where: str, parent: Parent, identity: BaseIdentity) -> tuple[list[Problem], list[str]]:
    base = parent.base or {}
    if not base and parent.stage is None:
        return [], [f"{where}: does not say which base it was trained on; only shapes can be checked"]
    problems, warnings = [], []
    fix = "set model_name_or_path to the base it was trained on"
    if parent.stage == "reward":
        fix += ", or merge it (rlhf-ray merge) and name the result: a whole reward model brings its base"
    for part in ("weights", "config"):
        recorded, loaded = base.get(f"{part}_sha256"), getattr(identity, f"{part}_sha256")
        if recorded is not None and recorded != loaded:
            problems.append(
                Problem(
                    where,
                    f"was trained on another base ({part} differ)",
                    f"{part} sha256 {recorded} ({base.get('path')})",
                    f"{loaded} ({identity.path})",
                    fix,
                )
            )
    if "weights_sha256" not in base and base.get("path") and not _same_path(str(base["path"]), identity.path):
        warnings.append(
            f"{where}: was trained on {base['path']} by its own account, and is used on {identity.path};"
            " it holds no hash of its base, so only shapes could be checked"
        )
    precision = base.get("precision")
    if precision is not None and precision != identity.precision:
        warnings.append(f"{where}: was trained on a base in {precision}, and is used on one in {identity.precision}")
    return problems, warnings


def _same_path(recorded: str, loaded: str) -> bool:
    return recorded == loaded or (Path(recorded).exists() and Path(recorded).resolve() == Path(loaded))


def _template_difference(where: str, parent: Parent, template: Digest | None) -> list[Problem]:
    if parent.template is None or template is None or parent.template.get("sha256") == template.sha256:
        return []
    return [
        Problem(
            where,
            "was trained with another prompt template",
            f"{parent.template.get('name')}, sha256 {parent.template.get('sha256')}",
            f"{template.name}, sha256 {template.sha256}",
            f"set template={parent.template.get('name')}{_with_kwargs(parent.template)}",
        )
    ]


def _another_date(where: str, parent: Parent, template: Digest | None) -> list[str]:
    """The day alone: a template that says the hour is not known."""
    before, now = (parent.template or {}).get("date"), getattr(template, "date", None)
    if before is None or now is None or before[:10] == now[:10]:
        return []
    return [
        f"{where}: was trained with prompts that say the date {before[:10]}, and is used with prompts that say {now[:10]}:"
        f" template_date={before}"
    ]


def header_line(label: str, text: str) -> str:
    """A line of a run's header; all of them are aligned."""
    return f"{label:<10} {text}"


def describe(identity: BaseIdentity, parents: Sequence[Parent], template: Digest | None) -> list[str]:
    """Lines for a run's header: what it stands on, with short hashes."""
    revision = f" @ {identity.revision[:12]}" if identity.revision else ""
    lines = [
        header_line(
            "base", f"{identity.path}{revision} ({identity.precision}, weights {identity.weights_sha256[:12]})"
        ),
        header_line("tokenizer", identity.tokenizer_sha256[:12]),
    ]
    if template is not None:
        date = getattr(template, "date", None)
        dated = "" if date is None else f", which says that it is {date}"
        lines.append(header_line("template", f"{template.name} ({template.sha256[:12]}){dated}"))
    lines += [header_line(p.role, f"{p.path} ({p.stage or 'no run'}, {p.sha256[:12]})") for p in parents]
    return lines


DEFAULT_TEMPLATE = str(JobFields.model_fields["template"].default)


def recorded_template(source: ModelSpec) -> str | None:
    """The prompt template it was trained with: the path or name in its run's job, else the name in its manifest, else None."""
    if source.run is not None and isinstance(name := source.run.config().get("template"), str):
        return name
    if source.kind == "base" or (template := parent_of(source, source.kind).template) is None:
        return None
    return template["name"]


def recorded_base(source: ModelSpec) -> tuple[str, str | None] | None:
    """Path and revision of the base that an adapter was trained on; None for anything else, and where it does not say."""
    if source.kind != "adapter" or (base := parent_of(source, source.kind).base) is None:
        return None
    return str(base["path"]), base.get("revision")


def recorded_end(source: ModelSpec) -> int | None:
    """The token that ended the replies it was trained on: the first of the stop_token_ids in its manifest; None if it has none."""
    ids = _own_manifest(source).get("stop_token_ids") or (None,)
    return ids[0]


def recorded_add_eos_token(source: ModelSpec) -> bool:
    """Whether a reward model, a promoted one too, was trained on replies with the token that ends them; where nothing is recorded,
    the default of its stage."""
    recorded = _own_manifest(source).get("reward") or {}
    return bool(recorded.get("add_eos_token", RewardConfig.model_fields["add_eos_token"].default))


def _with_kwargs(template: Mapping[str, Any]) -> str:
    """The further variables of a recorded chat template, as they are set."""
    kwargs = (template.get("content") or {}).get("kwargs")
    return f" chat_template_kwargs={kwargs}" if kwargs else ""


def recorded_kwargs(source: ModelSpec) -> dict[str, Any]:
    """The further variables of its chat template (`chat_template_kwargs`); {} where nothing is recorded."""
    content = (_own_manifest(source).get("template") or {}).get("content") or {}
    return dict(json.loads(content.get("kwargs", "{}")))


def recorded_date(source: ModelSpec) -> str | None:
    """What its prompt template took for now; None where that says no date, or nothing is recorded."""
    return (_own_manifest(source).get("template") or {}).get("date")


def _own_manifest(source: ModelSpec) -> dict[str, Any]:
    """Of a run, a merged checkpoint or a promoted adapter; empty for anything else."""
    if source.run is not None:
        return source.run.manifest()
    if source.kind == "base":
        return {}
    read = (
        merged_manifest(resolve_source(source.path).folder) if source.kind == "full" else promoted_manifest(source.path)
    )
    return read or {}


def recorded_reward(source: ModelSpec) -> dict[str, Any]:
    """What a reward run, or its merged checkpoint, records of its training: add_eos_token and fixture. Empty where nothing is."""
    if source.run is not None:
        manifest = source.run.manifest()
    else:
        manifest = (merged_manifest(resolve_source(source.path).folder) or {}) if source.kind == "full" else {}
    return dict(manifest.get("reward") or {})
