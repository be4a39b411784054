"""Counter-based randomness: the same bits everywhere, independent of the batch, and random enough to sample from."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf_ray.maths import rng


def _stream(seed: int, n: int) -> Tensor:
    return rng.uniforms(torch.full((n,), seed), torch.arange(n))


# --- seeds ---


def test_row_seeds_are_stable_across_versions() -> None:
    """A change here breaks the reproduction of every stored run: it needs an entry in the change log."""
    import hashlib

    text = b'[7, "row", "generate", 3, 11]'
    expected = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") % 2**63
    assert rng.row_seed(7, "generate", 3, 11) == expected
    assert 0 <= expected < 2**63


def test_every_part_of_a_row_seed_counts() -> None:
    seeds = {
        rng.row_seed(run, role, step, row)
        for run in (0, 1, -1, 2**70)
        for role in ("generate", "evaluate")
        for step in range(5)
        for row in range(50)
    }
    assert len(seeds) == 4 * 2 * 5 * 50
    assert rng.derived_seed(1, 23) != rng.derived_seed(12, 3) != rng.derived_seed(1, "23")


def test_only_integers_and_text_make_a_seed() -> None:
    with pytest.raises(TypeError):
        rng.derived_seed(0, 1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        rng.derived_seed(0.0)  # type: ignore[arg-type]


# --- uniforms ---


def test_uniforms_golden_from_unsigned_integers(golden) -> None:
    g = golden["random"]
    seeds = torch.tensor(g["seeds"])
    got = rng.uniforms(seeds[:, None], torch.arange(4)[None, :])
    assert got.dtype == torch.float64
    assert got.tolist() == g["uniforms"]


def test_a_uniform_does_not_depend_on_its_batch() -> None:
    seeds = torch.tensor([rng.row_seed(0, "generate", 0, i) for i in range(37)])
    index = torch.arange(37) * 3
    whole = rng.uniforms(seeds, index)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rng.uniforms(seeds[order], index[order]), whole[order])
    for i in range(37):
        assert torch.equal(rng.uniforms(seeds[i : i + 1], index[i : i + 1]), whole[i : i + 1])


@pytest.mark.parametrize(
    "stream", ["tokens of a row", "token 0 of neighbouring seeds", "token 0 of the rows of a step"]
)
def test_uniforms_look_uniform_and_independent(stream) -> None:
    n = 20_000
    if stream == "tokens of a row":
        u = _stream(123, n)
    elif stream == "token 0 of neighbouring seeds":
        u = rng.uniforms(torch.arange(n), torch.zeros(n, dtype=torch.int64))
    else:
        seeds = torch.tensor([rng.row_seed(0, "generate", 0, i) for i in range(n)])
        u = rng.uniforms(seeds, torch.zeros(n, dtype=torch.int64))
    assert u.min() >= 0 and u.max() < 1
    assert u.mean().item() == pytest.approx(0.5, abs=4 * math.sqrt(1 / 12 / n))
    assert u.var().item() == pytest.approx(1 / 12, abs=4 * math.sqrt(1 / 180 / n))
    ordered, i = u.sort().values, torch.arange(n, dtype=torch.float64)
    kolmogorov = torch.maximum(ordered - i / n, (i + 1) / n - ordered).max().item()
    assert kolmogorov < 1.95 / math.sqrt(n)  # p = 0.001
    for lag in (1, 2, 7):
        a, b = u[:-lag] - 0.5, u[lag:] - 0.5
        assert abs((a * b).mean().item()) * 12 < 4 / math.sqrt(n)
    low_bits = (u * 2**53).long() % 16
    counts = torch.bincount(low_bits, minlength=16).double()
    assert ((counts - n / 16) ** 2 / (n / 16)).sum().item() < 37.7  # chi-square, 15 degrees, p = 0.001


def test_uniforms_take_int64_alone() -> None:
    with pytest.raises(ValueError, match="int64"):
        rng.uniforms(torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="int64"):
        rng.uniforms(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int32))


# --- sampling ---


def test_inverse_cdf_by_hand() -> None:
    probs = torch.tensor([[0.25, 0.0, 0.5, 0.25]])
    u = torch.tensor([0.0, 0.2499, 0.25, 0.5, 0.7499, 0.75, 0.9999], dtype=torch.float64)
    assert rng.sample_inverse_cdf(probs.expand(7, 4), u).tolist() == [0, 0, 2, 2, 2, 3, 3]


LARGEST = 1 - 2.0**-53


@pytest.mark.parametrize("u", [0.0, 2.0**-53, LARGEST, 1.0, -1e-12])
@pytest.mark.parametrize(
    "weights",
    [
        [0, 1, 1, 0],
        [0, 1e-30, 1, 0, 0],
        [1, 0, 0],
        [0, 0, 1],
        [0.1] * 10 + [0],
        [0, *[1 / 3] * 3, 0],
        [0, 3e-8] * 40 + [0],
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_token_of_probability_zero_is_never_drawn(weights, u, dtype) -> None:
    probs = torch.tensor([weights], dtype=dtype)
    token = rng.sample_inverse_cdf(probs, torch.tensor([u], dtype=torch.float64)).item()
    assert 0 <= token < len(weights) and probs[0, token] > 0
    positive = probs[0].nonzero().flatten()
    if u <= 0:
        assert token == positive[0]


def test_samples_follow_the_distribution_and_their_row_alone() -> None:
    n, weights = 20_000, torch.tensor([0.5, 0.05, 0.3, 0.0, 0.15])
    u = _stream(5, n)
    tokens = rng.sample_inverse_cdf(weights.expand(n, 5), u)
    counts = torch.bincount(tokens, minlength=5).double()
    expected = weights.double() * n
    assert counts[3] == 0
    real = expected > 0
    assert ((counts - expected)[real] ** 2 / expected[real]).sum().item() < 16.3  # chi-square, 3 degrees, p = 0.001

    assert torch.equal(rng.sample_inverse_cdf((8 * weights).expand(n, 5), u), tokens), "the sum need not be 1"

    generator = torch.Generator().manual_seed(1)
    probs = torch.rand(31, 257, generator=generator).softmax(-1)
    whole = rng.sample_inverse_cdf(probs, u[:31])
    for i in range(31):
        assert rng.sample_inverse_cdf(probs[i : i + 1], u[i : i + 1]).item() == whole[i]


@pytest.mark.parametrize("bad", [[0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0]])
def test_broken_probabilities_are_refused_rather_than_giving_token_0(bad) -> None:
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        rng.sample_inverse_cdf(torch.tensor([[0.5, 0.5], bad]), torch.zeros(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="expected probs"):
        rng.sample_inverse_cdf(torch.ones(2, 3), torch.zeros(3))


# --- permutations ---


def test_permutation_golden(golden) -> None:
    """The order in which stored runs saw their rows: as the seeds, it must not change between versions."""
    g = golden["random"]["permutation"]
    assert rng.permutation(g["run_seed"], g["step"], g["epoch"], g["n"]).tolist() == g["order"]


def test_permutation_is_a_permutation_that_depends_on_all_arguments() -> None:
    base = rng.permutation(0, 1, 2, 50)
    assert sorted(base.tolist()) == list(range(50)) and base.dtype == torch.int64
    assert torch.equal(base, rng.permutation(0, 1, 2, 50))
    others = [rng.permutation(1, 1, 2, 50), rng.permutation(0, 2, 2, 50), rng.permutation(0, 1, 3, 50)]
    assert all(not torch.equal(base, other) for other in others)
    assert rng.permutation(0, 1, 2, 0).tolist() == [] and rng.permutation(0, 1, 2, 1).tolist() == [0]


def test_permutation_ignores_and_leaves_the_global_generator() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = rng.permutation(0, 0, 0, 20)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert torch.equal(first, rng.permutation(0, 0, 0, 20))


def test_all_orders_of_four_rows_are_equally_frequent() -> None:
    trials = 4800
    counts: dict[tuple[int, ...], int] = {}
    for step in range(trials):
        order = tuple(rng.permutation(9, step, 0, 4).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    assert sum((c - 200) ** 2 / 200 for c in counts.values()) < 49.7  # chi-square, 23 degrees, p = 0.001
