"""What every run checks of itself, given something that breaks it: the run stops with the step and the numbers (exit 1)."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rlhf_ray.batches import Rollout
from rlhf_ray.errors import InvariantError
from rlhf_ray.roles import invariants
from rlhf_ray.roles.learner import RATIO_LIMIT, Learner, UpdateStats

MASK = torch.tensor([[True, True, False], [True, False, False]])
LOGPROBS = torch.tensor([[-1.0, -2.0, 0.0], [-0.5, 0.0, 0.0]])
LIMIT = invariants.AGREEMENT["float32"]


def rollout() -> Rollout:
    return Rollout(
        tokens=torch.arange(8).view(2, 4),
        prompt_mask=torch.ones(2, 1, dtype=torch.bool),
        response_mask=MASK,
        sample_logprobs=LOGPROBS.clone(),
        finished=torch.tensor([True, True]),
        row_id=torch.arange(2),
        adapter_version=7,
        adapter_sha256="aa",
    )


def shifted(by: float, column: int = 0) -> Tensor:
    """LOGPROBS with one column moved, whether it is real or padding."""
    moved = LOGPROBS.clone()
    moved[:, column] += by
    return moved


def told(error: pytest.ExceptionInfo[InvariantError], *parts: str) -> None:
    assert error.value.exit_code == 1 and len(error.value.lines()) == 1
    for part in parts:
        assert part in str(error.value)


def test_a_sampler_with_other_weights_or_temperature_is_found_out() -> None:
    """A sync that did nothing is the costliest silent failure: the mean over real tokens is compared, padding is not."""
    invariants.check_sampler_agrees(rollout(), shifted(1.4 * LIMIT), LIMIT, 3)  # 2 of 3 tokens moved: 0.93 of the limit
    invariants.check_sampler_agrees(rollout(), shifted(9.9, column=2), LIMIT, 3)
    for broken in (shifted(1.6 * LIMIT), shifted(-1.0), shifted(math.nan)):
        with pytest.raises(InvariantError) as caught:
            invariants.check_sampler_agrees(rollout(), broken, LIMIT, 3)
        told(caught, "step 3", "adapter version 7", f"{LIMIT:g}")


def test_a_reference_that_is_not_the_start_is_found_out() -> None:
    """F15 (a floor of KL from another kernel or precision), F38 (the reference is another adapter than the policy starts from)."""
    invariants.check_starts_at_reference(LOGPROBS, shifted(1.4 * LIMIT), MASK, LIMIT, 1)
    for broken in (shifted(0.02), shifted(-0.02), shifted(math.nan)):
        with pytest.raises(InvariantError) as caught:
            invariants.check_starts_at_reference(LOGPROBS, broken, MASK, LIMIT, 1)
        told(caught, "step 1", "differs from its reference")


def test_coarse_number_formats_get_a_coarse_limit() -> None:
    assert invariants.tolerance(torch.float32, quantised=False) == 1e-3
    for dtype, quantised in ((torch.bfloat16, False), (torch.float16, False), (torch.float32, True)):
        assert invariants.tolerance(dtype, quantised) == 0.05


@pytest.mark.parametrize(
    ("tensors", "after", "message"),
    [
        ({}, "bb", "adapter is empty"),
        ({"a": torch.zeros(2), "b": torch.zeros(3)}, "bb", "adapter is empty"),
        ({"a": torch.ones(2), "b": torch.tensor([1.0, math.nan])}, "bb", r"not finite: b \(1 tensors\)"),
        ({"a": torch.tensor([math.inf])}, "bb", "not finite: a"),
        ({"a": torch.ones(2)}, "aa", "did not change the policy adapter"),
    ],
)
def test_an_update_that_leaves_nothing_new_stops_the_run(tensors: dict[str, Tensor], after: str, message: str) -> None:
    """F6 (a first update at learning rate 0 changes nothing), F25 (an empty adapter)."""
    with pytest.raises(InvariantError, match=message) as caught:
        invariants.check_adapter_changed("aa", after, tensors, 4)
    told(caught, "step 4")


def test_an_update_that_changes_something_passes() -> None:
    invariants.check_adapter_changed("aa", "bb", {"a": torch.zeros(2), "b": torch.ones(1)}, 1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_stops_the_run_by_name(value: float) -> None:
    """F13: never nan_to_num. The explained variance of constant returns is undefined, and no fault."""
    with pytest.raises(InvariantError) as caught:
        invariants.check_finite({"loss/policy": 1.0, "kl/k1_per_response": value}, 5)
    told(caught, "step 5", f"kl/k1_per_response = {value}")
    invariants.check_finite({"value/explained_variance": math.nan, "loss/policy": 0.0}, 5)


def test_replies_of_another_adapter_name_both() -> None:
    stale = replace(rollout(), adapter_sha256="old")
    text = str(invariants.stale_adapter(stale, "new", 6))
    for part in ("step 6", "version 7", "sha256 new", "sha256 old"):
        assert part in text


@pytest.mark.parametrize("worst", [2 * RATIO_LIMIT, 0.3, math.nan])
def test_a_first_ratio_that_is_not_1_stops_the_run(worst: float) -> None:
    """F5: dropout making ratio != 1, or any other difference between the pass that evaluates and the pass that updates."""
    with pytest.raises(InvariantError) as caught:
        Learner._check_first_ratio(None, UpdateStats(maxima={"first_deviation": worst}), 2)  # type: ignore[arg-type]
    told(caught, "step 2", "dropout", f"{RATIO_LIMIT:g}")
    Learner._check_first_ratio(None, UpdateStats(maxima={"first_deviation": RATIO_LIMIT}), 2)  # type: ignore[arg-type]
