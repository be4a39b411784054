"""Losses as (sum, count): golden values, clipping, normalisation by tokens, and no number from padding (failures F1, F3, F30)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf_ray.maths import losses


def _one_token(golden_row: list[float]) -> dict[str, Tensor]:
    a, rho = golden_row[:2]
    old = torch.tensor([[-1.0]], dtype=torch.float64)
    return {
        "new_logprobs": old + math.log(rho),
        "old_logprobs": old,
        "advantages": torch.tensor([[a]], dtype=torch.float64),
        "response_mask": torch.tensor([[True]]),
    }


def _policy(b: dict[str, Tensor], **more):
    names = ("new_logprobs", "old_logprobs", "advantages", "response_mask")
    return losses.policy_loss_sum(**{n: b[n] for n in names}, cliprange=0.2, **more)


def _value(b: dict[str, Tensor], cliprange_value: float | None = 0.2):
    return losses.value_loss_sum(b["values"], b["old_values"], b["returns"], b["response_mask"], cliprange_value)


# --- policy ---


def test_policy_golden(golden) -> None:
    for row, (rho, approx_kl) in zip(golden["losses"]["policy"], golden["losses"]["policy_approx_kl"]):
        total, count, stats = _policy(_one_token(row))
        assert total.item() == pytest.approx(row[2], abs=1e-12) and count.item() == 1
        assert stats["approx_kl"].item() == pytest.approx(approx_kl, abs=1e-12)
        assert stats["ratio"].item() == pytest.approx(rho)
        assert stats["ratio_max_deviation"].item() == pytest.approx(abs(rho - 1))


@pytest.mark.parametrize(
    ("advantage", "rho", "clipped"),
    [(1, 1.5, 1), (1, 0.5, 0), (-1, 1.5, 0), (-1, 0.5, 1), (1, 1.1, 0), (-1, 0.9, 0), (1, 1.0, 0)],
)
def test_clip_fraction_counts_where_clipping_stops_the_gradient(advantage, rho, clipped) -> None:
    b = _one_token([advantage, rho])
    b["new_logprobs"].requires_grad_()
    total, _, stats = _policy(b)
    total.backward()
    assert stats["clip_fraction"].item() == clipped
    assert b["new_logprobs"].grad.item() == pytest.approx(0.0 if clipped else -advantage * rho)


def test_on_the_first_minibatch_the_ratio_is_one_and_the_gradient_the_policy_gradient(batch) -> None:
    b = batch(0, [3, 5], 5)
    b["new_logprobs"] = b["old_logprobs"].clone().requires_grad_()
    total, _, stats = _policy(b)
    total.backward()
    assert stats["ratio_max_deviation"].item() == 0 and stats["approx_kl"].item() == 0
    mask = b["response_mask"]
    torch.testing.assert_close(b["new_logprobs"].grad, torch.where(mask, -b["advantages"], 0.0))


def test_an_overflowing_ratio_puts_no_nan_into_the_gradient(reply_mask) -> None:
    new = torch.tensor([[0.0, -500.0, -1.0]], requires_grad=True)
    old = torch.tensor([[-500.0, 0.0, -1.0]])
    for sign in (1.0, -1.0):
        total, _, stats = losses.policy_loss_sum(new, old, sign * torch.ones(1, 3), reply_mask([3], 3), 0.2)
        (grad,) = torch.autograd.grad(total, new)
        assert torch.isfinite(grad).all() and torch.isfinite(total)
        assert all(torch.isfinite(x) for x in stats.values())


def test_importance_weights_scale_tokens_and_are_constants(batch) -> None:
    b = batch(1, [2, 4], 4)
    weights = torch.full_like(b["advantages"], 3.0).requires_grad_()
    plain, count, plain_stats = _policy(b)
    b["new_logprobs"].requires_grad_()
    total, same_count, stats = _policy(b, token_weights=weights)
    torch.testing.assert_close(total.detach(), 3 * plain)
    assert same_count == count and stats["clip_fraction"] == plain_stats["clip_fraction"]
    total.backward()
    assert weights.grad is None


def test_truncated_importance_weights(reply_mask) -> None:
    old = torch.tensor([[-1.0, -1.0, -1.0, torch.nan]], requires_grad=True)
    behaviour = torch.tensor([[-1.0, -0.5, -900.0, 0.0]])
    w = losses.truncated_importance_weights(old, behaviour, reply_mask([3], 4), cap=2.0)
    assert w[0].tolist() == pytest.approx([1.0, math.exp(-0.5), 2.0, 0.0])
    assert w[0, 2].item() == 2.0 and not w.requires_grad
    with pytest.raises(ValueError, match="cap"):
        losses.truncated_importance_weights(old, behaviour, reply_mask([3], 4), cap=0.0)


# --- value ---


def test_value_golden(golden) -> None:
    for clip, rows in ((0.2, golden["losses"]["value"]), (None, golden["losses"]["value_unclipped"])):
        for v, old, target, expected in rows:
            one = [torch.tensor([[x]], dtype=torch.float64) for x in (v, old, target)]
            total, count, _ = losses.value_loss_sum(*one, torch.tensor([[True]]), clip)
            assert total.item() == pytest.approx(expected, abs=1e-12) and count.item() == 1


def test_value_stats_and_gradient(batch) -> None:
    b = batch(2, [3, 2], 4)
    b["values"].requires_grad_()
    mask = b["response_mask"]
    total, count, stats = _value(b, None)
    total.backward()
    error = torch.where(mask, b["values"].detach() - b["returns"], 0.0)
    torch.testing.assert_close(b["values"].grad, error)
    torch.testing.assert_close(stats["squared_error"], error.square().sum())
    torch.testing.assert_close(stats["value"], b["values"].detach()[mask].sum())
    assert count.item() == 5 and stats["clip_fraction"].item() == 0


def test_value_clip_fraction_is_not_fooled_by_rounding() -> None:
    """old + (v - old) differs from v in the last bit: that is not a clipped value."""
    v, old = torch.full((1, 1000), 0.1), torch.linspace(0.05, 0.15, 1000)[None, :]
    target = torch.full((1, 1000), 0.2)
    mask = torch.ones(1, 1000, dtype=torch.bool)
    assert losses.value_loss_sum(v, old, target, mask, 0.2)[2]["clip_fraction"].item() == 0
    far = losses.value_loss_sum(v + 1, old, target + 3, mask, 0.2)[2]["clip_fraction"].item()
    assert far == 1000


# --- KL as a loss, reward model ---


def test_kl_loss_sum_is_the_masked_penalty(batch) -> None:
    b = batch(3, [3, 1], 3)
    total, count = losses.kl_loss_sum("squared_error", b["new_logprobs"], b["ref_logprobs"], b["response_mask"])
    d = (b["new_logprobs"] - b["ref_logprobs"])[b["response_mask"]]
    assert total.item() == pytest.approx((d.square() / 2).sum().item()) and count.item() == 4


def test_pairwise_golden_margin_and_extremes(golden) -> None:
    gaps = torch.tensor([g for g, _ in golden["losses"]["pairwise"]])
    total, count = losses.pairwise_reward_loss_sum(gaps + 7, torch.full((4,), 7.0))
    assert total.item() == pytest.approx(sum(x for _, x in golden["losses"]["pairwise"]), rel=1e-6)
    assert count.item() == 4
    with_margin, _ = losses.pairwise_reward_loss_sum(torch.tensor([3.0]), torch.tensor([0.0]), torch.tensor([1.0]))
    assert with_margin.item() == pytest.approx(golden["losses"]["pairwise"][1][1], rel=1e-6)  # gap 3 - 1 = 2
    far = torch.tensor([1000.0, -1000.0], requires_grad=True)
    total, _ = losses.pairwise_reward_loss_sum(far, torch.zeros(2))
    total.backward()
    assert total.item() == pytest.approx(1000) and far.grad.tolist() == [0, -1]


def test_pairwise_refuses_broadcasting() -> None:
    with pytest.raises(ValueError, match=r"expected the shape of chosen \(2, 1\), got \(2,\)"):
        losses.pairwise_reward_loss_sum(torch.zeros(2, 1), torch.zeros(2))
    with pytest.raises(ValueError, match="margin"):
        losses.pairwise_reward_loss_sum(torch.zeros(2), torch.zeros(2), torch.zeros(1))


# --- normalisation and padding ---


def test_f1_tokens_are_normalised_once(golden) -> None:
    """Four tokens of loss 1 and one of loss 3 are 1.4 per token; the mean of the two means would be 2."""
    g = golden["losses"]
    total, count = 0.0, 0
    for part in g["token_losses"]:
        logprobs = torch.zeros(1, len(part))
        advantages = -torch.tensor([part])  # ratio 1, so the loss of a token is minus its advantage
        s, n, _ = losses.policy_loss_sum(
            logprobs, logprobs, advantages, torch.ones(1, len(part), dtype=torch.bool), 0.2
        )
        total, count = total + s.item(), count + n.item()
    assert total / count == pytest.approx(g["normalised"])
    assert total / count != pytest.approx(g["wrong_mean_of_means"])


def test_f30_a_batch_without_tokens_gives_zero_and_no_nan(batch) -> None:
    for width in (4, 0):  # width 0: a microbatch of filler rows alone, cut to its real columns
        b = batch(4, [0, 0], width)
        for key in ("new_logprobs", "values"):
            b[key] = torch.full((2, width), torch.nan, dtype=torch.float64, requires_grad=True)
        (p, n, ps), (v, m, vs) = _policy(b), _value(b)
        (p + v).backward()
        assert p.item() == v.item() == n.item() == m.item() == 0
        assert all(x.item() == 0 for x in [*ps.values(), *vs.values()])
        assert (b["new_logprobs"].grad == 0).all() and (b["values"].grad == 0).all()


def test_half_precision_inputs_are_computed_in_float32(batch) -> None:
    b = batch(5, [40, 50], 50)
    half = {k: x if x.dtype == torch.bool else x.bfloat16() for k, x in b.items()}
    exact = {k: x if x.dtype == torch.bool else x.double() for k, x in half.items()}
    for function in (_policy, _value):
        got, want = function(half)[0], function(exact)[0]
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)


# --- what 2026 adds: each from its definition, worked by hand ---


@pytest.mark.parametrize(
    ("advantage", "rho", "more", "expected"),
    [
        (1.0, 1.5, {"cliprange_high": 0.28}, -1.28),  # DAPO: clipped at 1.28, not at 1.2
        (1.0, 1.25, {"cliprange_high": 0.28}, -1.25),
        (-1.0, 0.5, {"cliprange_high": 0.28}, 0.8),  # downwards as before
        (-1.0, 9.0, {"dual_clip": 3.0}, 3.0),  # 9 without a bound
        (-1.0, 2.0, {"dual_clip": 3.0}, 2.0),
        (-2.0, 9.0, {"dual_clip": 3.0}, 6.0),
        (1.0, 9.0, {"dual_clip": 3.0}, -1.2),  # only where the advantage is negative
    ],
)
def test_clip_higher_and_dual_clip(advantage: float, rho: float, more: dict[str, float], expected: float) -> None:
    b = _one_token([advantage, rho])
    b["new_logprobs"].requires_grad_()
    total, _, _ = _policy(b, **more)
    assert total.item() == pytest.approx(expected)
    total.backward()
    moves = expected == pytest.approx(-advantage * rho)  # the ratio itself, not a bound of it
    assert (b["new_logprobs"].grad.item() != 0) is moves


def test_the_ratio_of_a_reply_is_the_geometric_mean_of_its_tokens(reply_mask) -> None:
    """Log-ratios 0.3 and -0.1: s = e^0.1 for both tokens, whatever stands in padding. A token's gradient of s A is s A / |y|."""
    new = torch.tensor([[0.3, -0.1, 7.0], [0.0, 0.0, 0.2]], requires_grad=True)
    mask, advantages = reply_mask([2, 3], 3), torch.tensor([[2.0, 2.0, 0.0], [-1.0, -1.0, -1.0]])
    total, _, stats = losses.policy_loss_sum(new, torch.zeros(2, 3), advantages, mask, 0.2, ratio_level="sequence")
    first, second = math.exp(0.1), math.exp(0.2 / 3)
    assert total.item() == pytest.approx(-4 * first + 3 * second, rel=1e-6)
    total.backward()
    expected = torch.tensor([[-2 * first, -2 * first, 0.0], [second, second, second]])
    torch.testing.assert_close(new.grad, expected)
    assert stats["ratio"].item() == pytest.approx(2 * first + 3 * second, rel=1e-6)
    assert stats["approx_kl"].item() == pytest.approx(sum(math.expm1(d) - d for d in (0.3, -0.1, 0.2)), rel=1e-5), (
        "of the tokens"
    )
    with pytest.raises(ValueError, match="ratio_level: expected token or sequence, got 'reply'"):
        losses.policy_loss_sum(new, torch.zeros(2, 3), advantages, mask, 0.2, ratio_level="reply")


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token_mean", (4 * 1.0 + 1 * 3.0) / 5),
        ("seq_mean_token_sum", (4 * 1.0 + 3.0) / 2),
        ("seq_mean_token_mean", (1.0 + 3.0) / 2),
    ],
)
def test_losses_of_a_step_are_aggregated_as_their_names_say(aggregation: str, expected: float, reply_mask) -> None:
    """Four tokens of loss 1 and one of loss 3: advantages -1 and -3 at a ratio of 1. In one batch or two, the same."""
    mask, lengths = reply_mask([4, 1], 4), torch.tensor([4, 1])
    advantages = torch.tensor([[-1.0] * 4, [-3.0, 0.0, 0.0, 0.0]])
    weights, zero = losses.aggregation_weights(aggregation, lengths), torch.zeros(2, 4)
    whole = losses.policy_loss_sum(zero, zero, advantages, mask, 0.2, row_weights=weights)[0] / 5
    assert whole.item() == pytest.approx(expected)
    parts = [
        losses.policy_loss_sum(
            zero[i], zero[i], advantages[i], mask[i], 0.2, row_weights=None if weights is None else weights[i]
        )[0]
        for i in (slice(0, 1), slice(1, 2))
    ]
    assert sum(parts).item() / 5 == pytest.approx(expected)
    penalty = losses.kl_loss_sum("squared_error", zero + 1.0, zero, mask, row_weights=weights)[0] / 5
    sums = {"token_mean": 0.5, "seq_mean_token_sum": (2.0 + 0.5) / 2, "seq_mean_token_mean": 0.5}
    assert penalty.item() == pytest.approx(sums[aggregation])


def test_an_unknown_aggregation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"loss_aggregation: expected token_mean, .*, got 'mean'"):
        losses.aggregation_weights("mean", torch.tensor([1]))


def test_centring_by_hand_and_its_pull() -> None:
    """(1 + 0.5)^2 + (-2 + 1)^2; the gradient of a pair is the same for both scores, so it moves their mean and not their gap."""
    chosen, rejected = torch.tensor([1.0, -2.0], requires_grad=True), torch.tensor([0.5, 1.0], requires_grad=True)
    total, count = losses.centring_loss_sum(chosen, rejected)
    assert (total.item(), count.item()) == (3.25, 2)
    total.backward()
    assert chosen.grad.tolist() == rejected.grad.tolist() == [3.0, -2.0]
    with pytest.raises(ValueError, match="rejected: expected the shape of chosen"):
        losses.centring_loss_sum(chosen, rejected[:1])


def test_dpo_golden_stats_and_extremes(golden) -> None:
    """From the definition; policy = reference gives ln 2; far apart it stays finite, with a gradient that points the right way."""
    assert golden["losses"]["dpo"][0][-1] == pytest.approx(math.log(2), rel=1e-12)
    for *logps, beta, smoothing, expected in golden["losses"]["dpo"]:
        total, count, stats = losses.dpo_loss_sum(*torch.tensor(logps)[:, None], beta, smoothing)
        assert total.item() == pytest.approx(expected, rel=1e-6) and int(count) == 1
        gap = beta * ((logps[0] - logps[2]) - (logps[1] - logps[3]))
        assert float(stats["chosen"] - stats["rejected"]) == pytest.approx(gap, abs=1e-6)
        assert float(stats["won"]) == (0.5 if gap == 0 else float(gap > 0))
    chosen = torch.tensor([-900.0], requires_grad=True)
    far, *_ = losses.dpo_loss_sum(chosen, torch.zeros(1), torch.zeros(1), torch.tensor([-900.0]), 1.0)
    far.backward()
    assert math.isfinite(far.item()) and chosen.grad is not None and chosen.grad.item() == pytest.approx(-1.0)
    with pytest.raises(ValueError, match="rejected"):
        losses.dpo_loss_sum(torch.zeros(2), torch.zeros(1), torch.zeros(2), torch.zeros(2), 0.1)
    with pytest.raises(ValueError, match="label_smoothing"):
        losses.dpo_loss_sum(*torch.zeros(4, 1), 0.1, 0.5)
