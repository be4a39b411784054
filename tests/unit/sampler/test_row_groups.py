"""Rows of very different lengths take their steps in groups, each over a cache of its own length."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from rlhf_ray.sampler.engine import Sampler
from rlhf_ray.sampler.kv_cache import SlotLayer
from rlhf_ray.sampler.requests import DecodeRequest
from rlhf_ray.sampler.row_group import SLACK

PAD = 0


def request(seed: int, prompt: int, new: int = 8, **fields: Any) -> DecodeRequest:
    ids = torch.randint(3, 90, (prompt,), generator=torch.Generator().manual_seed(seed)).tolist()
    return DecodeRequest(tuple(ids), seed, new, (), **fields)


def cells(sampler: Sampler) -> int:
    return sum(group.cache.cells for group in sampler._groups)


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


def with_adapters(base: nn.Module, names: Sequence[str]) -> nn.Module:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    model: Any = get_peft_model(base, config, adapter_name=names[0])  # type: ignore[arg-type]
    for name in names[1:]:
        model.add_adapter(name, config)
    return model.eval()  # type: ignore[no-any-return]


@pytest.mark.parametrize("together", [True, False], ids=["one session", "a session each step"])
def test_each_group_has_adapters_of_its_own(make_llama: Callable[..., nn.Module], together: bool) -> None:
    """The factors of one group's adapters lay where those of the other's did: a row was written by somebody else's adapter."""
    model = with_adapters(make_llama(max_position_embeddings=2048), "abcde")
    for short, long in (("abab", "cd"), (["a", None, "a", None], ["b", None]), ("abcd", "e"), ("ab", "ba")):
        requests = [request(i, 6, new=20, adapter=name) for i, name in enumerate(short)]
        requests += [request(50 + i, 600, new=30, adapter=name) for i, name in enumerate(long)]
        alone = [Sampler(model, PAD).run([one])[0].token_ids for one in requests]
        sampler = Sampler(model, PAD, 8, max_cached=2200)
        ids, groups = [sampler.submit(one) for one in requests], 0
        tokens: dict[int, list[int]] = {i: [] for i in ids}
        with sampler.session() if together else nullcontext():
            while sampler.busy:
                for event in sampler.step():
                    tokens[event.request_id].append(event.token_id)
                groups = max(groups, len(sampler._groups))
        assert [tuple(tokens[i]) for i in ids] == alone and groups == 2


@pytest.mark.parametrize(("chunk", "budget"), [(None, 1500), (50, 900), (16, 3000), (128, 16_000)])
def test_whatever_comes_and_goes_the_replies_are_the_same_and_the_cache_keeps_to_its_budget(
    make_llama: Callable[..., nn.Module], chunk: int | None, budget: int
) -> None:
    """Lengths over two decades, adapters and none, bursts of cancelled rows; prompts in pieces or whole."""
    model = with_adapters(make_llama(max_position_embeddings=2048), ("one", "two", "three"))
    draw = random.Random(budget)
    names = ["one", "two", "three", None]
    requests = [
        request(i, int(4 * 150 ** draw.random()), int(2 * 20 ** draw.random()), adapter=draw.choice(names))
        for i in range(120)
    ]
    expected = Sampler(model, PAD, 16).run(requests)
    sampler, waiting = Sampler(model, PAD, 16, chunk=chunk, max_cached=budget, static=True), list(enumerate(requests))
    number: dict[int, int] = {}
    tokens: dict[int, list[int]] = {}
    cancelled: set[int] = set()
    groups = 0
    with sampler.session():
        while waiting or sampler.busy:
            while waiting and sampler.free_slots and draw.random() < 0.7:
                i, one = waiting.pop(0)
                number[sampler.submit(one)] = i
                tokens[i] = []
            for event in sampler.step():
                tokens[number[event.request_id]].append(event.token_id)
            if draw.random() < 0.02 and number:
                for at in draw.sample(list(number)[-16:], min(len(number), draw.choice([1, 1, 8]))):
                    if sampler.cancel(at):
                        cancelled.add(number[at])
            groups = max(groups, len(sampler._groups))
            assert cells(sampler) <= SLACK * (budget + 16 * 96), "the spare columns of its rows, and some slack"
    whole = [i for i in range(120) if i not in cancelled]
    assert [tuple(tokens[i]) for i in whole] == [expected[i].token_ids for i in whole]
    assert 1 < groups <= 4 and len(whole) > 60


def test_a_full_cache_is_not_copied_for_every_row_that_follows_another(
    make_llama: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of one length, as many as have room: each one that ended made it smaller, and the next one larger again."""
    sizes = [0]
    relocate = SlotLayer.relocate

    def counted(layer: SlotLayer, *args: Any) -> None:
        sizes[0] += layer.is_initialized and layer.keys.shape[::2] != (layer._geometry.slots, layer._geometry.columns)  # type: ignore[union-attr]
        relocate(layer, *args)

    monkeypatch.setattr(SlotLayer, "relocate", counted)
    model = make_llama(max_position_embeddings=2048).eval()
    for prompt, new, budget in ((200, 40, 2400), (900, 60, 7680)):
        sizes[0] = 0
        sampler = Sampler(model, PAD, 16, chunk=512, max_cached=budget)
        for i in range(60):
            sampler.submit(request(i, prompt, new=new - i % 7))
        while sampler.busy:
            sampler.step()
        assert 0 < sizes[0] <= 2 * 15, "in two layers; 60 rows came and went"


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
