"""The arithmetic of `plan`: ZeRO's shares, allowances, who shares a GPU, which card holds it. All figures by hand."""

from __future__ import annotations

import pytest

from rlhf_ray.plan.engine import bytes_per_token
from rlhf_ray.plan.memory import (
    CARDS,
    CPU_BESIDES,
    CUDA_CONTEXT,
    GIB,
    Phases,
    Process,
    Zero,
    gpus,
    most_on_one,
    smallest_card,
    with_overhead,
)

N, BASE = 1000, 100_000
PHASES: Phases = {
    "load": {"bases": 2 * BASE, "adapters": 4 * N},
    "sampling": {"bases": 2 * BASE, "adapters": 4 * N, "optimizer": 8 * N, "kv cache": 77},
    "update": {"bases": 2 * BASE, "adapters": 4 * N, "optimizer": 8 * N, "gradients": 4 * N, "activations": 99},
}


def zero(stage: int, workers: int, **given: int) -> Phases:
    return Zero.of(stage, workers, N, BASE, given).applied(PHASES, "cuda")


def test_stage_0_copies_gradients_only_to_send_them() -> None:
    assert zero(0, 1) == PHASES
    assert zero(0, 2)["update"]["gradients"] == 8 * N
    assert zero(0, 2)["sampling"] == PHASES["sampling"]


@pytest.mark.parametrize(
    ("stage", "workers", "optimizer", "gradients"),
    # moments 8 n / W and master copy 4 n / W; gradients whole or a share, the step's flat share 4 n / W, bucket of 50 elements
    [(1, 1, 12 * N, 8 * N + 200), (1, 4, 3 * N, 5 * N + 200), (2, 1, 12 * N, 8 * N + 200), (2, 4, 3 * N, 2 * N + 200)],
)
def test_stages_1_and_2_divide_what_is_trained(stage: int, workers: int, optimizer: int, gradients: int) -> None:
    found = zero(stage, workers, reduce_bucket_size=50)
    assert (found["update"]["optimizer"], found["update"]["gradients"]) == (optimizer, gradients)
    assert found["sampling"]["optimizer"] == optimizer and "gradients" not in found["sampling"]
    assert found["update"]["bases"] == 2 * BASE and found["update"]["activations"] == 99


def test_stage_3_divides_the_base_and_gathers_a_part() -> None:
    found = zero(3, 4, reduce_bucket_size=50, stage3_max_live_parameters=9_000, stage3_prefetch_bucket_size=1_000)
    assert found["load"]["bases"] == 2 * BASE  # each worker loads it whole
    assert found["sampling"]["bases"] == 2 * BASE // 4 + 2 * 10_000
    assert found["sampling"]["gradients"] == 200  # its bucket is never given back
    assert found["update"]["adapters"] == N
    assert zero(3, 4)["sampling"]["bases"] == 2 * BASE // 4 + 2 * BASE  # small bases are gathered whole


def test_the_learner_asks_for_buckets_of_what_it_trains() -> None:
    """DeepSpeed's own are two gigabytes on a GPU, whatever is trained."""
    assert Zero.of(2, 1, N, BASE, {}).buckets("cuda") == 4 * N
    assert Zero.of(2, 1, 10**10, BASE, {}).buckets("cuda") == 2_000_000_000
    default = Zero(2, 1, N, BASE)
    assert default.buckets("cuda") == 2_000_000_000 and default.buckets("cpu") == 4 * N
    assert Zero.of(1, 1, N, BASE, {"reduce_bucket_size": "5e3", "overlap_comm": True}).buckets("cuda") == 40_000


def test_overhead() -> None:
    cpu, cuda = with_overhead(PHASES, "cpu"), with_overhead({"update": {"activations": 100, "logits": 100}}, "cuda")
    assert {p["other"] for p in cpu.values()} == {CPU_BESIDES}
    assert cuda["update"]["other"] == CUDA_CONTEXT + 10


def process(role: str, count: int, share: float, gib: float) -> Process:
    return Process(role, count, share, {"load": {"bases": GIB}, "update": {"bases": int(gib * GIB)}})


def test_fractions_share_a_gpu() -> None:
    roles = [process("learner", 1, 1.0, 30), process("generator", 2, 0.5, 20), process("scorer", 1, 0.25, 5)]
    found = gpus(roles)
    assert [g.on_it for g in found] == [(("generator", 2),), (("learner", 1),), (("scorer", 1),)]
    assert [g.total / GIB for g in found] == [40, 30, 5]
    assert most_on_one(roles) == 40 * GIB
    assert most_on_one([process("learner", 2, 0.0, 3), process("x", 1, 0.0, 2)]) == 3 * GIB


def test_a_process_peaks_where_it_needs_most() -> None:
    one = process("learner", 1, 1.0, 2)
    assert (one.phase, one.total, one.parts["bases"], one.parts["logits"]) == ("update", 2 * GIB, 2 * GIB, 0)


def test_cards() -> None:
    assert [smallest_card(int(g * GIB)) for g in (1, 14.6, 14.7, 23, 79, 139, 140)] == [16, 16, 24, 40, 80, 141, None]
    assert all(room < gb for gb, room in CARDS.items())


def test_keys_and_values_of_layers_of_different_width() -> None:
    """Gemma 4: two sliding layers of 2 heads of 8, two full ones of 1 head of 24. Keys and values, in bfloat16."""
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 8, "attention_k_eq_v": True}
    kinds = ["sliding_attention", "full_attention"] * 2
    config = transformers.Gemma4TextConfig(layer_types=kinds, global_head_dim=24, num_global_key_value_heads=1, **sizes)
    assert bytes_per_token(config, 2) == 2 * 2 * (2 * (2 * 8) + 2 * (1 * 24))
