"""What an artefact says of how it was made, so that a command need not ask for it again."""

from __future__ import annotations

from rlhf_ray.models.lineage import parent_of
from rlhf_ray.models.specs import Source


def recorded_template(source: Source) -> str | None:
    """The prompt template it was trained with: the path or name in its run's job, else the name in its manifest, else None."""
    if source.run is not None and isinstance(name := source.run.config().get("template"), str):
        return name
    if source.kind == "base" or (template := parent_of(source, source.kind).template) is None:
        return None
    return template["name"]


def recorded_base(source: Source) -> tuple[str, str | None] | None:
    """Path and revision of the base that an adapter was trained on; None for anything else, and where it does not say."""
    if source.kind != "adapter" or (base := parent_of(source, source.kind).base) is None:
        return None
    return str(base["path"]), base.get("revision")
