"""The incremental form: submit, step, cancel; what serving uses."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rlhf_ray.errors import ConfigError
from rlhf_ray.sampler.engine import DecodeResult, Sampler

PAD = 0


def drain(sampler: Sampler) -> dict[int, list]:
    events: dict[int, list] = {}
    with sampler.session():
        while sampler.busy:
            for event in sampler.step():
                events.setdefault(event.request_id, []).append(event)
    return events


def as_result(events: list) -> DecodeResult:
    assert [e.done for e in events] == [False] * (len(events) - 1) + [True]
    return DecodeResult(
        tuple(e.token_id for e in events), tuple(e.logprob for e in events), finished=events[-1].end == "stop"
    )


@pytest.mark.parametrize("max_rows", [2, 16])
def test_stepping_gives_the_results_of_run(llama, make_requests, max_rows):
    requests = make_requests(10, stop_ids=(5, 9))
    expected = Sampler(llama, PAD, max_rows).run(requests)
    sampler = Sampler(llama, PAD, max_rows)
    ids = [sampler.submit(request) for request in requests]
    events = drain(sampler)
    assert [as_result(events[i]) for i in ids] == expected
    assert {e.end for row in events.values() for e in row} == {None, "stop", "length"}
    assert sampler.step() == [] and sampler.free_slots == max_rows


def test_rows_may_come_while_others_are_decoded(llama, make_requests, assert_plain):
    requests = make_requests(12, max_new_tokens=15)
    sampler = Sampler(llama, PAD, max_rows=4)
    got: dict[int, list] = {}
    ids = []
    for i in range(400):
        if i % 3 == 0 and len(ids) < len(requests):
            ids.append(sampler.submit(requests[len(ids)]))
        for event in sampler.step():
            got.setdefault(event.request_id, []).append(event)
        if not sampler.busy and len(ids) == len(requests):
            break
    assert_plain(llama, requests, [as_result(got[i]) for i in ids])


def test_a_prompt_longer_than_everything_so_far_finds_room(llama, make_requests, assert_plain):
    generator = torch.Generator().manual_seed(4)
    short, long = make_requests(2, max_new_tokens=30)
    long = type(long)(tuple(torch.randint(3, 97, (120,), generator=generator).tolist()), 1, 40, ())
    sampler = Sampler(llama, PAD, max_rows=4)
    first = sampler.submit(short)
    events = {first: [e for _ in range(10) for e in sampler.step()]}
    second = sampler.submit(long)
    for i, more in drain(sampler).items():
        events.setdefault(i, []).extend(more)
    assert_plain(llama, [short, long], [as_result(events[first]), as_result(events[second])])


@pytest.mark.parametrize("done", [1, 4, 11])
def test_a_reply_goes_on_behind_the_tokens_that_an_earlier_attempt_gave(llama, make_requests, done):
    """With the same random numbers, beside fresh rows."""
    requests = make_requests(4, max_new_tokens=12)
    whole = Sampler(llama, PAD).run(requests)
    sampler = Sampler(llama, PAD)
    begun = [dataclasses.replace(r, begun=w.token_ids[:done]) for r, w in zip(requests[:2], whole)]
    ids = [sampler.submit(request) for request in [*begun, *requests[2:]]]
    events = drain(sampler)
    given = [tuple(e.token_id for e in events[i]) for i in ids]
    assert given == [w.token_ids[done:] for w in whole[:2]] + [w.token_ids for w in whole[2:]]
    with pytest.raises(ConfigError, match=r"max_new_tokens.*at least 13"):
        sampler.submit(dataclasses.replace(requests[0], begun=whole[0].token_ids))


def test_cancel_frees_the_slot_wherever_the_row_is(llama, make_requests, assert_plain):
    requests = make_requests(9, max_new_tokens=20)
    sampler = Sampler(llama, PAD, max_rows=4)
    ids = [sampler.submit(r) for r in requests]
    assert sampler.free_slots == 0
    assert sampler.cancel(ids[8])  # still waiting
    events: dict[int, list] = {}
    for _ in range(8):
        for event in sampler.step():
            events.setdefault(event.request_id, []).append(event)
    for gone in (ids[0], ids[2], ids[5]):  # two in their slots, one further back
        assert sampler.cancel(gone)
        assert not sampler.cancel(gone)
        events.pop(gone, None)
    assert not sampler.cancel(10_000)
    for i, more in drain(sampler).items():
        events.setdefault(i, []).extend(more)
    kept = [i for n, i in enumerate(ids) if n not in (0, 2, 5, 8)]
    assert sorted(events) == kept
    assert_plain(llama, [requests[ids.index(i)] for i in kept], [as_result(events[i]) for i in kept])


def test_cancelling_everything_empties_the_engine(llama, make_requests):
    sampler = Sampler(llama, PAD, max_rows=2)
    ids = [sampler.submit(r) for r in make_requests(5, max_new_tokens=9)]
    sampler.step(), sampler.step()
    assert all(sampler.cancel(i) for i in ids)
    assert sampler.step() == [] and sampler.free_slots == 2
    assert len(sampler.run(make_requests(3))) == 3


def test_cancel_reaches_rows_that_are_staged_and_prompts_that_are_about_to_be_read(llama, make_requests, assert_plain):
    requests = [dataclasses.replace(q, max_new_tokens=20) for q in make_requests(12)]
    requests[0] = dataclasses.replace(requests[0], max_new_tokens=1)
    sampler = Sampler(llama, PAD, max_rows=8)
    ids = [sampler.submit(r) for r in requests]
    events: dict[int, list] = {}
    while len(events) < 9:  # row 0 has left, row 8 has its slot, and row 9 was read together with it
        for event in sampler.step():
            events.setdefault(event.request_id, []).append(event)
    assert sampler.cancel(ids[9]) and sampler.free_slots == 0
    for i, more in drain(sampler).items():
        events.setdefault(i, []).extend(more)
    kept = [n for n in range(12) if n != 9]
    assert_plain(llama, [requests[n] for n in kept], [as_result(events[ids[n]]) for n in kept])

    long, short = (
        dataclasses.replace(requests[1], prompt_ids=(5,) * 100),
        dataclasses.replace(requests[1], prompt_ids=(5, 6)),
    )
    first, second = sampler.submit(long), sampler.submit(short)
    assert sampler.step() == [] and sampler.cancel(second)  # the prompts are too different to be read in one forward
    started = sampler.step()  # no forward is spent on the cancelled prompt
    assert [e.request_id for e in started] == [first]
    assert_plain(llama, [long], [as_result(started + drain(sampler)[first])])

    only = sampler.submit(long)
    assert sampler.step() == [] and sampler.cancel(only) and not sampler.busy


def test_a_row_whose_logits_break_ends_alone(make_llama, make_requests, assert_plain):
    """A poisoned token makes nan keys in its slot; neither its neighbours nor the next row in that slot may see them."""
    model = make_llama()
    poison = 96
    with torch.no_grad():
        model.model.embed_tokens.weight[poison] = float("nan")
    healthy = [q for q in make_requests(20, max_new_tokens=12) if poison not in q.prompt_ids][:9]
    healthy[0] = dataclasses.replace(healthy[0], prompt_ids=(5,) * 30, max_new_tokens=60)  # its window reaches far back
    healthy[1] = dataclasses.replace(healthy[1], prompt_ids=(7,))  # covers nothing of what the slot held before
    bad = dataclasses.replace(healthy[0], prompt_ids=(3, poison, 4))
    sampler = Sampler(model, PAD, max_rows=2)
    ids = [sampler.submit(q) for q in [healthy[0], bad, *healthy[1:]]]
    events = drain(sampler)
    assert [e.end for e in events[ids[1]]] == ["error"]
    fine = [i for i in ids if i != ids[1] and all(e.token_id != poison for e in events[i])]
    assert len(fine) >= 7
    rows = dict(zip(ids, [healthy[0], bad, *healthy[1:]]))
    assert_plain(model, [rows[i] for i in fine], [as_result(events[i]) for i in fine])


def test_prompts_that_begin_together_are_not_held_twice(llama, make_requests, assert_plain):
    """Each goes to its slot when its group is read, and not when the last group is: beside the slots one group is held. Rows that
    are cancelled meanwhile, and rows that come meanwhile, some longer than all before, change nothing for the others."""
    requests = [dataclasses.replace(q, max_new_tokens=12) for q in make_requests(9)]
    longest = max(len(r.prompt_ids) for r in requests)
    sampler = Sampler(llama, PAD, max_rows=16, prefill_tokens=2 * longest)
    ids = [sampler.submit(r) for r in requests[:7]]
    groups = 0
    while sampler.step() == []:
        groups += 1
        assert not any(row.prefix for row in sampler._staged)
    assert groups > 2
    drain(sampler)

    for gone in (0, 3, 6):
        ids = [sampler.submit(r) for r in requests[:7]]
        assert sampler.step() == [] and sampler.step() == []
        placed = [row.id for row in sampler._staged if row.slot is not None]
        assert 0 < len(placed) < 7
        assert sampler.cancel(ids[gone])
        long = dataclasses.replace(requests[7], prompt_ids=(5,) * (3 * longest))
        more = [sampler.submit(r) for r in (long, requests[8])]
        found = drain(sampler)
        kept = [n for n in range(7) if n != gone]
        events = [found[ids[n]] for n in kept] + [found[n] for n in more]
        assert_plain(llama, [*(requests[n] for n in kept), long, requests[8]], list(map(as_result, events)))
