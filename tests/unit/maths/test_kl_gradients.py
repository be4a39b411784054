"""What each penalty pulls towards: exact expectations over a softmax of 50 tokens, to 1e-10 (fact 10).

Tokens come from p = softmax(theta). As a reward, k is a constant weight on the score function: sum_v p_v k_v grad log p_v. As a
loss, k is differentiated at the sampled tokens: sum_v p_v grad k_v. Both sums run over the vocabulary, so nothing is sampled.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf_ray.maths import kl


@pytest.fixture
def theta() -> Tensor:
    return torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


@pytest.fixture
def ref_logits(theta) -> Tensor:
    return theta.detach() + 0.3 * torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def _grad(scalar: Tensor, theta: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(scalar, theta, allow_unused=True)
    return torch.zeros_like(theta) if grad is None else grad


def _as_reward(kind: str, theta: Tensor, ref: Tensor) -> Tensor:
    logp, logq = theta.log_softmax(-1), ref.log_softmax(-1)
    p, k = logp.detach().exp(), kl.penalty(kind, logp.detach(), logq)
    return _grad((p * k * logp).sum(), theta)


def _as_loss(kind: str, theta: Tensor, ref: Tensor) -> Tensor:
    logp, logq = theta.log_softmax(-1), ref.log_softmax(-1)
    return _grad((logp.detach().exp() * kl.penalty(kind, logp, logq)).sum(), theta)


def _reverse(theta: Tensor, ref: Tensor) -> Tensor:
    """grad KL(p||q)"""
    return _grad(kl.reverse_kl_full(theta, ref), theta)


def _forward(theta: Tensor, ref: Tensor) -> Tensor:
    """grad KL(q||p)"""
    return _grad(kl.reverse_kl_full(ref, theta), theta)


def _close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_the_two_directions_are_not_the_same_thing(theta, ref_logits) -> None:
    """Else the statements below would not tell them apart."""
    assert 0.02 < kl.reverse_kl_full(theta, ref_logits).item() < 0.08
    assert (_reverse(theta, ref_logits) - _forward(theta, ref_logits)).abs().max() > 1e-3


def test_k1_in_the_reward_follows_the_reverse_kl(theta, ref_logits) -> None:
    _close(_as_reward("kl", theta, ref_logits), _reverse(theta, ref_logits))


def test_k3_in_the_reward_follows_the_difference_of_both(theta, ref_logits) -> None:
    _close(_as_reward("bregman", theta, ref_logits), _reverse(theta, ref_logits) - _forward(theta, ref_logits))


def test_k1_as_a_loss_pulls_nowhere(theta, ref_logits) -> None:
    _close(_as_loss("kl", theta, ref_logits), torch.zeros(50, dtype=torch.float64))


def test_k2_as_a_loss_follows_the_reverse_kl(theta, ref_logits) -> None:
    _close(_as_loss("squared_error", theta, ref_logits), _reverse(theta, ref_logits))


def test_k3_as_a_loss_follows_the_forward_kl(theta, ref_logits) -> None:
    _close(_as_loss("bregman", theta, ref_logits), _forward(theta, ref_logits))


def test_in_the_reward_k3_and_js_pull_far_less_than_k1_near_the_reference(theta, ref_logits) -> None:
    pull = {kind: _as_reward(kind, theta, ref_logits).norm().item() for kind in kl.KINDS}
    for weak in ("bregman", "squared_error", "jensen_shannon"):
        assert pull[weak] < 0.3 * pull["kl"]
    assert 0.3 * pull["kl"] < pull["clamped_kl"] < pull["kl"]
    assert pull["none"] == 0


def test_the_gradient_of_k3_never_dies() -> None:
    """1 - e^-d, and its value at -20 below that. Clamped on both sides it was 0 beyond 20 nats, just where the pull is needed."""
    at = [-50.0, -20.5, -1.0, 0.0, 1e-3, 1.0, 20.5, 50.0]
    for dtype, close in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        d = torch.tensor(at, dtype=dtype, requires_grad=True)
        found = _grad(kl.penalty("bregman", d, torch.zeros_like(d)).sum(), d)
        assert found.tolist() == pytest.approx([1 - math.exp(-max(x, -20.0)) for x in at], rel=close, abs=1e-7)


@pytest.mark.parametrize("kind", [k for k in kl.KINDS if k != "none"])
def test_autograd_of_every_kind_matches_finite_differences(kind) -> None:
    d = torch.tensor([-3.0, -0.5, 0.4, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: kl.penalty(kind, x, torch.zeros_like(x)), (d,))


@pytest.mark.parametrize("kind", kl.KINDS)
def test_gradients_are_finite_where_policies_agree_or_parted(kind) -> None:
    d = torch.tensor([0.0, -300.0, 300.0], requires_grad=True)
    assert torch.isfinite(_grad((kl.penalty(kind, d, torch.zeros(3)) + 0 * d).sum(), d)).all()
