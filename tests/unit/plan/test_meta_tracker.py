"""Bytes of tensors that are only described: what is alive, what was alive at most, and what it was for."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rlhf_ray.plan.attention import attention
from rlhf_ray.plan.meta_tracker import GRANULE, Device, MetaMemoryTracker


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def test_storages_come_and_go() -> None:
    with MetaMemoryTracker("cpu") as tracker, tracker.watch() as peak:
        a = meta(16, 16)  # 1024 bytes
        b = a + 1  # 2048
        view = b.t()[2:]  # no storage of its own
        del b  # still held by the view
        c = a * view.sum()  # a sum of 4 bytes (64 with its granule), and 3072
        assert tracker.live["activations"] == 3 * 1024
        del c, view, a
    assert not any(tracker.live.values())
    assert peak.total == 3 * 1024 + GRANULE["cpu"]


def test_sizes_are_rounded_as_the_allocator_does() -> None:
    for device, granule in GRANULE.items():
        with MetaMemoryTracker(device) as tracker:  # type: ignore[arg-type]
            kept = meta(1)
            assert sum(tracker.live.values()) == granule and kept is not None


def test_an_inner_peak_counts_for_the_outer_one() -> None:
    with MetaMemoryTracker("cpu") as tracker, tracker.watch() as outer:
        with tracker.watch() as inner:
            meta(1024)
        assert inner.total == 4096
    assert outer.total == 4096


def test_parts() -> None:
    with MetaMemoryTracker("cpu", vocabulary=[50]) as tracker:
        weights, logits = meta(32, 32), meta(4, 64, 50)
        cache = weights.new_zeros(2, 3, 4, 8)
        assert tracker.own("bases", [weights, None]) == 4096
        assert tracker.live == {
            "bases": 4096,
            "logits": 4 * 64 * 50 * 4,
            "kv cache": 2 * 3 * 4 * 8 * 4,
            "activations": 0,
        }
        del logits, cache


def test_logsumexp_needs_a_buffer_as_large_as_its_input() -> None:
    with MetaMemoryTracker("cpu", vocabulary=[1000]) as tracker:
        logits = meta(8, 1000)
        with tracker.watch() as peak:
            logits.logsumexp(-1)
    assert peak.bytes["logits"] == 2 * 8 * 1000 * 4


def two_layers(recompute: bool) -> int:
    """Peak of forward and backward of 8 layers x -> sigmoid(W x), W [64, 64], x [1024, 64]: 256 KiB an activation."""
    layers = [nn.Linear(64, 64, bias=False, device="meta") for _ in range(8)]
    with MetaMemoryTracker("cpu") as tracker:
        x = meta(1024, 64).requires_grad_(True)
        with tracker.watch() as peak:
            h = x
            for layer in layers:
                step = nn.Sequential(layer, nn.Sigmoid())
                h = checkpoint(step, h, use_reentrant=False) if recompute else step(h)
            h.sum().backward()
    return peak.total


def test_recomputing_activations_saves_what_it_should() -> None:
    unit = 1024 * 64 * 4
    kept, recomputed = two_layers(False), two_layers(True)
    # Kept: x and 8 outputs; the linear layers' own outputs are not needed by sigmoid. Recomputed: the layers' inputs alone.
    assert 9 * unit <= kept < 13 * unit
    assert kept - recomputed < 2 * unit  # sigmoid keeps just what the next layer needs: nothing to gain here


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_attention_never_makes_scores(device: Device) -> None:
    """[2, 4, 512, 512] scores in float32 would be 8 MiB; the mask [2, 1, 512, 512] as numbers is 2, its negation half of one."""
    mib = 2**20
    q, k, v = (meta(2, 4, 512, 16).requires_grad_(True) for _ in range(3))
    mask = meta(2, 1, 512, 512, dtype=torch.bool)
    with MetaMemoryTracker(device) as tracker, tracker.watch() as peak:
        out = attention(device, q, k, v, mask)
        assert out.shape == (2, 4, 512, 16)
        assert 2 * mib + mib // 4 < tracker.live["activations"] < 2.5 * mib  # kept: mask, output, a number for each row
        out.sum().backward()
    assert peak.total < 4.5 * mib


def test_values_that_nobody_has() -> None:
    with MetaMemoryTracker("cpu"):
        rows = meta(5, dtype=torch.bool)
        assert bool(rows.all()) and not bool(rows.any())  # every row is in order
        assert not bool(meta(5, 5, dtype=torch.bool).all())  # a batch has padding
        assert rows.nonzero().flatten().tolist() == []
        assert meta(3).tolist() == [0.0, 0.0, 0.0]
        assert meta(6, 7)[meta(6, dtype=torch.bool)].shape == (6, 7)
        assert meta(6, 7, 2)[meta(6, 7, dtype=torch.bool)].shape == (42, 2)


def test_a_remembered_result_is_that_of_torch() -> None:
    for _ in range(2):
        with MetaMemoryTracker("cpu"):
            a, b = meta(4, 1, 3).transpose(0, 2), meta(5, 1, dtype=torch.float16)
            out = a + b
            assert (out.shape, out.dtype) == ((3, 5, 4), torch.float32)
            assert torch.empty_like(a).stride() == a.stride()
            assert (meta(3) * 2).dtype is torch.float32 and (meta(3, dtype=torch.int64) * 2.0).dtype is torch.float32
            assert (meta(3, dtype=torch.int64) * 2).dtype is torch.int64
            for default in (torch.bfloat16, torch.float32):
                torch.set_default_dtype(default)
                assert torch.empty(3, device="meta").dtype is default


def test_rows_that_are_split_by_counts_go_to_all_parts_alike() -> None:
    """JetMoE reads how many rows each expert has, which nobody knows here, and splits by that: `plan` ended in torch's error."""
    with MetaMemoryTracker("cpu"):
        rows = meta(10, 3)
        counts = torch.zeros(4, dtype=torch.int64, device="meta").tolist()
        assert [tuple(part.shape) for part in rows.split(counts, dim=0)] == [(3, 3), (3, 3), (2, 3), (2, 3)]
        assert [tuple(part.shape) for part in rows.split([4, 6], dim=0)] == [(4, 3), (6, 3)]
