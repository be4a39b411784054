"""Each row has its own adapter, and the model is found again as it was left."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from peft import LoraConfig, get_peft_model

from rlhf_ray.errors import ArtifactError, ConfigError, InvariantError
from rlhf_ray.sampler import adapter_routing
from rlhf_ray.sampler.engine import Sampler
from rlhf_ray.sampler.stacked_lora import can_stack

PAD = 0
NAMES = ("policy", "value", None)


@pytest.fixture
def peft_model(make_llama):
    """A base with two adapters that do something; one of them also adapts the MLP."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    model = get_peft_model(make_llama(), config, adapter_name="policy")
    model.add_adapter("value", LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    return model.eval()


def mixed(make_requests, count: int = 24, **fields):
    return [dataclasses.replace(q, adapter=NAMES[i % 3]) for i, q in enumerate(make_requests(count, **fields))]


@pytest.mark.parametrize("max_rows", [64, 5])
def test_rows_of_several_adapters_equal_separate_runs(peft_model, make_requests, max_rows):
    requests = mixed(make_requests, stop_ids=(5,))
    together = Sampler(peft_model, PAD, max_rows).run(requests)
    for kind in range(3):
        alone = Sampler(peft_model, PAD, max_rows).run(requests[kind::3])
        assert [r.token_ids for r in together[kind::3]] == [r.token_ids for r in alone]
        for a, b in zip(together[kind::3], alone):
            torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-5, rtol=0)
    assert (
        len(
            {
                r.token_ids
                for r in Sampler(peft_model, PAD).run([dataclasses.replace(requests[0], adapter=n) for n in NAMES])
            }
        )
        == 3
    )


PLAIN, FALLS_BACK = True, False
KINDS = {
    "rank-stabilised": (PLAIN, {"use_rslora": True}),
    "other rank and targets": (PLAIN, {"r": 3, "target_modules": ["k_proj", "down_proj"]}),
    "bias in B": (FALLS_BACK, {"lora_bias": True}),
    "on embeddings": (FALLS_BACK, {"target_modules": ["embed_tokens", "q_proj"]}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_that_cannot_be_stacked_take_the_general_path(peft_model, make_requests, kind):
    plain, fields = KINDS[kind]
    peft_model.add_adapter(
        "other", LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, **fields})
    )
    assert can_stack(peft_model, "other") == plain
    names = ("policy", "other", None)
    requests = [dataclasses.replace(q, adapter=names[i % 3]) for i, q in enumerate(make_requests(12))]
    together = Sampler(peft_model, PAD).run(requests)
    for first in range(3):
        for a, b in zip(together[first::3], Sampler(peft_model, PAD).run(requests[first::3])):
            assert a.token_ids == b.token_ids
            torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-5, rtol=0)


def test_dora_decodes_alone_and_is_refused_in_mixed_batches(peft_model, make_requests, assert_plain):
    peft_model.add_adapter("dora", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, use_dora=True))
    requests = make_requests(4, adapter="dora")
    results = Sampler(peft_model, PAD).run(requests)
    with pytest.raises(ConfigError, match="adapter dora: DoRA"):
        Sampler(peft_model, PAD).run([*requests, *make_requests(1)])
    peft_model.set_adapter("dora")
    assert_plain(peft_model, requests, results)


def test_stacking_equals_adapter_names(peft_model, make_requests, monkeypatch):
    requests = mixed(make_requests)
    stacked = Sampler(peft_model, PAD, 8).run(requests)
    monkeypatch.setattr(adapter_routing, "can_stack", lambda *_: False)
    looped = Sampler(peft_model, PAD, 8).run(requests)
    assert [r.token_ids for r in stacked] == [r.token_ids for r in looped]
    for a, b in zip(stacked, looped):
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-5, rtol=0)


def test_a_poisoned_adapter_breaks_its_own_rows_only(peft_model, make_requests, assert_plain):
    requests = mixed(make_requests, 9)
    with torch.no_grad():
        peft_model.base_model.model.model.layers[1].self_attn.q_proj.lora_B["value"].weight[0, 0] = float("nan")
    sampler = Sampler(peft_model, PAD)
    with pytest.raises(InvariantError, match=r"request 1 .*adapter value"):
        sampler.run(requests)
    ids = [sampler.submit(request) for request in requests]
    ends: dict[int, str | None] = {}
    while sampler.busy:
        ends.update({e.request_id: e.end for e in sampler.step() if e.done})
    assert [ends[i] for i in ids] == ["length", "error", "length"] * 3


def test_an_adapter_changed_between_steps_is_the_one_that_samples(peft_model, make_requests):
    """Stacked weights are copies; they must not outlive a session."""
    requests = mixed(make_requests, 6, max_new_tokens=10)
    before, after = [], []
    for logprobs, factor in ((before, 1), (after, -3)):
        sampler = Sampler(peft_model, PAD)
        for request in requests:
            sampler.submit(request)
        for _ in range(6):
            sampler.step()
        for name, parameter in peft_model.named_parameters():
            if ".policy." in name:
                parameter.data.mul_(factor)
        logprobs.extend(event.logprob for event in sampler.step())
    assert len(before) == len(after) == 6
    assert [x == y for x, y in zip(before, after)] == [r.adapter != "policy" for r in requests]


@pytest.mark.parametrize("adapter", NAMES)
def test_one_adapter_equals_a_plain_forward_under_it(peft_model, make_requests, assert_plain, adapter):
    requests = make_requests(8, adapter=adapter)
    results = Sampler(peft_model, PAD).run(requests)
    if adapter is None:
        with peft_model.disable_adapter():
            assert_plain(peft_model, requests, results)
        return
    peft_model.set_adapter(adapter)
    assert_plain(peft_model, requests, results)


@pytest.mark.parametrize("adapters", [("policy",), ("value",), (None,), NAMES], ids=str)
def test_the_model_is_left_as_it_was(peft_model, make_requests, adapters):
    peft_model.set_adapter("value")
    for name, parameter in peft_model.named_parameters():
        parameter.requires_grad_(".policy." in name or ".value." in name or "norm" in name)
    peft_model.train()
    peft_model.base_model.model.model.layers[0].eval()

    def state():
        flags = {name: p.requires_grad for name, p in peft_model.named_parameters()}
        return flags, list(peft_model.active_adapters), [m.training for m in peft_model.modules()]

    before = state()
    sampler = Sampler(peft_model, PAD)
    sampler.run([dataclasses.replace(q, adapter=n) for q in make_requests(2) for n in adapters])
    assert state() == before
    sampler.submit(dataclasses.replace(make_requests(1)[0], adapter=adapters[0]))
    while sampler.busy:
        sampler.step()
    assert state() == before
    peft_model(torch.tensor([[3, 4]])).logits.sum().backward()  # and it can still be trained


@pytest.mark.parametrize("adapters", [("dropped",), NAMES], ids=str)
def test_training_mode_dropout_and_checkpointing_do_not_reach_the_replies(peft_model, make_requests, adapters):
    dropped = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False)
    peft_model.add_adapter("dropped", dropped)
    requests = [dataclasses.replace(q, adapter=adapters[i % len(adapters)]) for i, q in enumerate(make_requests(6))]
    expected = Sampler(peft_model.eval(), PAD).run(requests)
    peft_model.get_base_model().gradient_checkpointing_enable()
    assert Sampler(peft_model.train(), PAD).run(requests) == expected


def test_a_step_that_fails_leaves_the_model_as_it_was(peft_model, make_requests):
    peft_model.train()

    def fail(*_):
        raise OSError("worker lost")

    hook = peft_model.base_model.model.lm_head.register_forward_hook(fail)
    sampler = Sampler(peft_model, PAD)
    with pytest.raises(OSError, match="worker lost"):
        sampler.run(make_requests(2, adapter="value"))
    sampler.submit(make_requests(1, adapter="value")[0])
    with pytest.raises(OSError, match="worker lost"):
        sampler.step()
    assert not sampler.busy  # nothing of a half-done forward is left
    hook.remove()
    assert peft_model.active_adapters == ["policy"] and all(m.training for m in peft_model.modules())
    assert len(sampler.run(make_requests(2, adapter="value"))) == 2


def test_adapters_loaded_later_are_known_and_unknown_ones_refused(peft_model, make_requests):
    sampler = Sampler(peft_model, PAD)
    later = make_requests(1, adapter="later")
    with pytest.raises(ConfigError, match=r"adapter.*one of policy, value; got 'later'"):
        sampler.run(later)
    peft_model.add_adapter("later", LoraConfig(r=2, target_modules=["q_proj"]))
    assert len(sampler.run(later)) == 1


def test_merged_or_disabled_adapters_are_refused(peft_model, make_requests):
    sampler = Sampler(peft_model, PAD)
    with peft_model.disable_adapter(), pytest.raises(ArtifactError, match="switched off"):
        sampler.run(make_requests(1, adapter="policy"))
    peft_model.merge_adapter(["policy"])
    with pytest.raises(ArtifactError, match=r"merged.*policy"):
        sampler.run(make_requests(1))
    peft_model.unmerge_adapter()
    assert len(sampler.run(make_requests(1, adapter="policy"))) == 1


class Lockstep:
    """Stands for the all-reduce of a group: other ranks have work for `others` more forwards."""

    def __init__(self, others: int) -> None:
        self.others, self.asked = others, []

    def __call__(self, busy: bool) -> bool:
        self.asked.append(busy)
        self.others -= 1
        return busy or self.others >= 0


def count_forwards(model):
    """[(rows, adapter active while it ran)] of every forward from now on."""
    seen = []
    base = model.get_base_model()
    base.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((kwargs["input_ids"].shape[0], list(model.active_adapters))),
        with_kwargs=True,
    )
    return seen


def test_a_rank_without_work_keeps_forwarding_until_all_are_done(peft_model, make_requests):
    requests = make_requests(6, adapter="policy")
    expected = Sampler(peft_model, PAD, max_rows=3).run(requests)
    seen = count_forwards(peft_model)
    alone = Lockstep(0)
    assert Sampler(peft_model, PAD, max_rows=3).run(requests, alone, "policy") == expected
    needed = len(seen)
    assert alone.asked == [True] * needed + [False]  # asked once before every forward, prompts included

    seen.clear()
    long = Lockstep(needed + 7)
    assert Sampler(peft_model, PAD, max_rows=3).run(requests, long, "policy") == expected
    assert len(seen) == needed + 7 and long.asked == [True] * needed + [False] * 8
    assert seen[needed:] == [(1, ["policy"])] * 7

    seen.clear()
    assert Sampler(peft_model, PAD).run([], Lockstep(4), idle_adapter="value") == []
    assert seen == [(1, ["value"])] * 4


def test_owners_in_one_batch_get_their_replies_or_their_own_error(peft_model, make_requests):
    """Each as in a run of its own; a wrong request and logits that are not finite are their owner's affair alone."""
    requests = make_requests(8, stop_ids=(5,))
    mine = {name: [dataclasses.replace(q, adapter=name) for q in requests] for name in ("policy", "value")}
    wrong = [dataclasses.replace(requests[0], top_p=0.0)]
    sampler = Sampler(peft_model, PAD, 24)
    for _ in range(2):  # an engine that starts empty and ends empty
        found = sampler.run_apart({"wrong": wrong, **mine})
        assert isinstance(found["wrong"], ConfigError) and list(found) == ["wrong", "policy", "value"]
        for name, theirs in mine.items():
            alone = Sampler(peft_model, PAD, 24).run(theirs)
            assert [r.token_ids for r in found[name]] == [r.token_ids for r in alone]
    assert sampler.run_apart({"policy": mine["policy"]})["policy"] == Sampler(peft_model, PAD, 24).run(mine["policy"])
    peft_model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["value"].weight.data[0] = float("nan")
    found = sampler.run_apart(mine)
    assert isinstance(found["value"], InvariantError) and "not finite" in str(found["value"])
    alone = Sampler(peft_model, PAD, 24).run(mine["policy"])
    assert [r.token_ids for r in found["policy"]] == [r.token_ids for r in alone]
    assert not sampler.busy and sampler.run_apart({}) == {}
