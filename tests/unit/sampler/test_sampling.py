"""Truncation against transformers' own logits warpers; frequencies against the definition."""

from __future__ import annotations

import pytest
import torch
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from rlhf_ray.sampler.sampling import SamplingPlan, Truncation, sample_tokens, truncate

ROWS, VOCABULARY = 64, 50


@pytest.fixture
def logits():
    return torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 3


def reference(logits, temperature, top_k, top_p):
    """Probabilities after transformers' warpers, in the order in which generate applies them."""
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return scores.softmax(-1)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 5, 50, 1000])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9, 0.999, 1.0])
def test_truncation_equals_the_warpers(logits, temperature, top_k, top_p):
    logprobs = torch.log_softmax(logits / temperature, -1)
    ours = truncate(logprobs, torch.full((ROWS,), top_k), torch.full((ROWS,), top_p)).softmax(-1)
    torch.testing.assert_close(ours, reference(logits, temperature, top_k, top_p), atol=1e-6, rtol=0)


def test_top_k_keeps_ties_like_the_warper():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    kept = truncate(logits.log_softmax(-1), torch.tensor([2]), torch.tensor([1.0])).isfinite()
    assert kept.tolist() == [[False, True, True, True, True, False]]
    assert torch.equal(kept, TopKLogitsWarper(2)(None, logits).isfinite())


def test_top_p_by_hand():
    """0.5 alone reaches 0.5; 0.5 + 0.25 does not reach 0.8, so 0.15 stays as well; 1.0 keeps all."""
    logprobs = torch.tensor([0.1, 0.5, 0.15, 0.25]).log().expand(3, 4)
    kept = truncate(logprobs, torch.zeros(3, dtype=torch.int64), torch.tensor([0.5, 0.8, 1.0])).isfinite()
    assert kept.tolist() == [[False, True, False, False], [False, True, True, True], [True, True, True, True]]


@pytest.mark.parametrize("top_p", [5e-324, 1e-50, 1e-45])
def test_a_top_p_that_is_zero_in_float32_keeps_the_likeliest(logits, top_p):
    kept = truncate(logits.log_softmax(-1), torch.zeros(ROWS, dtype=torch.int64), torch.full((ROWS,), top_p)).isfinite()
    assert torch.equal(kept, torch.nn.functional.one_hot(logits.argmax(-1), VOCABULARY).bool())


def plan(count, temperature=1.0, truncation=None, **fields):
    return SamplingPlan(
        seeds=torch.randint(2**62, (count,), generator=torch.Generator().manual_seed(3)),
        temperature=torch.full((count,), temperature),
        truncation=truncation,
        **fields,
    )


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.0, 6, 1.0), (1.3, 20, 0.7)]
)
def test_frequencies_follow_the_definition(logits, temperature, top_k, top_p):
    """Pearson's chi-square of 40,000 draws from one row: a fair sampler fails once in 10,000 choices of seeds."""
    draws = 40_000
    one = logits[:1]
    expected = reference(one, temperature, top_k, top_p)[0].double() * draws
    rows = torch.arange(draws)
    cut = Truncation(rows, torch.full((draws,), top_k), torch.full((draws,), top_p)) if top_k or top_p < 1 else None
    tokens, logprobs = sample_tokens(one.expand(draws, -1), plan(draws, temperature, cut), torch.zeros_like(rows))
    counts = torch.bincount(tokens, minlength=VOCABULARY).double()
    assert counts[expected == 0].sum() == 0
    seen = expected > 5
    chi2 = ((counts[seen] - expected[seen]) ** 2 / expected[seen]).sum().item()
    freedom = torch.tensor(int(seen.sum()) - 1.0)
    assert torch.special.gammaincc(freedom / 2, torch.tensor(chi2 / 2)) > 1e-4
    torch.testing.assert_close(logprobs, (one[0] / temperature).log_softmax(-1)[tokens])


def test_only_the_rows_with_a_truncation_are_cut(logits):
    rows = torch.tensor([3, 10])
    cut = Truncation(rows, torch.tensor([1, 1]), torch.tensor([1.0, 1.0]))
    index = torch.zeros(ROWS, dtype=torch.int64)
    free, _ = sample_tokens(logits, plan(ROWS), index)
    some, _ = sample_tokens(logits, plan(ROWS, truncation=cut), index)
    assert some[rows].tolist() == logits[rows].argmax(-1).tolist()
    others = torch.ones(ROWS, dtype=torch.bool)
    others[rows] = False
    assert torch.equal(some[others], free[others])


def test_greedy_rows_take_the_likeliest_token_beside_sampled_ones(logits):
    greedy = torch.arange(ROWS) % 2 == 0
    index = torch.zeros(ROWS, dtype=torch.int64)
    tokens, logprobs = sample_tokens(logits, plan(ROWS, 2.0, greedy=greedy), index)
    sampled, _ = sample_tokens(logits, plan(ROWS, 2.0), index)
    assert torch.equal(tokens, torch.where(greedy, logits.argmax(-1), sampled))
    torch.testing.assert_close(logprobs, (logits / 2).log_softmax(-1).gather(1, tokens[:, None])[:, 0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_row_is_marked_and_touches_no_other(logits, value):
    index = torch.zeros(ROWS, dtype=torch.int64)
    before = sample_tokens(logits, plan(ROWS), index)
    broken = logits.clone()
    broken[5, 7] = value
    tokens, logprobs = sample_tokens(broken, plan(ROWS), index)
    others = torch.arange(ROWS) != 5
    assert not logprobs[5].isfinite() and 0 <= tokens[5] < VOCABULARY
    assert torch.equal(tokens[others], before[0][others]) and torch.equal(logprobs[others], before[1][others])


def test_logits_in_bfloat16_are_handled_in_float32(logits):
    low = logits.bfloat16()
    tokens, logprobs = sample_tokens(low, plan(ROWS), torch.zeros(ROWS, dtype=torch.int64))
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, low.float().log_softmax(-1).gather(1, tokens[:, None])[:, 0])
