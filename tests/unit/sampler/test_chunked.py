"""Long prompts are read in pieces between the tokens of others; the cache is kept to a number of tokens, and gives memory back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from rlhf_ray.sampler import engine
from rlhf_ray.sampler.engine import Sampler
from rlhf_ray.sampler.requests import DecodeEvent, DecodeRequest
from rlhf_ray.sampler.rows import DecodeRow

PAD = 0


def request(seed: int, prompt: int, new: int = 8) -> DecodeRequest:
    ids = torch.randint(3, 90, (prompt,), generator=torch.Generator().manual_seed(seed)).tolist()
    return DecodeRequest(tuple(ids), seed, new, ())


def test_chunks_of_prompts_give_the_replies_of_whole_ones(make_llama: Callable[..., nn.Module]) -> None:
    model = make_llama().eval()
    requests = [request(i, length) for i, length in enumerate((60, 3, 17, 41, 1, 60, 33, 9))]
    whole = Sampler(model, PAD, 4).run(requests)
    for chunk in (7, 16, 100):
        for a, b in zip(whole, Sampler(model, PAD, 4, chunk=chunk).run(requests), strict=True):
            assert a.token_ids == b.token_ids
            torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-5, rtol=0)


def test_others_get_tokens_while_a_long_prompt_is_read(make_llama: Callable[..., nn.Module]) -> None:
    """A prompt of 16,000 tokens kept everybody else waiting for 4.4 s: it was one forward."""
    widths: list[int] = []
    model = make_llama().eval()
    model.register_forward_pre_hook(
        lambda m, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    sampler = Sampler(model, PAD, 4, chunk=10)
    first = sampler.submit(request(0, 4, new=40))
    while not sampler.step():
        pass
    widths.clear()
    long = sampler.submit(request(1, 62, new=2))
    got = []
    while not got or got[-1].request_id != long:
        got += sampler.step()
    assert max(widths) <= 10 and sum(event.request_id == first for event in got) >= 6
    assert sum(width > 1 for width in widths) == 6, "61 tokens in pieces of 10"
    assert sampler.cancel(first) and sampler.cancel(long)


def test_a_prompt_that_is_cancelled_half_read_leaves_nothing(make_llama: Callable[..., nn.Module]) -> None:
    model = make_llama().eval()
    sampler = Sampler(model, PAD, 4, chunk=10)
    long = sampler.submit(request(1, 62))
    for _ in range(3):
        sampler.step()
    assert sampler.cancel(long) and not sampler.busy
    asked = request(2, 20)
    sampler.submit(asked)
    tokens = []
    while sampler.busy:
        tokens += [event.token_id for event in sampler.step()]
    assert tuple(tokens) == Sampler(model, PAD, 4).run([asked])[0].token_ids


def cells(sampler: Sampler) -> int:
    return sum(group.cache.cells for group in sampler._groups)


def test_the_cache_is_kept_to_its_tokens_and_the_replies_are_the_same(make_llama: Callable[..., nn.Module]) -> None:
    """It was as large as all rows times the longest: 64 GiB for 32 rows of an 8B model with its context."""
    model = make_llama(max_position_embeddings=2048).eval()
    requests = [request(i, 700 if i in (2, 9) else 5, new=6) for i in range(14)]
    free = Sampler(model, PAD, 8)
    expected = free.run(requests)
    sampler, most, seen = Sampler(model, PAD, 8, max_cached=1500), 0, {}
    ids = [sampler.submit(one) for one in requests]
    while sampler.busy:
        for event in sampler.step():
            seen.setdefault(event.request_id, []).append(event.token_id)
        most = max(most, cells(sampler))
    assert [tuple(seen[i]) for i in ids] == [one.token_ids for one in expected]
    assert most <= 1500 + 8 * 96, "and the spare columns of its rows"


def test_a_long_row_that_waits_for_room_lets_short_ones_pass_but_not_for_ever(
    make_llama: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind it everybody waited until the cache was nearly empty: a long prompt stopped all short ones."""
    model = make_llama(max_position_embeddings=2048).eval()
    requests = [request(i, 5, new=6 + i % 3) for i in range(20)]
    requests.insert(4, request(99, 700, new=6))
    expected = Sampler(model, PAD, 4).run(requests)
    for most, late in ((256, 16), (5, 5)):  # all the others, or as many as may
        monkeypatch.setattr(engine, "PASSES", most)
        sampler, order = Sampler(model, PAD, 4, max_cached=720), []
        sampler.submit(requests[0])
        ids, tokens = [0], {0: []}
        for one in requests[1:]:
            while not sampler.free_slots:
                note(sampler.step(), tokens, order)
            ids.append(sampler.submit(one))
            tokens[ids[-1]] = []
        while sampler.busy:
            note(sampler.step(), tokens, order)
        assert [tuple(tokens[i]) for i in ids] == [one.token_ids for one in expected]
        passed = sum(order.index(i) < order.index(ids[4]) for i in ids[5:])
        assert late <= passed <= late + 3, f"{passed} of 16 ended before it"


def test_a_full_cache_is_not_gone_through_for_every_row_that_waits(
    make_llama: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, most = [0], DecodeRow.most.fget  # type: ignore[attr-defined]

    def counted(row: DecodeRow) -> int:
        asked[0] += 1
        return most(row)

    sampler = Sampler(make_llama().eval(), PAD, 400, max_cached=100 * 13)
    for i in range(300):
        sampler.submit(request(i, 5))
    while not sampler.step():
        pass
    monkeypatch.setattr(DecodeRow, "most", property(counted))
    sampler.step()
    assert 0 < asked[0] < 3 * 300, "looks at all rows for each that waits"


def note(events: list[DecodeEvent], tokens: dict[int, list[int]], order: list[int]) -> None:
    for event in events:
        tokens[event.request_id].append(event.token_id)
        if event.end is not None:
            order.append(event.request_id)


def test_the_cache_shrinks_and_is_given_back(make_llama: Callable[..., nn.Module]) -> None:
    """RSS grew from 655 to 1,560 MB with one long prompt, for good."""
    model = make_llama(max_position_embeddings=4096).eval()
    sampler = Sampler(model, PAD, 8)
    for i in range(7):
        sampler.submit(request(i, 5, new=300))
    sampler.submit(request(9, 3000, new=3))
    most = 0
    for _ in range(60):
        sampler.step()
        most = max(most, cells(sampler))
    assert most >= 8 * 3000 and cells(sampler) < most / 8
    expected = Sampler(model, PAD, 8).run([request(0, 5, new=300)])[0].token_ids
    tokens: dict[int, list[int]] = {}
    while sampler.busy:
        for event in sampler.step():
            tokens.setdefault(event.request_id, []).append(event.token_id)
    assert tuple(tokens[0]) == expected[-len(tokens[0]) :]
    sampler.release()
    assert cells(sampler) == 0
