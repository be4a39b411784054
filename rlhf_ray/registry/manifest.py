"""manifest.json of a promoted adapter: all that serving needs, and where it comes from, so that the run itself may go.

{schema, id, name, version, kind, created, by, versions,
 files: {name: {sha256, bytes}}, adapter: {sha256, r, lora_alpha, target_modules, ...}, base, tokenizer_sha256,
 template: {name, sha256, content}, stop_token_ids, reward: {add_eos_token, fixture, ...} of a reward model,
 source: {run_dir, run_id, stage, step, seed, git_commit, sweep}, lineage, config, metrics: {before, after}, gates, forced}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_ray.errors import RlhfRayError
from rlhf_ray.models.adapter_files import read_adapter
from rlhf_ray.models.lineage import merged_manifest
from rlhf_ray.registry.alias import now, whoami
from rlhf_ray.registry.candidate import Candidate, as_json
from rlhf_ray.registry.gates import Gate
from rlhf_ray.storage.checkpoints import SCHEMA
from rlhf_ray.storage.run_folder import is_run, open_run, versions

DEPTH = 16
"""Longest chain of parents that is followed; one that is longer goes in a circle."""


def manifest_of(
    candidate: Candidate,
    name: str,
    version: int,
    folder_id: str,
    gates: Sequence[Gate],
    forced: Iterable[str],
    reason: str,
) -> dict[str, Any]:
    """Everything but `files`."""
    run, recorded, overridden = candidate.run, candidate.manifest, list(forced)
    when, by = now(), whoami()
    return {
        "schema": SCHEMA,
        "id": folder_id,
        "name": name,
        "version": version,
        "kind": candidate.kind,
        "created": when,
        "by": by,
        "versions": dict(versions()),
        "adapter": {
            "sha256": candidate.files.sha256,
            **{k: v for k, v in candidate.files.config.items() if k not in ("base_model_name_or_path", "revision")},
        },
        "base": candidate.base,
        "tokenizer_sha256": recorded["tokenizer_sha256"],
        "template": candidate.template,
        "stop_token_ids": recorded.get("stop_token_ids"),
        "reward": reward_record(candidate),
        "source": {
            "run_dir": str(run.path),
            "run_id": run.run_id,
            "stage": run.stage,
            "step": candidate.step,
            "seed": recorded.get("seed"),
            "git_commit": recorded.get("git_commit"),
            "sweep": candidate.sweep,
        },
        "lineage": {"base": base_parents(candidate.base), "parents": parents_of(recorded.get("parents") or ())},
        "config": candidate.config,
        "metrics": {"before": as_json(candidate.before), "after": as_json(candidate.after)},
        "gates": [gate.to_json() for gate in gates],
        "forced": {"gates": overridden, "by": by, "when": when, "reason": reason} if overridden else None,
    }


def reward_record(candidate: Candidate) -> dict[str, Any] | None:
    """How a reward model scores; a checkpoint has no fixture, since that is made of the result."""
    if candidate.kind != "reward":
        return None
    told = dict(candidate.manifest.get("reward") or {"add_eos_token": candidate.config.get("add_eos_token", True)})
    is_result = Path(candidate.files.path) == candidate.run.adapter_dir
    return told if is_result else {k: v for k, v in told.items() if k not in ("fixture", "held_out_scores")}


def parents_of(parents: Iterable[Mapping[str, Any]], depth: int = DEPTH) -> list[dict[str, Any]]:
    """What a run was made from, back to the base: each parent with its own parents, as long as its run is where it was.

    found: same, changed or gone, of the adapter that is there now. Hashes are those recorded in training, whatever is there."""
    return [_parent(parent, depth) for parent in parents]


def _parent(parent: Mapping[str, Any], depth: int) -> dict[str, Any]:
    told: dict[str, Any] = {k: parent.get(k) for k in ("role", "path", "sha256")}
    path = Path(str(parent.get("path")))
    run_dir = next((folder for folder in (path.parent, *path.parents[2:3]) if is_run(folder)), None)
    if depth == 0 or run_dir is None:
        merged = base_parents({"path": str(path)}, depth) if depth else []
        return told | (
            {"found": "same", "parents": merged} if merged else {"found": "gone" if run_dir is None else "same"}
        )
    try:
        found = read_adapter(path).sha256
        manifest = open_run(run_dir, verify=False).manifest()
    except RlhfRayError:
        return told | {"found": "changed"}
    if found != parent.get("sha256"):
        return told | {"found": "changed"}
    own = {"stage": manifest["stage"], "run_id": manifest.get("run_id"), "base": manifest.get("base")}
    return told | {"found": "same", **own, "parents": parents_of(manifest.get("parents") or (), depth - 1)}


def base_parents(base: Mapping[str, Any], depth: int = DEPTH) -> list[dict[str, Any]]:
    """What a base was merged from, where it is a merged checkpoint of ours; else nothing."""
    try:
        merged = merged_manifest(str(base.get("path")))
    except RlhfRayError:
        return []
    return parents_of((merged or {}).get("parents") or (), depth - 1)
