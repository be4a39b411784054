"""Rows of very different lengths take their steps in groups, each over a cache of its own length."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from rlhf_ray.sampler.engine import Sampler
from rlhf_ray.sampler.requests import DecodeRequest

PAD = 0


def request(seed: int, prompt: int, new: int = 8, **fields: Any) -> DecodeRequest:
    ids = torch.randint(3, 90, (prompt,), generator=torch.Generator().manual_seed(seed)).tolist()
    return DecodeRequest(tuple(ids), seed, new, (), **fields)


def cells(sampler: Sampler) -> int:
    return sum(slots * columns for slots, columns in (group.cache.shape for group in sampler._groups))


def test_short_rows_beside_a_long_one_take_room_of_their_own_length(make_llama: Callable[..., nn.Module]) -> None:
    """All rows took as many columns as the longest: beside one of 1,200 tokens, a cache of 3,000 had room for one more."""
    model = make_llama(max_position_embeddings=2048).eval()
    requests = [request(0, 1200, new=40)] + [request(i, 5 + i % 3, new=6 + i % 4) for i in range(1, 30)]
    expected = Sampler(model, PAD, 16).run(requests)
    sampler = Sampler(model, PAD, 16, chunk=200, max_cached=3000)
    ids = [sampler.submit(one) for one in requests]
    tokens: dict[int, list[int]] = {i: [] for i in ids}
    over, most, together = [], 0, 0
    while sampler.busy:
        for event in sampler.step():
            tokens[event.request_id].append(event.token_id)
            over += [event.request_id] if event.end else []
        most, together = max(most, cells(sampler)), max(together, len(sampler._decoding))
    assert [tuple(tokens[i]) for i in ids] == [one.token_ids for one in expected]
    assert together == 16 and most <= 3000 + 16 * 96, "and the spare columns of its rows"
    assert over.index(ids[0]) >= 28 and len(sampler._groups) == 1, "the short ones did not wait, and one group is left"


def test_groups_take_turns(make_llama: Callable[..., nn.Module]) -> None:
    sampler = Sampler(make_llama(max_position_embeddings=2048).eval(), PAD, 8, max_cached=2000)
    ids = [sampler.submit(request(i, 5 if i else 900, new=30)) for i in range(6)]
    steps = [{event.request_id for event in events} for _ in range(30) if (events := sampler.step())]
    one, other = steps[-2:]
    assert steps[-8:] == [one, other] * 4 and one | other == set(ids) and not one & other
    for i in one:
        assert sampler.cancel(i)
    assert [{event.request_id for event in sampler.step()} for _ in range(3)] == [other] * 3


def test_whatever_comes_and_goes_the_replies_are_the_same_and_the_cache_keeps_to_its_budget(
    make_llama: Callable[..., nn.Module],
) -> None:
    """Lengths over two decades, two adapters and none, cancelled rows; prompts in pieces or whole."""
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    model = get_peft_model(make_llama(max_position_embeddings=2048), config, adapter_name="one")
    model.add_adapter("two", config)
    model.eval()
    draw = random.Random(3)
    requests = [
        request(
            i, int(4 * 100 ** draw.random()), int(2 * 20 ** draw.random()), adapter=draw.choice(["one", "two", None])
        )
        for i in range(120)
    ]
    expected = Sampler(model, PAD, 16).run(requests)
    for chunk, budget in ((None, 1500), (50, 900), (16, 3000)):
        sampler, waiting, groups = Sampler(model, PAD, 16, chunk=chunk, max_cached=budget), list(enumerate(requests)), 0
        number: dict[int, int] = {}
        tokens: dict[int, list[int]] = {}
        cancelled: set[int] = set()
        while waiting or sampler.busy:
            while waiting and sampler.free_slots and draw.random() < 0.7:
                i, one = waiting.pop(0)
                number[sampler.submit(one)] = i
                tokens[i] = []
            for event in sampler.step():
                tokens[number[event.request_id]].append(event.token_id)
            if draw.random() < 0.05 and number:
                at = draw.choice(list(number)[-20:])
                if sampler.cancel(at):
                    cancelled.add(number[at])
            groups = max(groups, len(sampler._groups))
            assert cells(sampler) <= budget + 16 * 96
        whole = [i for i in range(120) if i not in cancelled]
        assert [tuple(tokens[i]) for i in whole] == [expected[i].token_ids for i in whole]
        assert 1 < groups <= 4 and len(cancelled) > 3


def test_a_row_that_breaks_in_one_group_leaves_the_other_alone(make_llama: Callable[..., nn.Module]) -> None:
    model = make_llama(max_position_embeddings=2048).eval()
    good = [request(i, 5, new=12) for i in range(1, 4)] + [request(7, 400, new=12)]
    expected = [one.token_ids for one in Sampler(model, PAD, 8).run(good)]
    model.get_input_embeddings().weight.data[95] = float("nan")
    bad = replace(request(9, 390, new=12), prompt_ids=(*request(9, 390).prompt_ids, 95))
    sampler = Sampler(model, PAD, 8, max_cached=1000)
    ids = [sampler.submit(one) for one in [*good, bad]]
    tokens: dict[int, list[int]] = {i: [] for i in ids}
    ends = {}
    while sampler.busy:
        for event in sampler.step():
            tokens[event.request_id].append(event.token_id)
            ends[event.request_id] = event.end
    assert [tuple(tokens[i]) for i in ids[:-1]] == expected
    assert [ends[i] for i in ids] == ["length"] * 4 + ["error"]
