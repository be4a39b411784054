"""The registry as text, for the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf_ray.errors import ArtifactError, Problem
from rlhf_ray.metrics import figure
from rlhf_ray.registry.entry import Entry
from rlhf_ray.registry.store import Promotion, Registry

HEADER = ("name", "live", "kind", "reward", "KL", "promoted", "by", "note")


def overview(registry: Registry) -> tuple[list[str], list[Problem]]:
    """A line per name, under a header; and what is wrong with the adapters that are live, all of which are verified."""
    rows, problems = [HEADER], list[Problem]()
    for name in registry.names():
        alias = registry.alias(name)
        event, recorded = alias.history[-1], alias.versions[alias.live or 0]
        try:
            entry = registry.resolve(name)
            reward, kl = (_measured(entry, gate) for gate in ("reward", "kl"))
            note = note_of(entry)
        except ArtifactError as error:
            problems += error.problems
            reward, kl, note = "", "", "damaged"
        rows.append(
            (name, recorded["id"].partition("@")[2], recorded["kind"], reward, kl, event["when"], event["by"], note)
        )
    return columns(rows), problems


def story(registry: Registry, name: str) -> list[str]:
    """Every version and every change of one name."""
    alias = registry.alias(name)
    versions = [("version", "kind", "created", "base")]
    for number, recorded in sorted(alias.versions.items()):
        live = " (live)" if number == alias.live else ""
        versions.append(
            (recorded["id"] + live, recorded["kind"], recorded["created"], str(recorded["base"].get("path")))
        )
    events = [("when", "what", "by", "why")]
    for event in alias.history:
        came = f"v{event['from']} -> v{event['version']}" if event["from"] is not None else f"v{event['version']}"
        forced = f"forced over {', '.join(event['forced'])}: " if event["forced"] else ""
        events.append((event["when"], f"{event['action']} {came}", event["by"], f"{forced}{event['reason']}"))
    return [*columns(versions), "", *columns(events)]


def as_json(registry: Registry, name: str) -> dict[str, Any]:
    """{name, live, versions, history}, and the manifest of the live version. ArtifactError if that is damaged."""
    alias, entry = registry.alias(name), registry.resolve(name)
    versions = {f"v{number}": recorded for number, recorded in sorted(alias.versions.items())}
    return {
        "name": name,
        "live": entry.id,
        "path": str(entry.path),
        "versions": versions,
        "history": list(alias.history),
        "manifest": entry.manifest,
    }


def outcome(promotion: Promotion) -> str:
    """What a promotion did, in a line."""
    entry, before = promotion.entry, promotion.previous
    took_back = f"; taken back by: rlhf-ray rollback {entry.name}" if before is not None else ""
    if not promotion.changed:
        return f"{entry.id} is this very adapter and is live already: nothing changed"
    if not promotion.is_new:
        return f"{entry.id} is this very adapter: no new version; it is live again instead of {before}{took_back}"
    return f"{entry.id} is live{f' instead of {before}' if before is not None else ''}{took_back}"


def note_of(entry: Entry) -> str:
    forced = entry.manifest["forced"]
    return f"forced over {', '.join(forced['gates'])}: {forced['reason']}" if forced else ""


def _measured(entry: Entry, gate: str) -> str:
    found = next((g for g in entry.manifest["gates"] if g["gate"] == gate), None)
    return "" if found is None or found["value"] is None else figure(found["value"])


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
