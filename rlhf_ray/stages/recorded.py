"""What an artefact says of how it was made, so that a command need not ask for it again."""

from __future__ import annotations

from typing import Any

from rlhf_ray.config import JobFields
from rlhf_ray.models.lineage import merged_manifest, parent_of
from rlhf_ray.models.source import resolve_source
from rlhf_ray.models.specs import ModelSpec

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


def recorded_reward(source: ModelSpec) -> dict[str, Any]:
    """What a reward run, or its merged checkpoint, records of its training: add_eos_token and fixture. Empty where nothing is."""
    if source.run is not None:
        manifest = source.run.manifest()
    else:
        manifest = (merged_manifest(resolve_source(source.path).folder) or {}) if source.kind == "full" else {}
    return dict(manifest.get("reward") or {})
