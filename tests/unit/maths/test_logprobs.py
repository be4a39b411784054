"""Token log-probabilities and entropies, whole and in chunks (failure F17: logits of all positions kept alive)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from rlhf_ray.maths.logprobs import chunk_calls, chunked_token_logprobs, entropy, token_logprobs


def test_golden_row(golden) -> None:
    g = golden["vocabulary"]
    logits = torch.tensor(g["logits_p"], dtype=torch.float64).expand(1, 6, 6)
    tokens = torch.arange(6)[None, :]
    assert token_logprobs(logits, tokens, g["temperature"]).flatten().tolist() == pytest.approx(
        g["logprobs_p"], abs=1e-14
    )
    assert entropy(logits, g["temperature"]).flatten().tolist() == pytest.approx([g["entropy_p"]] * 6, abs=1e-14)


def test_temperature_changes_the_policy() -> None:
    logits, tokens = torch.tensor([[[2.0, 0.0]]]), torch.tensor([[0]])
    assert token_logprobs(logits, tokens, 1.0).item() == pytest.approx(-math.log1p(math.exp(-2)), abs=1e-6)
    assert token_logprobs(logits, tokens, 2.0).item() == pytest.approx(-math.log1p(math.exp(-1)), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_normalised_in_float32(dtype) -> None:
    logits = (4 * torch.randn(2, 3, 500, generator=torch.Generator().manual_seed(0))).to(dtype)
    tokens = torch.randint(500, (2, 3), generator=torch.Generator().manual_seed(1))
    got, exact = token_logprobs(logits, tokens, 0.7), token_logprobs(logits.double(), tokens, 0.7)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=1e-5)  # bf16 arithmetic is off by 1e-2
    torch.testing.assert_close(entropy(logits, 0.7).double(), entropy(logits.double(), 0.7), rtol=0, atol=1e-5)


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[[1e4, -1e4, 0.0]]])
    assert token_logprobs(logits, torch.tensor([[0]]), 1.0).item() == 0
    assert token_logprobs(logits, torch.tensor([[1]]), 1.0).item() == -2e4
    assert entropy(logits, 1.0).item() == 0


def test_excluded_tokens_add_nothing_to_the_entropy_or_its_gradient() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf]], dtype=torch.float64, requires_grad=True)
    h = entropy(logits, 1.0)
    h.sum().backward()
    assert h.item() == pytest.approx(math.log(2))
    assert logits.grad.tolist() == [[0, 0, 0]]


def test_entropy_gradient_matches_finite_differences() -> None:
    logits = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: entropy(z, 0.8), (logits,))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_bad_temperature_is_refused(temperature) -> None:
    with pytest.raises(ValueError, match="temperature: expected a finite number above 0"):
        token_logprobs(torch.zeros(1, 1, 3), torch.zeros(1, 1, dtype=torch.long), temperature)


def test_unshifted_logits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tokens: expected shape \(1, 4\)"):
        token_logprobs(torch.zeros(1, 4, 3), torch.zeros(1, 3, dtype=torch.long), 1.0)


# --- in chunks ---


class Head(nn.Module):
    """A linear head that notes how many positions it was given at a time."""

    def __init__(self, width: int, vocabulary: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.linear = nn.Linear(width, vocabulary, bias=False, dtype=dtype)
        nn.init.normal_(self.linear.weight, generator=torch.Generator().manual_seed(5))
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(x.shape[0])
        return self.linear(x)


def _inputs(b: int = 3, r: int = 5, d: int = 4, v: int = 11) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(b, r, d, generator=generator, dtype=torch.float64)
    return hidden.requires_grad_(), torch.randint(v, (b, r), generator=generator)


@pytest.mark.parametrize("chunk_size", [1, 2, 4, 7, 15, 100])
def test_chunks_equal_the_whole_to_the_bit(chunk_size) -> None:
    logits = torch.randn(
        3, 5, 11, generator=torch.Generator().manual_seed(3)
    )  # the identity as head: no matmul to differ in
    tokens = torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(4))
    got, h = chunked_token_logprobs(logits, lambda x: x, tokens, 0.9, chunk_size, with_entropy=True)
    assert torch.equal(got, token_logprobs(logits, tokens, 0.9))
    assert torch.equal(h, entropy(logits, 0.9))


@pytest.mark.parametrize("chunk_size", [1, 4, 15])
def test_chunks_give_the_gradient_of_the_whole(chunk_size) -> None:
    hidden, tokens = _inputs()
    weight = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grads = []
    for whole in (True, False):
        head = Head(4, 11)
        if whole:
            logprobs = token_logprobs(head(hidden), tokens, 0.9)
        else:
            logprobs, none = chunked_token_logprobs(hidden, head, tokens, 0.9, chunk_size, with_entropy=False)
            assert none is None
        (logprobs * weight).sum().backward()
        grads.append((hidden.grad.clone(), head.linear.weight.grad))
        hidden.grad = None
    for whole_grad, chunk_grad in zip(*grads):
        torch.testing.assert_close(chunk_grad, whole_grad, rtol=1e-12, atol=1e-14)


def test_bits_do_not_depend_on_whether_a_gradient_is_wanted() -> None:
    """Old log-probabilities come from a no-grad pass, new ones from a grad pass: ratio = 1 needs equal bits."""
    hidden, tokens = _inputs()
    hidden, head = hidden.detach().float().requires_grad_(), Head(4, 11, torch.float32)
    with torch.no_grad():
        old, _ = chunked_token_logprobs(hidden, head, tokens, 0.9, 4, with_entropy=True)
    new, _ = chunked_token_logprobs(hidden, head, tokens, 0.9, 4, with_entropy=False)
    assert torch.equal(old, new.detach()) and new.requires_grad


def test_the_gradient_of_the_entropy_is_that_of_the_whole() -> None:
    """For the entropy bonus; dH/dz_v = -p_v (log p_v + H), in chunks or not."""
    hidden, tokens = _inputs()
    head = Head(4, 11)
    _, h = chunked_token_logprobs(hidden, head, tokens, 0.7, 4, with_entropy=True)
    (found,) = torch.autograd.grad(h.sum(), hidden)
    logits = head(hidden)
    (expected,) = torch.autograd.grad(entropy(logits, 0.7).sum(), hidden, retain_graph=True)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    logp = (logits / 0.7).log_softmax(-1)
    by_hand = -logp.exp() * (logp - (logp.exp() * logp).sum(-1, keepdim=True)) / 0.7
    (same,) = torch.autograd.grad(logits, hidden, by_hand.detach())
    torch.testing.assert_close(found, same, rtol=1e-10, atol=1e-12)


def test_f17_logits_of_all_positions_never_live_at_once() -> None:
    hidden, tokens = _inputs(b=8, r=16, v=1000)
    head, kept = Head(4, 1000), []

    def pack(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        logprobs, _ = chunked_token_logprobs(hidden, head, tokens, 0.9, 32, with_entropy=True)
    assert max(head.sizes) == 32 and len(head.sizes) == 4
    assert sum(kept) < 1000, "the forward kept something as large as the logits of a position for the backward"
    logprobs.sum().backward()
    assert len(head.sizes) == 8 and max(head.sizes) == 32  # one more pass, chunk by chunk


def test_min_calls_keeps_zero3_ranks_in_step() -> None:
    hidden, tokens = _inputs()
    head, plain = Head(4, 11), Head(4, 11)
    expected, _ = chunked_token_logprobs(hidden, plain, tokens, 1.0, 8, with_entropy=False)
    expected.sum().backward()
    expected_grad, hidden.grad = hidden.grad, None
    assert len(plain.sizes) == 2 * chunk_calls(15, 8) == 4

    got, h = chunked_token_logprobs(hidden, head, tokens, 1.0, 8, with_entropy=True, min_calls=5)
    assert len(head.sizes) == 5
    got.sum().backward()
    assert len(head.sizes) == 10, "surplus calls must happen in the backward too, where ZeRO-3 gathers again"
    assert torch.equal(got, expected) and h.shape == tokens.shape
    assert torch.equal(hidden.grad, expected_grad) and torch.equal(head.linear.weight.grad, plain.linear.weight.grad)


def test_a_single_chunk_is_not_computed_twice() -> None:
    """Its logits are the first thing that the backward needs. The same bits as when they are recomputed."""
    hidden, tokens = _inputs()
    head, twice = Head(4, 11), Head(4, 11)
    got, _ = chunked_token_logprobs(hidden, head, tokens, 0.7, 15, with_entropy=False)
    got.sum().backward()
    grad, hidden.grad = hidden.grad, None
    assert head.sizes == [15]
    expected, _ = chunked_token_logprobs(hidden, twice, tokens, 0.7, 15, with_entropy=False, min_calls=2)
    expected.sum().backward()
    assert len(twice.sizes) == 4
    assert torch.equal(got, expected) and torch.equal(grad, hidden.grad)


def test_no_positions_still_make_one_call() -> None:
    """A rank whose microbatch holds filler rows alone has width 0."""
    head = Head(4, 11)
    hidden = torch.zeros(2, 0, 4, dtype=torch.float64, requires_grad=True)
    got, h = chunked_token_logprobs(hidden, head, torch.zeros(2, 0, dtype=torch.long), 1.0, 8, with_entropy=True)
    got.sum().backward()
    assert got.shape == h.shape == (2, 0) and head.sizes[0] == 0
    assert head.linear.weight.grad.abs().sum() == 0
    assert [chunk_calls(n, 8) for n in (0, 1, 8, 9, 16)] == [1, 1, 1, 2, 2]


def test_bad_chunk_arguments_are_refused() -> None:
    hidden, tokens = _inputs()
    with pytest.raises(ValueError, match="chunk_size: expected at least 1"):
        chunked_token_logprobs(hidden, Head(4, 11), tokens, 1.0, 0, with_entropy=False)
    with pytest.raises(ValueError, match=r"tokens: expected shape \(3, 5\)"):
        chunked_token_logprobs(hidden, Head(4, 11), tokens[:, 1:], 1.0, 4, with_entropy=False)


def test_f17_what_is_kept_for_the_backward_does_not_grow_with_the_vocabulary() -> None:
    """The ancestor kept the logits of every position alive, and its entropy with a gradient. Counted: bytes saved by autograd."""

    def kept(vocabulary: int, chunk_size: int | None) -> int:
        hidden, tokens = _inputs(b=4, r=16, d=8, v=vocabulary)
        head, seen = Head(8, vocabulary), {}

        def note(x: Tensor) -> Tensor:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            if chunk_size is None:
                alive = token_logprobs(head(hidden), tokens, 0.9)
            else:
                alive, _ = chunked_token_logprobs(hidden, head, tokens, 0.9, chunk_size, with_entropy=True)
        assert alive.requires_grad
        seen.pop(head.linear.weight.untyped_storage().data_ptr(), None)
        return sum(seen.values())

    logits = 4 * 16 * 2000 * 8
    assert kept(2000, None) >= logits
    assert kept(2000, 8) == kept(20, 8) < logits / 50
