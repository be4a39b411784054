"""Equal requests give equal bits; another batch shape gives the same tokens except at near-ties (design: randomness is derived)."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf_ray.maths.rng import uniforms
from rlhf_ray.sampler.engine import DecodeRequest, Sampler

PAD = 0
NEAR = 1e-4

IN_ANOTHER_PROCESS = """
import dataclasses, json, sys, torch
sys.path.insert(0, sys.argv[1])
from conftest import build_llama, build_requests
from rlhf_ray.sampler.engine import Sampler
torch.set_num_threads(1)
results = Sampler(build_llama(), 0, max_rows=8).run(build_requests(20, stop_ids=(5,)))
print(json.dumps([dataclasses.astuple(r) for r in results]))
"""


def test_the_same_chunk_gives_the_same_bits_after_other_work_and_in_another_process(llama, make_requests):
    requests = make_requests(20, stop_ids=(5,))
    sampler = Sampler(llama, PAD, max_rows=8)
    first = sampler.run(requests)
    sampler.run(make_requests(30, seed=9))
    for request in make_requests(5, seed=2):
        sampler.submit(request)
    while sampler.busy:
        sampler.step()
    assert sampler.run(requests) == first
    assert Sampler(llama, PAD, max_rows=8).run(requests) == first

    here = str(Path(__file__).parent)
    other = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS, here], capture_output=True, text=True, timeout=120, check=True
    )
    assert json.loads(other.stdout) == json.loads(json.dumps([dataclasses.astuple(r) for r in first]))


def test_the_content_of_other_rows_changes_no_bit_of_a_row(llama, make_requests):
    requests = make_requests(12)
    mine = 4
    others = make_requests(12, seed=77)
    changed = [
        dataclasses.replace(
            q, prompt_ids=(o.prompt_ids * 24)[: len(q.prompt_ids)], row_seed=o.row_seed, temperature=2.0
        )
        for q, o in zip(requests, others)
    ]
    changed[mine] = requests[mine]
    before, after = (Sampler(llama, PAD, max_rows=5).run(chunk) for chunk in (requests, changed))
    assert after[mine] == before[mine]
    assert all(
        a.token_ids != b.token_ids for i, (a, b) in enumerate(zip(after, before)) if i != mine and len(a.token_ids) > 3
    )


def margin(every: torch.Tensor, token: int, u: float) -> float:
    """How far u is from the edges of the interval of the cumulative distribution that `token` owns."""
    cumulative = every.double().exp().cumsum(0)
    below = cumulative[token - 1].item() if token else 0.0
    return min(abs(u - below), abs(u - cumulative[token].item()))


def near_ties(model, requests, one, other, plain_logprobs) -> list[tuple[int, int, float]]:
    """(row, token index, margin) of every first difference; log-probabilities are compared up to there."""
    found = []
    for row, (request, a, b) in enumerate(zip(requests, one, other)):
        same = next((t for t, (x, y) in enumerate(zip(a.token_ids, b.token_ids)) if x != y), len(a.token_ids))
        assert len(a.token_ids) == len(b.token_ids) or same < min(len(a.token_ids), len(b.token_ids))
        torch.testing.assert_close(torch.tensor(a.logprobs[:same]), torch.tensor(b.logprobs[:same]), atol=1e-4, rtol=0)
        if same < len(a.token_ids):
            u = uniforms(torch.tensor([request.row_seed]), torch.tensor([same])).item()
            found.append((row, same, margin(plain_logprobs(model, request, a)[same], a.token_ids[same], u)))
    return found


@pytest.mark.parametrize("max_rows", [2, 5, 17])
def test_another_batch_shape_changes_tokens_only_at_near_ties(llama, make_requests, plain_logprobs, max_rows):
    requests = make_requests(40, seed=5)
    whole = Sampler(llama, PAD, max_rows=40).run(requests)
    other = Sampler(llama, PAD, max_rows=max_rows).run(requests)
    ties = near_ties(llama, requests, whole, other, plain_logprobs)
    print(f"max_rows {max_rows}: {len(ties)} near-ties in {sum(len(r.token_ids) for r in whole)} tokens: {ties}")
    assert all(distance < NEAR for *_, distance in ties)
    assert len(ties) <= 2


def test_every_token_is_the_inverse_cdf_of_its_own_uniform(llama, make_requests, plain_logprobs):
    requests = make_requests(16, temperature=0.9)
    for request, result in zip(requests, Sampler(llama, PAD, max_rows=6).run(requests)):
        every = plain_logprobs(llama, request, result)
        seeds = torch.full((len(every),), request.row_seed)
        for t, u in enumerate(uniforms(seeds, torch.arange(len(every))).tolist()):
            expected = int((every[t].double().exp().cumsum(0) <= u).sum())
            assert result.token_ids[t] == expected or margin(every[t], result.token_ids[t], u) < NEAR


@pytest.mark.data
def test_real_model_chunks_repeat_and_agree_across_batch_shapes(data_dir, plain_logprobs):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = data_dir / "models" / "stories260K"
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["Once upon a time", "Tom and Lily went to the park. They", "One day, a big dog", "The sun was"]
    requests = [
        DecodeRequest(tuple(tokenizer(texts[i % 4]).input_ids), row_seed=i, max_new_tokens=20 + i, stop_ids=(1,))
        for i in range(24)
    ]
    sampler = Sampler(model, tokenizer.pad_token_id)
    whole = sampler.run(requests)
    assert sampler.run(requests) == whole
    ties = near_ties(model, requests, whole, Sampler(model, 0, max_rows=5).run(requests), plain_logprobs)
    assert all(distance < NEAR for *_, distance in ties) and len(ties) <= 2
