"""What must hold in every run, checked in every run. A breach stops it with the step and the numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_ray.batches import Rollout
from rlhf_ray.errors import InvariantError
from rlhf_ray.maths.masks import masked_mean
from rlhf_ray.storage.files import sha256_tensors

AGREEMENT = {"float32": 1e-3, "other": 0.05}
"""Allowed mean absolute difference of log-probabilities between two passes over the same tokens: in float32, and in bfloat16,
float16 or on a quantised base."""


def tolerance(dtype: torch.dtype, quantised: bool) -> float:
    return AGREEMENT["float32" if dtype == torch.float32 and not quantised else "other"]


def check_sampler_agrees(rollout: Rollout, logprobs: Tensor, limit: float, step: int) -> float:
    """The sampler used the adapter that it names as the learner would: their log-probabilities of the sampled tokens agree.

    Returns the mean absolute difference."""
    gap = float(masked_mean((rollout.sample_logprobs - logprobs).abs(), rollout.response_mask))
    if not gap <= limit:
        raise InvariantError.at(
            f"step {step}",
            f"sampler and learner disagree about the sampled tokens (adapter version {rollout.adapter_version})",
            f"a mean difference of at most {limit:g} nats",
            f"{gap:.4g}",
            "the sampler did not use the learner's adapter, temperature or precision",
        )
    return gap


def check_starts_at_reference(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, limit: float, step: int) -> None:
    """Before the first update, and after the reference was reset to it, the policy is the reference, so the KL is 0."""
    gap = float(masked_mean((logprobs - ref_logprobs).abs(), mask))
    if not gap <= limit:
        raise InvariantError.at(
            f"step {step}",
            f"the policy differs from its reference before any update{' since the reset' if step > 1 else ''}",
            f"a mean difference of at most {limit:g} nats",
            f"{gap:.4g}",
            f"the reference adapter is not the one the policy {'was then' if step > 1 else 'started from'}",
        )


def check_adapter_changed(before: str, after: str, tensors: Mapping[str, Tensor], step: int) -> None:
    """An update that had an advantage to learn from moves the adapter, and leaves it finite and not empty."""
    if not tensors or not any(bool(t.any()) for t in tensors.values()):
        raise InvariantError.at(f"step {step}", "the policy adapter is empty", "tensors that are not all zero")
    broken = [name for name, t in tensors.items() if not bool(torch.isfinite(t).all())]
    if broken:
        raise InvariantError.at(
            f"step {step}", f"the policy adapter is not finite: {broken[0]} ({len(broken)} tensors)"
        )
    if before == after:
        raise InvariantError.at(f"step {step}", "the update did not change the policy adapter", "a new hash", after)


def check_finite(metrics: Mapping[str, float], step: int) -> None:
    """Every metric is a number, but for those that are undefined for a constant (explained variance of constant returns)."""
    bad = [n for n, v in metrics.items() if not math.isfinite(v) and n != "value/explained_variance"]
    if bad:
        raise InvariantError.at(f"step {step}", f"not finite: {', '.join(f'{n} = {metrics[n]}' for n in bad)}")


@dataclass(frozen=True)
class TensorGap:
    """The tensor in which two adapters differ most.  gap: largest absolute difference; infinite where one side lacks it."""

    name: str
    gap: float
    theirs: str
    ours: str


def worst_tensor(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> TensorGap | None:
    """Where the sampler's adapter differs most from the learner's; None if they are equal, bit for bit."""
    found = None
    for name in sorted(theirs.keys() | ours.keys()):
        pair = [{name: side[name]} if name in side else {} for side in (theirs, ours)]
        first, second = map(sha256_tensors, pair)
        if first == second:
            continue
        gap = math.inf
        if all(pair) and theirs[name].shape == ours[name].shape:
            gap = float((theirs[name].double() - ours[name].double()).abs().max())
            gap = math.inf if math.isnan(gap) else gap
        if found is None or gap > found.gap:
            found = TensorGap(name, gap, first, second)
    return found


def stale_adapter(rollout: Rollout, wanted: str, step: int, version: int | None = None) -> InvariantError:
    """The error for replies that another adapter sampled; it names both. version: of the adapter wanted, if it is known."""
    which = "" if version in (None, rollout.adapter_version) else f", not {version}"
    return InvariantError.at(
        f"step {step}",
        f"replies were sampled by another adapter (version {rollout.adapter_version}{which})",
        f"sha256 {wanted}",
        f"sha256 {rollout.adapter_sha256}",
    )


def stale_reference(where: str, found: str, wanted: str) -> InvariantError:
    """The error for scores against another reference than the one in force. found, wanted: sha256, "" for the start."""
    start = "the policy that the run started from"
    return InvariantError.at(
        where,
        "replies were scored against another reference",
        f"sha256 {wanted}" if wanted else start,
        f"sha256 {found}" if found else start,
    )
