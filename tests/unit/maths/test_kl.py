"""The KL penalties: the unit facts that every implementation must meet, in log space (failures F13, F14)."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_ray.maths import kl
from rlhf_ray.maths.masks import zero_outside
from rlhf_ray.maths.rng import sample_inverse_cdf, uniforms

DIVERGENCES = [k for k in kl.KINDS if k != "none"]


def _at(d: list[float] | torch.Tensor, base: float = -1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """logprobs and ref_logprobs, float64, with the given differences."""
    d = torch.as_tensor(d, dtype=torch.float64)
    return base + d, torch.full_like(d, base)


@pytest.mark.parametrize("kind", kl.KINDS)
def test_fact_1_zero_where_policies_agree_and_at_masked_positions(kind) -> None:
    logprobs = torch.tensor([[-0.5, -3.0, -120.0]])
    assert kl.penalty(kind, logprobs, logprobs.clone()).tolist() == [[0, 0, 0]]
    padded = torch.tensor([[-0.5, torch.nan, torch.inf]])
    mask = torch.tensor([[True, False, False]])
    assert zero_outside(kl.penalty(kind, padded, torch.zeros(1, 3)), mask)[0, 1:].tolist() == [0, 0]


@pytest.mark.parametrize("kind", kl.KINDS)
def test_fact_2_golden_table(golden, kind) -> None:
    """The golden values are ratios of probabilities, as the ancestor computes them; the code stays in log space."""
    points = [d for d, _ in golden["penalties"]]
    expected = [row[kind] for _, row in golden["penalties"]]
    assert kl.penalty(kind, *_at(points)).tolist() == pytest.approx(expected, abs=1e-12)
    single = kl.penalty(kind, *(x.float() for x in _at(points)))
    assert single.dtype == torch.float32
    assert single.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_fact_3_named_kinds_are_the_estimators() -> None:
    logprobs, ref = _at(torch.linspace(-8, 8, 101))
    d = logprobs - ref
    assert torch.equal(kl.penalty("kl", logprobs, ref), kl.k1(logprobs, ref))
    assert torch.equal(kl.penalty("bregman", logprobs, ref), kl.k3(logprobs, ref))
    torch.testing.assert_close(kl.k1(logprobs, ref), d)
    torch.testing.assert_close(kl.k3(logprobs, ref), (torch.exp(-d) - 1) + d, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(kl.penalty("squared_error", logprobs, ref), d**2 / 2)
    for alias, name in {"k1": "kl", "k2": "squared_error", "k3": "bregman"}.items():
        assert kl.canonical(alias) == name
        assert torch.equal(kl.penalty(alias, logprobs, ref), kl.penalty(name, logprobs, ref))


def test_fact_4_jensen_shannon_is_even_and_bounded() -> None:
    d = torch.linspace(-50, 50, 2001, dtype=torch.float64)
    js = kl.penalty("jensen_shannon", *_at(d))
    torch.testing.assert_close(js, kl.penalty("jensen_shannon", *_at(-d)), rtol=0, atol=1e-15)
    assert js.min() >= 0 and js.max() <= 0.5 * math.log(2) < 0.346574
    near = d[d.abs() <= 30]
    p, q = torch.exp(near - 31), torch.full_like(near, math.exp(-31))
    m = (p + q) / 2
    seed_formula = ((p / m).log().clamp_min(0) + (q / m).log().clamp_min(0)) / 2
    torch.testing.assert_close(kl.penalty("jensen_shannon", *_at(near)), seed_formula, rtol=0, atol=1e-12)


def test_fact_5_estimators_are_unbiased_on_a_full_vocabulary(golden) -> None:
    g = golden["vocabulary"]
    logits_p, logits_q = (torch.tensor(g[x], dtype=torch.float64) for x in ("logits_p", "logits_q"))
    logp, logq = logits_p.log_softmax(-1), logits_q.log_softmax(-1)
    p = logp.exp()
    assert kl.reverse_kl_full(logits_p, logits_q).item() == pytest.approx(g["kl"], abs=1e-14)
    assert (p * kl.k1(logp, logq)).sum().item() == pytest.approx(g["kl"], abs=1e-12)
    assert (p * kl.k3(logp, logq)).sum().item() == pytest.approx(g["kl"], abs=1e-12)
    assert (p * kl.k3(logp, logq)).sum() >= 0
    assert kl.js_full(logits_p, logits_q).item() == pytest.approx(g["js"], abs=1e-14)
    # The per-token penalty of that name is not the divergence: its expectation is several times as large.
    assert (p * kl.penalty("jensen_shannon", logp, logq)).sum().item() > 2 * g["js"]


def test_fact_6_signs() -> None:
    tiny = torch.logspace(-45, -1, 2000, dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        d = torch.cat([-tiny, tiny, torch.linspace(-60, 60, 4001, dtype=torch.float64)]).to(dtype)
        zero = torch.zeros_like(d)
        assert (kl.penalty("clamped_kl", d, zero) >= kl.penalty("kl", d, zero)).all()
        for kind in ("clamped_kl", "bregman", "squared_error", "jensen_shannon"):
            assert (kl.penalty(kind, d, zero) >= 0).all(), kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_f13_fact_7_extreme_log_probabilities_stay_finite_and_exact(kind, dtype) -> None:
    base = torch.tensor([-200.0, -120.0, -90.0, 0.0])[:, None].expand(4, 101)
    logprobs = base.to(dtype)
    ref = (base - torch.linspace(-50, 50, 101)).to(dtype)
    got = kl.penalty(kind, logprobs, ref)
    assert got.dtype == torch.float32 and torch.isfinite(got).all()
    torch.testing.assert_close(got.double(), kl.penalty(kind, logprobs.double(), ref.double()), rtol=1e-5, atol=1e-6)


def test_f13_the_ratio_form_breaks_where_ours_does_not() -> None:
    logprobs, ref = torch.tensor([-120.0]), torch.tensor([-119.0])
    assert torch.isnan(ref.exp() / logprobs.exp() - 1 + (logprobs - ref)).all()
    assert kl.penalty("bregman", logprobs, ref).item() == pytest.approx(math.e - 2, rel=1e-6)


def test_fact_9_an_unknown_kind_lists_the_valid_names() -> None:
    with pytest.raises(
        ValueError, match="expected one of kl, clamped_kl, bregman, jensen_shannon, squared_error, none"
    ):
        kl.penalty("alpaca_farm", torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match="did you mean 'bregman'"):
        kl.canonical("bergman")


def test_none_costs_nothing() -> None:
    assert kl.penalty("none", *_at([3.0, -3.0])).tolist() == [0, 0]


def test_f14_a_negative_kl_is_shown_negative() -> None:
    logprobs, ref = _at([-0.5, -0.25, 0.1])
    assert kl.k1(logprobs, ref).mean() < -0.2
    assert kl.penalty("kl", logprobs, ref).mean() < -0.2


def test_precision_near_zero_in_float32() -> None:
    d = torch.logspace(-6, 0, 200, dtype=torch.float64)
    zero = torch.zeros(200)
    exact_js = kl.penalty("jensen_shannon", d.float().double(), zero.double())
    js = kl.penalty("jensen_shannon", d.float(), zero).double()
    assert ((js - exact_js) / exact_js).abs().max() < 1e-6
    k3 = kl.k3(d.float(), zero).double()
    assert (k3 - kl.k3(d.float().double(), zero.double())).abs().max() < 1e-7


def test_bregman_is_a_straight_line_below_its_limit_and_nothing_is_cut_above() -> None:
    logprobs, ref = _at([-1000.0, -20.5, -20.0, 0.0, 19.9, 21.0])
    at_limit = math.expm1(20) - 20
    expected = [at_limit + 980 * math.expm1(20), at_limit + 0.5 * math.expm1(20), at_limit]
    assert kl.k3(logprobs, ref)[:3].tolist() == pytest.approx(expected, rel=1e-12)
    far = kl.k3(*_at([23.22, 20.0, 100.0]))
    assert far.tolist() == pytest.approx([22.22, 19.0, 99.0], abs=1e-8), "it was 19 from d = 20 on"
    mask = torch.tensor([True, True, True, True, True, False])
    assert kl.clamped_share(logprobs, ref, mask).item() == pytest.approx(2 / 5)
    assert kl.clamped_share(logprobs, ref, torch.zeros(6, dtype=torch.bool)).item() == 0


def test_unequal_shapes_are_refused_rather_than_broadcast() -> None:
    with pytest.raises(ValueError, match=r"ref_logprobs: expected the shape of logprobs \(2, 1\), got \(2,\)"):
        kl.penalty("kl", torch.zeros(2, 1), torch.zeros(2))
    with pytest.raises(ValueError, match="logits_q"):
        kl.js_full(torch.zeros(2, 3), torch.zeros(3))


def test_full_vocabulary_divergences_with_excluded_tokens() -> None:
    p, q = torch.tensor([0.0, 0.0, -torch.inf]), torch.tensor([0.0, 0.0, 0.0])
    assert kl.reverse_kl_full(p, q).item() == pytest.approx(math.log(1.5), abs=1e-6)
    assert kl.reverse_kl_full(q, p).item() == math.inf
    disjoint = torch.tensor([-torch.inf, -torch.inf, 0.0])
    assert kl.js_full(p, disjoint).item() == pytest.approx(math.log(2), abs=1e-6)
    assert kl.js_full(p, p).item() == 0


def test_samples_agree_with_the_oracle() -> None:
    """k1 and k3 over sampled tokens meet the exact KL within 4 standard errors; clamped_kl and squared_error do not."""
    generator = torch.Generator().manual_seed(0)
    logits_q = torch.randn(50, generator=generator, dtype=torch.float64)
    logits_p = logits_q + 0.3 * torch.randn(50, generator=generator, dtype=torch.float64)
    n = 200_000
    u = uniforms(torch.full((n,), 11), torch.arange(n))
    logp, logq = logits_p.log_softmax(-1), logits_q.log_softmax(-1)
    tokens = sample_inverse_cdf(logp.exp()[None, :], u[:1]).new_empty(n)
    for part in range(0, n, 20_000):
        rows = slice(part, part + 20_000)
        tokens[rows] = sample_inverse_cdf(logp.exp().expand(20_000, 50), u[rows])
    exact = kl.reverse_kl_full(logits_p, logits_q).item()

    def distance(kind: str) -> float:
        k = kl.penalty(kind, logp[tokens], logq[tokens])
        return abs(k.mean().item() - exact) / (k.std().item() / math.sqrt(n))

    assert distance("kl") < 4 and distance("bregman") < 4
    assert distance("clamped_kl") > 20 and distance("jensen_shannon") > 20
