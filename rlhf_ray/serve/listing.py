"""What /v1/models tells: the base, every name, every version, with lineage."""

from __future__ import annotations

from typing import Any

from rlhf_ray.serve.catalogue import BASE, ModelIndex, Version


def entries(model_index: ModelIndex, started: int) -> list[dict[str, Any]]:
    """The base, then every name (root: the version behind it), then every version that is not refused.

    started: of the service, Unix seconds."""
    found = [_entry(BASE, BASE, None, started, {})]
    for name, id in sorted(model_index.live.items()):
        version = model_index.versions[id]
        found.append(_entry(name, id, BASE, version.created, _about(model_index, version)))
    for id, version in sorted(model_index.versions.items()):
        if id not in model_index.refused:
            found.append(_entry(id, id, BASE, version.created, _about(model_index, version)))
    return found


def _about(model_index: ModelIndex, version: Version) -> dict[str, Any]:
    told: dict[str, Any] = {"version": version.number, "sha256": version.sha256}
    known = model_index.known.get(version.id)
    return (
        told if known is None else {**told, "kind": known.kind, "template": known.template.name, "lineage": known.about}
    )


def _entry(id: str, root: str, parent: str | None, created: int, about: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": id,
        "object": "model",
        "created": created,
        "owned_by": "rlhf_ray",
        "root": root,
        "parent": parent,
        **about,
    }
