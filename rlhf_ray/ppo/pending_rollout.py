"""A rollout that waits for its step (max_staleness 1), in a checkpoint: `waiting/` holds its rows, its scores and the adapter that
sampled it. Sampled again after a restart it would come from a newer adapter, and the run would be another one."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from rlhf_ray.batches import Rollout, Scores
from rlhf_ray.errors import ArtifactError
from rlhf_ray.roles.collector import Collected
from rlhf_ray.roles.generator import ActiveAdapter
from rlhf_ray.roles.learner import PublishedAdapter
from rlhf_ray.roles.rollouts import Sampled
from rlhf_ray.storage.files import save_tensors, sha256_tensors, write_json

FOLDER = "waiting"
_PERHAPS = ("drift", "start_logprobs")
_ROLLOUT = tuple(f.name for f in fields(Rollout) if not f.name.startswith("adapter_"))


def save_pending(sampled: Sampled, checkpoint: Path) -> None:
    """Write `waiting/` into a checkpoint that is being made."""
    folder, collected, scores = checkpoint / FOLDER, sampled.collected, sampled.collected.scores
    folder.mkdir()
    tensors: dict[str, Tensor] = {f"rollout.{name}": getattr(collected.rollout, name) for name in _ROLLOUT}
    tensors |= {"scores.reward": scores.reward, "scores.ref_logprobs": scores.ref_logprobs}
    tensors |= {f"scores.parts.{name}": part for name, part in scores.parts.items()}
    for name in _PERHAPS:
        if (there := getattr(scores, name)) is not None:
            tensors[f"scores.{name}"] = there
    save_tensors(folder / "rollout.safetensors", {name: t.contiguous() for name, t in tensors.items()})
    save_tensors(folder / "adapter.safetensors", sampled.adapter.tensors)
    account = {
        "step": sampled.step,
        "adapter_version": sampled.adapter.version,
        "adapter_sha256": sampled.adapter.sha256,
        "reference": None if sampled.reference is None else vars(sampled.reference),
        "parts": list(scores.parts),
        "seconds": collected.seconds,
        "busy": collected.busy,
        "faults": collected.faults,
    }
    write_json(folder / "account.json", account)


def load_pending(checkpoint: Path) -> Sampled:
    """What `save_pending` wrote. ArtifactError if the adapter is not the one that was saved."""
    folder = checkpoint / FOLDER
    account = json.loads((folder / "account.json").read_text())
    tensors, weights = load_file(folder / "rollout.safetensors"), load_file(folder / "adapter.safetensors")
    adapter = PublishedAdapter(account["adapter_version"], sha256_tensors(weights), weights)
    if adapter.sha256 != account["adapter_sha256"]:
        raise ArtifactError.at(
            str(folder), "the adapter restored is not the one that sampled", account["adapter_sha256"], adapter.sha256
        )
    rollout = Rollout(
        **{name: tensors[f"rollout.{name}"] for name in _ROLLOUT},
        adapter_version=adapter.version,
        adapter_sha256=adapter.sha256,
    )
    reference = ActiveAdapter(**account["reference"]) if account.get("reference") else None
    scores = Scores(
        reward=tensors["scores.reward"],
        ref_logprobs=tensors["scores.ref_logprobs"],
        row_id=rollout.row_id,
        parts={name: tensors[f"scores.parts.{name}"] for name in account["parts"]},
        reference_sha256=reference.sha256 if reference is not None else "",
        **{name: tensors.get(f"scores.{name}") for name in _PERHAPS},
    )
    collected = Collected(rollout, scores, account["seconds"], account["busy"], account["faults"])
    return Sampled(account["step"], collected, adapter, reference)
