"""Steps over shapes that last: the replies of the ordinary steps, from buffers that stay where they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_ray.config import LoraConfig
from rlhf_ray.models.adapters import add_fresh, wrap
from rlhf_ray.sampler import static_step
from rlhf_ray.sampler.engine import Sampler
from rlhf_ray.sampler.requests import DecodeRequest
from rlhf_ray.sampler.rows import live
from rlhf_ray.sampler.static_step import StaticSteps, slides

Requests = list[DecodeRequest]


def asked(count: int, adapter: str | None = "one", **fields: Any) -> Requests:
    """Prompts of 1 to 40 tokens, replies of up to 1 to 60, some with stop ids."""
    draw = torch.Generator().manual_seed(count)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=draw))

    return [
        DecodeRequest(
            tuple(number(3, 260) for _ in range(number(1, 41))),
            number(0, 2**62),
            number(1, 61),
            (5, 6, 7) if i % 2 else (),
            adapter=adapter,
            **fields,
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path]) -> Any:
    base = AutoModelForCausalLM.from_pretrained(tiny_llama(), dtype=torch.float32).eval()
    peft = wrap(base, LoraConfig(r=4, lora_alpha=8), "one", seed=0)
    add_fresh(peft, "two", LoraConfig(r=4, lora_alpha=8), seed=1, trainable=False)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    return peft.eval()


def steps_of(sampler: Sampler) -> StaticSteps:
    assert sampler._static is not None
    return sampler._static


@pytest.mark.parametrize("rows", [5, 16, 64])
@pytest.mark.parametrize("how", [{"greedy": True}, {"temperature": 0.8, "top_p": 0.9}, {"adapter": None}], ids=str)
def test_the_replies_of_ordinary_steps(model: Any, rows: int, how: dict[str, Any]) -> None:
    """More requests than rows, so that rows come and go; the log-probabilities differ by rounding."""
    requests = asked(50, **how)
    static = Sampler(model, 0, rows, static=True)
    ours, theirs = static.run(requests), Sampler(model, 0, rows).run(requests)
    assert [r.token_ids for r in ours] == [r.token_ids for r in theirs]
    gaps = [abs(a - b) for one, other in zip(ours, theirs) for a, b in zip(one.logprobs, other.logprobs)]
    assert max(gaps) < 1e-4


def test_a_shape_is_made_once_and_lasts(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 replies of 100 tokens: some three shapes for 100 steps, each with inputs and buffers at the same addresses every time."""
    seen: dict[int, set[tuple[int, ...]]] = {}
    forward = static_step._Shape._forward

    def noted(self: Any, logits: Any) -> Any:
        def told(ids: Any, mask: Any, positions: Any) -> Any:
            addresses = ids.data_ptr(), positions.data_ptr(), self._column.data_ptr(), *mask.shape
            seen.setdefault(id(self), set()).add(addresses)
            return logits(ids, mask, positions)

        return forward(self, told)

    monkeypatch.setattr(static_step._Shape, "_forward", noted)
    sampler = Sampler(model, 0, 16, static=True)
    sampler.run([DecodeRequest((3 + i, 9), i, 100, (), adapter="one") for i in range(16)])
    assert 1 < steps_of(sampler).made <= 4 and len(seen) == steps_of(sampler).made
    assert all(len(addresses) == 1 for addresses in seen.values())


def test_rows_are_padded_and_pads_say_nothing(model: Any) -> None:
    """11 rows of 16 slots: what lies in the slots behind them, nan too, reaches nobody."""
    requests = asked(11, greedy=True)
    sampler = Sampler(model, 0, 16, static=True)
    right = sampler.run(requests)
    for request in requests:
        sampler.submit(request)
    tokens: dict[int, list[int]] = {}
    with sampler.session():
        while sampler.busy:
            for event in sampler.step():
                tokens.setdefault(event.request_id, []).append(event.token_id)
            (group,) = sampler._groups
            n = len(group.rows)
            for layer in group.cache.layers:
                if live(group.rows):  # before that, prompts lie there that are about to begin
                    layer.keys[n:], layer.values[n:] = torch.nan, torch.nan
    assert sorted(map(tuple, tokens.values())) == sorted(r.token_ids for r in right)


def test_rows_of_several_adapters_take_ordinary_steps(model: Any) -> None:
    requests = [r for pair in zip(asked(10, "one"), asked(10, "two")) for r in pair]
    static = Sampler(model, 0, 8, static=True)
    assert [r.token_ids for r in static.run(requests)] == [r.token_ids for r in Sampler(model, 0, 8).run(requests)]


def test_weights_that_have_changed_are_used(model: Any) -> None:
    """A graph knows addresses: none outlives the session."""
    static, ordinary = Sampler(model, 0, 8, static=True), Sampler(model, 0, 8)
    weight = next(p for name, p in model.named_parameters() if "lora_B.one" in name)
    requests, kept = asked(6, greedy=True), weight.data
    before = static.run(requests)
    try:
        weight.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(9)) * 2
        after = static.run(requests)
        assert [r.token_ids for r in after] == [r.token_ids for r in ordinary.run(requests)]
        assert after != before
    finally:
        weight.data = kept


def test_models_whose_layers_slide_or_keep_a_state_take_ordinary_steps(tiny_hybrid: Any) -> None:
    from transformers import Gemma2Config, LlamaConfig, MistralConfig, Qwen2Config

    assert [slides(c) for c in (LlamaConfig(), Qwen2Config(), Gemma2Config(), MistralConfig(sliding_window=64))] == [
        *(False, False),
        *(True, True),
    ]
    hybrid = AutoModelForCausalLM.from_pretrained(tiny_hybrid(model_type="lfm2"), dtype=torch.float32).eval()
    assert Sampler(hybrid, 0, 8, static=True)._static is None
