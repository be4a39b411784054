"""Reward shaping, GAE, group baselines and whitening (failures F3, F9, F33)."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_ray.maths import returns

CASES = ["ends at eos", "cut off by length", "lambda 1", "lambda 0", "gamma .9 lambda .8"]


# --- shaping ---


def test_f9_only_replies_without_eos_are_penalised() -> None:
    scores, finished = torch.tensor([0.5, 0.5, -2.0]), torch.tensor([True, False, False])
    assert returns.penalise_unfinished(scores, finished, 1.0).tolist() == [0.5, -0.5, -3.0]
    assert returns.penalise_unfinished(scores, finished, None).tolist() == [0.5, 0.5, -2.0]
    assert returns.penalise_unfinished(scores, finished, 0.0).tolist() == [0.5, 0.5, -2.0]
    with pytest.raises(ValueError, match="missing_eos_penalty"):
        returns.penalise_unfinished(scores, finished, -1.0)
    with pytest.raises(ValueError, match="finished: expected bool"):
        returns.penalise_unfinished(scores, finished.float(), 1.0)


def test_score_is_paid_once_at_the_last_real_token(reply_mask) -> None:
    mask = reply_mask([3, 4, 1], 4)
    penalty = torch.tensor([[1.0, -2.0, 0.5, 99.0], [1, 1, 1, 1], [0, torch.nan, torch.inf, 5]])
    shaped = returns.shape_rewards(torch.tensor([10.0, 20.0, 30.0]), penalty, 0.1, mask)
    expected = torch.tensor([[-0.1, 0.2, 9.95, 0], [-0.1, -0.1, -0.1, 19.9], [30, 0, 0, 0]])
    torch.testing.assert_close(shaped, expected)


def test_fact_8_a_coefficient_of_zero_leaves_exactly_the_score(reply_mask) -> None:
    penalty = torch.tensor([[torch.inf, torch.nan, 3.0]])
    shaped = returns.shape_rewards(torch.tensor([2.0]), penalty, 0.0, reply_mask([2], 3))
    assert shaped.tolist() == [[0.0, 2.0, 0.0]]
    assert returns.response_penalties(penalty, 0.0, reply_mask([2], 3)).tolist() == [0.0]


def test_shaping_refuses_empty_replies_and_wrong_shapes(reply_mask) -> None:
    with pytest.raises(ValueError, match="no real token"):
        returns.shape_rewards(torch.zeros(1), torch.zeros(1, 2), 0.1, reply_mask([0], 2))
    with pytest.raises(ValueError, match=r"scores: expected shape \(2,\), got \(2, 1\)"):
        returns.shape_rewards(torch.zeros(2, 1), torch.zeros(2, 2), 0.1, reply_mask([1, 2], 2))


# --- GAE ---


@pytest.mark.parametrize("case", CASES)
def test_gae_golden_and_f3_the_pad_column_does_not_leak(golden, case) -> None:
    g = golden["gae"]
    c = g["cases"][case]
    r = torch.tensor([[*g["rewards"], 0.0]])
    v = torch.tensor([[*g["values"], g["pad_value"]]])
    mask = torch.tensor([[True, True, True, False]])
    advantages, targets = returns.gae(r, v, mask, c["gamma"], c["lam"], torch.tensor([c["bootstrap"]]))
    assert advantages[0].tolist() == pytest.approx([*c["advantages"], 0], abs=1e-6)
    assert targets[0].tolist() == pytest.approx([*c["returns"], 0], abs=1e-6)
    assert advantages[0, :3].tolist() != pytest.approx(g["wrong_pad_counted"], abs=0.05)


def test_gae_without_bootstrap_is_bootstrap_zero(batch) -> None:
    b = batch(0, [3, 5], 6)
    args = (b["rewards"], b["values"], b["response_mask"], 0.99, 0.95)
    for none, zero in zip(returns.gae(*args), returns.gae(*args, bootstrap=torch.zeros(2))):
        assert torch.equal(none, zero)


def test_gae_rows_do_not_touch_each_other_and_width_does_not_matter(batch) -> None:
    b = batch(1, [3, 1, 6], 6)
    bootstrap = torch.tensor([0.3, -0.2, 1.5], dtype=torch.float64)
    whole = returns.gae(b["rewards"], b["values"], b["response_mask"], 0.97, 0.9, bootstrap)
    for i, n in enumerate((3, 1, 6)):
        row = [b[x][i : i + 1, :n] for x in ("rewards", "values", "response_mask")]
        alone = returns.gae(*row, 0.97, 0.9, bootstrap[i : i + 1])
        for part, full in zip(alone, whole):
            assert torch.equal(part[0], full[i, :n])


def test_gae_with_lambda_one_is_the_discounted_return(batch) -> None:
    b = batch(2, [5], 5)
    bootstrap = torch.tensor([2.0], dtype=torch.float64)
    _, targets = returns.gae(b["rewards"], b["values"], b["response_mask"], 0.9, 1.0, bootstrap)
    r = b["rewards"][0].tolist()
    for t in range(5):
        expected = math.fsum(0.9**k * x for k, x in enumerate(r[t:])) + 0.9 ** (5 - t) * 2.0
        assert targets[0, t].item() == pytest.approx(expected, rel=1e-12)


def test_gae_of_filler_rows_and_of_no_columns(reply_mask) -> None:
    a, r = returns.gae(torch.ones(2, 3), torch.ones(2, 3), reply_mask([0, 2], 3), 1.0, 0.95, torch.ones(2))
    assert a[0].tolist() == r[0].tolist() == [0, 0, 0]
    a, r = returns.gae(torch.ones(2, 0), torch.ones(2, 0), reply_mask([0, 0], 0), 1.0, 0.95)
    assert a.shape == r.shape == (2, 0)


def test_gae_computes_half_precision_in_float32(batch) -> None:
    b = batch(3, [4, 2], 4)
    half = [b[x].bfloat16() for x in ("rewards", "values")]
    a, _ = returns.gae(*half, b["response_mask"], 1.0, 0.95)
    exact, _ = returns.gae(*(x.double() for x in half), b["response_mask"], 1.0, 0.95)
    assert a.dtype == torch.float32
    torch.testing.assert_close(a.double(), exact, rtol=1e-6, atol=1e-6)


def test_gae_refuses_a_float_mask_and_wrong_shapes(reply_mask) -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"torch\.bool"):
        returns.gae(x, x, torch.ones(2, 3), 1.0, 0.95)
    with pytest.raises(ValueError, match="values: expected the shape of the mask"):
        returns.gae(x, torch.zeros(2, 4), reply_mask([3, 3], 3), 1.0, 0.95)
    with pytest.raises(ValueError, match=r"bootstrap: expected shape \(2,\), got \(2, 1\)"):
        returns.gae(x, x, reply_mask([3, 3], 3), 1.0, 0.95, torch.zeros(2, 1))


# --- group baselines ---


def test_group_baselines_golden(golden) -> None:
    g = golden["groups"]
    scores = torch.tensor(g["scores"])
    assert returns.rloo_advantages(scores, 3).tolist() == pytest.approx(g["rloo"], abs=1e-6)
    none = torch.zeros(6)
    for scale, name in (("group", "grpo"), ("batch", "grpo_batch"), ("none", "grpo_unscaled")):
        found = returns.grpo_advantages(scores, none, 3, scale, g["eps"])
        assert found.tolist() == pytest.approx(g[name], abs=1e-6), scale
    charged = returns.grpo_advantages(scores, torch.tensor(g["penalties"]), 3, "group", g["eps"])
    assert charged.tolist() == pytest.approx(g["grpo_penalised"], abs=1e-6)
    with pytest.raises(ValueError, match="scale_rewards: expected group, batch or none, got 'std'"):
        returns.grpo_advantages(scores, none, 3, "std", 1e-4)


@pytest.mark.parametrize("kl_coef", [0.001, 0.01, 0.05])
def test_a_group_of_equal_scores_learns_from_the_penalty_at_its_own_size(kl_coef: float) -> None:
    """8 equal scores, KL 2 +- 0.5 nats. Divided by the spread of score minus penalty the advantages were 0.81 to 0.93, whatever the
    coefficient; RLOO's are k / (k - 1) times the right ones."""
    nats = 2 + 0.5 * torch.randn(8, generator=torch.Generator().manual_seed(0))
    scores, penalties = torch.full((8,), 0.7), kl_coef * nats
    found = returns.grpo_advantages(scores, penalties, 8, "group", 1e-4)
    assert float(found.square().mean().sqrt()) == pytest.approx(kl_coef * float(nats.std(correction=0)), rel=1e-5)
    torch.testing.assert_close(found * 8 / 7, returns.rloo_advantages(scores - penalties, 8), rtol=1e-4, atol=1e-6)


def test_a_group_of_equal_scores_has_advantage_exactly_zero() -> None:
    for k in range(2, 12):  # in float32 the mean of k equal numbers is often not that number
        scores = torch.linspace(0.01, 5.0, 97).repeat_interleave(k)
        assert not returns.rloo_advantages(scores, k).any()
        assert not returns.grpo_advantages(scores, torch.zeros_like(scores), k, "group", 1e-4).any()
        assert returns.equal_groups(scores, k).all()


def test_groups_of_equal_scores_are_found() -> None:
    scores = torch.tensor([0.1, 0.1, 0.1, 0.2, 0.0, 0.0])
    assert returns.equal_groups(scores, 2).tolist() == [True, True, False, False, True, True]


@pytest.mark.parametrize(
    "function",
    [returns.rloo_advantages, lambda s, k: returns.grpo_advantages(s, torch.zeros_like(s), k, "group", 1e-4)],
)
def test_group_size_is_checked(function) -> None:
    for k in (1, 0):
        with pytest.raises(ValueError, match="num_generations: expected at least 2"):
            function(torch.zeros(4), k)
    with pytest.raises(ValueError, match="multiple of 3"):
        function(torch.zeros(4), 3)


def test_reply_scores_and_broadcast_to_tokens(reply_mask) -> None:
    mask = reply_mask([2, 3], 3)
    penalty = torch.tensor([[1.0, 2.0, 100.0], [1.0, 1.0, 1.0]])
    assert returns.response_penalties(penalty, 0.5, mask).tolist() == [1.5, 1.5]
    assert returns.response_penalties(penalty * torch.inf, 0.0, mask).tolist() == [0.0, 0.0]
    assert returns.to_tokens(torch.tensor([2.0, 3.0]), mask).tolist() == [[2, 2, 0], [3, 3, 3]]


# --- whitening ---


@pytest.mark.parametrize("pad", [0.0, 9.9, torch.nan])
def test_f3_whitening_golden_under_the_mask(golden, reply_mask, pad) -> None:
    g = golden["whitening"]
    mask = reply_mask([3, 1], 4)
    values = torch.tensor([[*row, *[pad] * (4 - len(row))] for row in g["rows"]])
    white = returns.whiten(values, mask, subtract_mean=True, eps=1e-12)
    assert white[mask].tolist() == pytest.approx([x for row in g["centred"] for x in row], abs=1e-6)
    kept = returns.whiten(values, mask, subtract_mean=False, eps=1e-12)
    assert kept[mask].tolist() == pytest.approx([x for row in g["uncentred"] for x in row], abs=1e-6)
    assert (white[~mask] == 0).all() and (kept[~mask] == 0).all(), "pads must not become -0.845 as in the unmasked form"
    unmasked = (1.0 - g["wrong_unmasked_mean"]) / math.sqrt(g["wrong_unmasked_var"])
    assert white[0, 0].item() != pytest.approx(unmasked, abs=0.05)


def test_f33_whitening_without_spread_gives_no_nan(reply_mask) -> None:
    one = returns.whiten(torch.tensor([[3.0, 7.0]]), reply_mask([1], 2), True, 1e-8)
    assert one.tolist() == [[0, 0]]
    constant = returns.whiten(torch.full((4, 25), 0.1), reply_mask([25] * 4, 25), True, 1e-8)
    assert constant.abs().max() < 1e-6
    assert returns.whiten(torch.ones(1, 2), reply_mask([0], 2), True, 1e-8).tolist() == [[0, 0]]
