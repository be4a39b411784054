"""Properties that hold for every batch: padding is inert, rows are exchangeable, and microbatches add up (failures F1, F3, F12)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_ray.maths import kl, losses, masks, returns, stats

EXAMPLES = settings(max_examples=40, deadline=None, derandomize=True)

Batch = dict[str, Tensor]
LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=6)
SEEDS = st.integers(0, 10_000)
GARBAGE = st.sampled_from([math.nan, math.inf, -math.inf, 1e30, 9.9])


def _spoil(b: Batch, garbage: float) -> Batch:
    mask = b["response_mask"]
    return {k: x if x.dtype == torch.bool else x.masked_fill(~mask, garbage) for k, x in b.items()}


def _widen(b: Batch, columns: int) -> Batch:
    return {
        k: torch.nn.functional.pad(x, (0, columns), value=False if x.dtype == torch.bool else 7.7) for k, x in b.items()
    }


def _policy(b: Batch) -> Tensor:
    names = ("new_logprobs", "old_logprobs", "advantages", "response_mask")
    return losses.policy_loss_sum(**{n: b[n] for n in names}, cliprange=0.2)[0]


def _value(b: Batch) -> Tensor:
    return losses.value_loss_sum(b["values"], b["old_values"], b["returns"], b["response_mask"], 0.2)[0]


def _kl_loss(b: Batch) -> Tensor:
    return losses.kl_loss_sum("squared_error", b["new_logprobs"], b["ref_logprobs"], b["response_mask"])[0]


LOSSES = {"policy": _policy, "value": _value, "kl": _kl_loss}


def _everything(b: Batch) -> list[Tensor]:
    """All tensors that one step computes from a batch."""
    mask = b["response_mask"]
    penalty = kl.penalty("bregman", b["old_logprobs"], b["ref_logprobs"])
    shaped = returns.shape_rewards(b["rewards"][:, 0], penalty, 0.05, mask)
    advantages, targets = returns.gae(shaped, b["values"], mask, 0.99, 0.95, b["old_values"][:, 0])
    white = returns.whiten(advantages, mask, True, 1e-8)
    weights = losses.truncated_importance_weights(b["new_logprobs"], b["old_logprobs"], mask, 1.5)
    policy = losses.policy_loss_sum(b["new_logprobs"], b["old_logprobs"], white, mask, 0.2, weights)
    value = losses.value_loss_sum(b["values"], b["old_values"], targets, mask, 0.2)
    explained = torch.tensor(stats.explained_variance(b["values"], targets, mask))
    scalars = [policy[0], policy[1], value[0], *policy[2].values(), *value[2].values(), explained]
    return [shaped, advantages, targets, white, weights, *scalars, masks.masked_sum(penalty, mask, dim=1)]


def _real(x: Tensor, mask: Tensor) -> Tensor:
    return x[mask] if x.shape == mask.shape else x


@EXAMPLES
@given(LENGTHS, SEEDS, GARBAGE)
def test_f3_garbage_outside_the_mask_changes_nothing(batch, lengths, seed, garbage) -> None:
    clean = batch(seed, lengths, 6)
    # Column 0 is real in every row, so the per-row inputs taken from it are the same.
    for a, b in zip(_everything(clean), _everything(_spoil(clean, garbage))):
        assert torch.equal(a, b) or (a.isnan().all() and b.isnan().all())


@EXAMPLES
@given(LENGTHS, SEEDS, st.integers(1, 5))
def test_f12_more_padding_columns_change_nothing(batch, lengths, seed, columns) -> None:
    clean = batch(seed, lengths, 6)
    wide = _widen(clean, columns)
    for a, b in zip(_everything(clean), _everything(wide)):
        torch.testing.assert_close(_real(a, clean["response_mask"]), _real(b, wide["response_mask"]), equal_nan=True)


@EXAMPLES
@given(LENGTHS, SEEDS, st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_nothing(batch, lengths, seed, random) -> None:
    b = batch(seed, lengths, 6)
    order = list(range(len(lengths)))
    random.shuffle(order)
    for one, other in zip(_everything(b), _everything({k: x[order] for k, x in b.items()})):
        per_row = one[order] if one.ndim else one
        torch.testing.assert_close(per_row, other, rtol=1e-9, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("name", LOSSES)
@EXAMPLES
@given(seed=SEEDS, lengths=st.lists(st.integers(0, 6), min_size=8, max_size=8))
def test_f1_eight_microbatches_of_one_equal_one_of_eight(batch, name, seed, lengths) -> None:
    """In the loss AND in the gradient of a shared weight, with lengths that differ and filler rows of length 0."""
    b = batch(seed, lengths, 6)
    loss = LOSSES[name]
    count = max(1, int(b["response_mask"].sum()))

    def run(parts: list[slice]) -> tuple[float, float]:
        weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        total = 0.0
        for rows in parts:
            part = {k: x[rows] for k, x in b.items()}
            part["new_logprobs"], part["values"] = weight * part["new_logprobs"], weight * part["values"]
            share = loss(part) / count
            share.backward()
            total += share.item()
        return total, weight.grad.item()

    assert run([slice(i, i + 1) for i in range(8)]) == pytest.approx(run([slice(0, 8)]), rel=1e-9, abs=1e-12)
    assert run([slice(0, 3), slice(3, 8)]) == pytest.approx(run([slice(0, 8)]), rel=1e-9, abs=1e-12)


@EXAMPLES
@given(st.lists(st.integers(2, 6), min_size=2, max_size=6), SEEDS, st.floats(0.01, 1000), st.floats(-50, 50))
def test_whitened_values_have_mean_zero_and_variance_one(batch, lengths, seed, scale, shift) -> None:
    b = batch(seed, lengths, 6)
    mask, x = b["response_mask"], b["advantages"] * scale + shift
    white = returns.whiten(x, mask, True, 1e-12)
    assert masks.masked_mean(white, mask).item() == pytest.approx(0, abs=1e-9)
    assert masks.masked_var(white, mask).item() == pytest.approx(1, rel=1e-6)
    kept = returns.whiten(x, mask, False, 1e-12)
    assert masks.masked_mean(kept, mask).item() == pytest.approx(masks.masked_mean(x, mask).item(), rel=1e-6, abs=1e-6)


@EXAMPLES
@given(SEEDS, st.integers(2, 30), st.floats(0.0, 20.0))
def test_full_divergences_are_bounded_and_js_is_symmetric(seed, vocabulary, spread) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, q = (spread * torch.randn(3, vocabulary, generator=generator, dtype=torch.float64) for _ in range(2))
    js = kl.js_full(p, q)
    torch.testing.assert_close(js, kl.js_full(q, p), rtol=1e-9, atol=1e-12)
    assert (js >= -1e-12).all() and (js <= math.log(2) + 1e-12).all()
    assert (kl.reverse_kl_full(p, q) >= -1e-12).all()
    assert (js <= (kl.reverse_kl_full(p, q) + kl.reverse_kl_full(q, p)) / 4 + 1e-12).all()  # Lin 1991


@EXAMPLES
@given(st.floats(-60, 60), st.floats(-300, 0))
def test_penalties_depend_on_the_difference_alone_and_keep_their_signs(d, base) -> None:
    at = {k: kl.penalty(k, torch.tensor([base + d]), torch.tensor([base])).item() for k in kl.KINDS}
    exact = {k: kl.penalty(k, torch.tensor([d]), torch.tensor([0.0])).item() for k in kl.KINDS}
    for kind in kl.KINDS:  # base + d loses up to 2e-5 of d in float32; bregman magnifies that by e^|d|
        assert at[kind] == pytest.approx(exact[kind], rel=2e-4, abs=1e-3)
    assert exact["clamped_kl"] >= exact["kl"]
    assert min(exact["bregman"], exact["squared_error"], exact["jensen_shannon"], exact["clamped_kl"]) >= 0
    assert exact["jensen_shannon"] <= 0.5 * math.log(2) + 1e-7


GROUPED = {
    "rloo": returns.rloo_advantages,
    "grpo": lambda scores, k: returns.grpo_advantages(scores, torch.zeros_like(scores), k, "group", 1e-4),
    "grpo unscaled": lambda scores, k: returns.grpo_advantages(scores, torch.zeros_like(scores), k, "none", 1e-4),
}


@pytest.mark.parametrize("name", GROUPED)
@EXAMPLES
@given(seed=SEEDS, k=st.integers(2, 5), groups=st.integers(1, 4), shift=st.floats(-100, 100))
def test_group_advantages_sum_to_zero_and_ignore_a_shift_per_prompt(name, seed, k, groups, shift) -> None:
    scores = torch.randn(groups * k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    advantages = GROUPED[name](scores, k)
    assert advantages.view(groups, k).sum(dim=1).abs().max() < 1e-9
    moved = scores.clone()
    moved[:k] += shift
    torch.testing.assert_close(GROUPED[name](moved, k), advantages, rtol=1e-6, atol=1e-9)
