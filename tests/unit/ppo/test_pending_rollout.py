"""A rollout that waits for its step comes out of a checkpoint as it went in."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rlhf_ray.batches import Rollout, Scores
from rlhf_ray.errors import ArtifactError
from rlhf_ray.ppo.pending_rollout import load_pending, save_pending
from rlhf_ray.roles.collector import Collected
from rlhf_ray.roles.generator import ActiveAdapter
from rlhf_ray.roles.learner import PublishedAdapter
from rlhf_ray.roles.rollouts import Sampled
from rlhf_ray.storage.files import sha256_tensors


def sampled(drift: torch.Tensor | None, reference: ActiveAdapter | None = None) -> Sampled:
    tensors = {"a": torch.randn(3, 2), "b": torch.zeros(1)}
    sha = sha256_tensors(tensors)
    rollout = Rollout(
        tokens=torch.arange(12).view(2, 6),
        prompt_mask=torch.tensor([[False, True], [True, True]]),
        response_mask=torch.tensor([[True, True, True, False], [True, False, False, False]]),
        sample_logprobs=torch.tensor([[-0.1, -0.2, -0.3, 0.0], [-0.4, 0.0, 0.0, 0.0]]),
        finished=torch.tensor([True, False]),
        row_id=torch.tensor([0, 1]),
        adapter_version=4,
        adapter_sha256=sha,
    )
    parts = {"second": torch.tensor([1.0, 2.0]), "first/odd name": torch.tensor([3.0, 4.0])}
    scores = Scores(torch.tensor([0.5, -0.5]), torch.zeros(2, 4), torch.tensor([0, 1]), parts, drift)
    if reference is not None:
        scores = replace(scores, start_logprobs=torch.ones(2, 4), reference_sha256=reference.sha256)
    seconds, busy, faults = {"time/generate": 1.5}, {"generator": 2.0}, {"faults/retries": 1.0}
    collected = Collected(rollout, scores, seconds, busy, faults)
    return Sampled(6, collected, PublishedAdapter(4, sha, tensors), reference)


@pytest.mark.parametrize(
    ("drift", "reference"),
    [(None, None), (torch.tensor([0.0, 1.0]), None), (None, ActiveAdapter("synced_reference", 2, "abc"))],
)
def test_there_and_back(tmp_path: Path, drift: torch.Tensor | None, reference: ActiveAdapter | None) -> None:
    before = sampled(drift, reference)
    save_pending(before, tmp_path)
    after = load_pending(tmp_path)
    assert after.reference == reference
    assert (after.step, after.adapter.version, after.adapter.sha256) == (6, 4, before.adapter.sha256)
    assert all(torch.equal(after.adapter.tensors[name], t) for name, t in before.adapter.tensors.items())
    for kind in ("rollout", "scores"):
        one, two = getattr(before.collected, kind), getattr(after.collected, kind)
        for f in fields(one):
            ours, theirs = getattr(one, f.name), getattr(two, f.name)
            if isinstance(ours, torch.Tensor):
                assert torch.equal(ours, theirs), f.name
            elif isinstance(ours, dict):
                assert list(ours) == list(theirs), "rewards keep their order"
                assert all(torch.equal(t, theirs[name]) for name, t in ours.items())
            else:
                assert ours == theirs, f.name
    assert (after.collected.seconds, after.collected.busy, after.collected.faults) == (
        before.collected.seconds,
        before.collected.busy,
        before.collected.faults,
    )


def test_another_adapter_than_the_one_that_sampled(tmp_path: Path) -> None:
    save_pending(sampled(None), tmp_path)
    save_file({"a": torch.ones(3, 2), "b": torch.zeros(1)}, tmp_path / "waiting" / "adapter.safetensors")
    with pytest.raises(ArtifactError, match="not the one that sampled"):
        load_pending(tmp_path)
