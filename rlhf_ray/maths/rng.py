"""Counter-based randomness: every random number is a function of what it is for, not of what was drawn before it.

Token t of a row uses one uniform, a hash of (row seed, t); the row seed is a hash of (run seed, role, step, row). So the numbers do
not depend on the batch a row shares, on the rank or actor that runs it, or on a restart. Integers only, so the bits are the same on
every platform, device and library version.
"""

from __future__ import annotations

import hashlib
import json
import operator

import torch
from torch import Tensor


def derived_seed(run_seed: int, *purpose: int | str) -> int:
    """A 63-bit seed: the first 8 bytes of BLAKE2b over the JSON list [run_seed, *purpose], top bit cleared.

    Different lists give unrelated seeds. Not negative, so that any generator takes it.
    """
    parts = [operator.index(run_seed), *(p if isinstance(p, str) else operator.index(p) for p in purpose)]
    digest = hashlib.blake2b(json.dumps(parts).encode("ascii"), digest_size=8).digest()
    return int.from_bytes(digest, "big") & (2**63 - 1)


def row_seed(run_seed: int, role: str, step: int, row_index: int) -> int:
    """The seed of one row: row `row_index` of the global batch of `step`. Every one of several samples of a prompt is a row."""
    return derived_seed(run_seed, "row", role, step, row_index)


def uniforms(row_seeds: Tensor, token_index: Tensor) -> Tensor:
    """u_i = top 53 bits of mix(mix(seed_i + G) + (t_i + 1) G) / 2^53, a uniform in [0, 1) for token t_i of row i

    mix is the finaliser of SplitMix64 and G its increment (Steele, Lea, Flood 2014; constants by D. Stafford).

    row_seeds: i64[B].   token_index: i64[B], or any shapes that broadcast.   Returns f64, at most 1 - 2^-53.
    Entry i depends on row_seeds[i] and token_index[i] alone.
    """
    return _shift_right(_hash(row_seeds, token_index), 11).double() * 2.0**-53


def sample_inverse_cdf(probs: Tensor, u: Tensor) -> Tensor:
    """y_i = the first v with F_i(v) > u_i F_i(V),   F the cumulative sum in float64

    Never returns a token of probability 0, whatever u in [0, 1] and however far the sum is from 1.

    probs: f[B, V], not negative, any positive sum.   u: f64[B].   Returns i64[B].
    Raises ValueError naming the rows whose sum is 0 or not finite: broken weights would else emit token 0 without a word.

    >>> sample_inverse_cdf(torch.tensor([[0.0, 0.5, 0.5]]).expand(3, 3), torch.tensor([0.0, 0.5, 1.0])).tolist()
    [1, 2, 2]
    """
    if probs.ndim != 2 or u.shape != probs.shape[:1]:
        raise ValueError(
            f"sample_inverse_cdf: expected probs [B, V] and u [B], got {tuple(probs.shape)} and {tuple(u.shape)}"
        )
    cumulative = probs.double().cumsum(dim=1)
    total = cumulative[:, -1]
    good = torch.isfinite(total) & (total > 0)
    if not bool(good.all()):
        rows = (~good).nonzero().flatten().tolist()
        raise ValueError(f"probabilities: expected a finite sum above 0; not so in rows {rows[:8]}")
    # u * total may round up to total, behind which no entry lies; the next number below it still has one.
    threshold = torch.minimum(u.double().clamp_min(0) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, threshold[:, None].contiguous(), right=True).squeeze(1)


def permutation(run_seed: int, step: int, epoch: int, n: int) -> Tensor:
    """The order of the n rows of a step in one epoch: the rows sorted by a hash of (run seed, step, epoch, row).

    Returns i64[n] on the CPU; equal on every rank, platform and library version.
    """
    seed = torch.tensor([derived_seed(run_seed, "permutation", step, epoch)])
    return torch.argsort(_hash(seed, torch.arange(n)), stable=True)


# SplitMix64 in int64: torch has no unsigned 64-bit arithmetic, but its products and sums wrap modulo 2^64 all the same.


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


_INCREMENT = _signed(0x9E3779B97F4A7C15)
_MULTIPLY_1 = _signed(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = _signed(0x94D049BB133111EB)


def _low_bits(count: int) -> int:
    return (1 << count) - 1


def _shift_right(x: Tensor, count: int) -> Tensor:
    return x >> count & _low_bits(64 - count)  # >> copies the sign bit; the mask takes the copies away


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MULTIPLY_1
    x = (x ^ _shift_right(x, 27)) * _MULTIPLY_2
    return x ^ _shift_right(x, 31)


def _hash(seeds: Tensor, counter: Tensor) -> Tensor:
    if seeds.dtype != torch.int64 or counter.dtype != torch.int64:
        raise ValueError(f"random numbers: expected int64 seeds and counters, got {seeds.dtype} and {counter.dtype}")
    return _mix(_mix(seeds + _INCREMENT) + (counter + 1) * _INCREMENT)
