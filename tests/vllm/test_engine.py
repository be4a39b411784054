"""vLLM behind the interface of the decode engine: the tokens, log-probabilities and refusals of the builtin one."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from rlhf_ray.config import LoraConfig
from rlhf_ray.errors import ConfigError, InvariantError
from rlhf_ray.models.adapters import load_adapter_tensors
from rlhf_ray.sampler import vllm_lora
from rlhf_ray.sampler.logits import LogitsOptions
from rlhf_ray.sampler.requests import DecodeRequest, DecodeResult
from rlhf_ray.sampler.vllm_engine import VLLMEngine, VLLMOptions

from .conftest import Pair, build_requests


def gap(one: DecodeResult, other: DecodeResult) -> float:
    """Of log-probabilities, up to where the tokens part; inf if they part at once though neither was nearly the other."""
    same = next((i for i, pair in enumerate(zip(one.token_ids, other.token_ids)) if pair[0] != pair[1]), None)
    upto = len(one.token_ids) if same is None else same
    return max((abs(a - b) for a, b in zip(one.logprobs[:upto], other.logprobs[:upto])), default=0.0)


@pytest.mark.parametrize(
    "how",
    [
        {"adapter": "policy", "greedy": True},
        {"adapter": "policy"},
        {"adapter": "policy", "temperature": 1.3, "top_p": 0.8, "top_k": 20, "stop_ids": (5, 6, 7)},
        {"adapter": None, "temperature": 0.7, "stop_ids": tuple(range(3, 40))},
    ],
    ids=["greedy", "sampled", "truncated", "base"],
)
def test_the_tokens_of_the_builtin_engine(pair: Pair, how: dict[str, Any]) -> None:
    """200 prompts, in fp32: the very tokens, sampled ones too, since both draw by the same numbers; log-probabilities differ by
    rounding. Temperature scales them, top-k and top-p do not."""
    pair.load(pair.draw(1))
    requests = build_requests(200, **how)
    builtin, vllm = pair.builtin.run(requests), pair.vllm.run(requests)
    parted = [i for i, (one, other) in enumerate(zip(builtin, vllm)) if one.token_ids != other.token_ids]
    assert parted == [], [(i, gap(builtin[i], vllm[i])) for i in parted]
    assert [r.finished for r in builtin] == [r.finished for r in vllm]
    assert max(map(gap, builtin, vllm)) < 1e-3
    assert not pair.vllm.busy and pair.vllm._shared.drawn == {} == pair.vllm._shared.rows


def test_a_chunk_does_not_depend_on_what_ran_before(pair: Pair) -> None:
    """Bit for bit, though vLLM has read its prompts before."""
    pair.load(pair.draw(2))
    chunk = build_requests(12, adapter="policy")
    first = pair.vllm.run(chunk)
    pair.vllm.run(build_requests(30, seed=3, adapter="policy") + chunk)
    assert pair.vllm.run(chunk) == first


def test_an_adapter_goes_to_its_rows_alone(pair: Pair) -> None:
    """Rows of the adapter and of the base in one batch. (vLLM's CPU kernels take the last slot's adapter for rows without one.)"""
    pair.load(pair.draw(4))
    mixed = [
        DecodeRequest(r.prompt_ids, r.row_seed, r.max_new_tokens, (), adapter="policy" if i % 2 else None)
        for i, r in enumerate(build_requests(20))
    ]
    assert [r.token_ids for r in pair.vllm.run(mixed)] == [r.token_ids for r in pair.builtin.run(mixed)]


def test_step_by_step_with_rows_that_come_go_and_go_on(pair: Pair) -> None:
    """The interface that serving uses: tokens as they are drawn, a row cancelled, one that goes on behind what was begun."""
    pair.load(pair.draw(5))
    requests = build_requests(6, adapter="policy", max_new_tokens=20)
    whole = pair.vllm.run(requests)
    numbers = [pair.vllm.submit(request) for request in requests]
    assert pair.vllm.busy and pair.vllm.free_slots == pair.vllm.max_rows - 6
    told: dict[int, list[int]] = {number: [] for number in numbers}
    while pair.vllm.busy:
        for event in pair.vllm.step():
            told[event.request_id].append(event.token_id)
            if event.request_id == numbers[2] and len(told[numbers[2]]) == 3:
                assert pair.vllm.cancel(numbers[2]) and not pair.vllm.cancel(numbers[2])
    assert len(told.pop(numbers[2])) == 3
    for number, tokens in told.items():
        assert tuple(tokens) == whole[numbers.index(number)].token_ids
    fields = {**vars(requests[0]), "begun": whole[0].token_ids[:7]}
    [result] = pair.vllm.run([DecodeRequest(**fields)])
    assert result.token_ids == whole[0].token_ids and len(result.logprobs) == 13
    assert result.logprobs == pytest.approx(whole[0].logprobs[7:], abs=1e-3)


def test_200_versions_in_a_row_and_never_a_stale_answer(pair: Pair) -> None:
    """Each version is drawn anew; at random moments comes one that was there before, or one and the same prompt: every answer is
    that of the version loaded last, by the builtin engine on the same weights. Memory does not grow."""
    choose = random.Random(0)
    prompts = [
        tuple(range(3 + i, 40 + i)) for i in range(4)
    ]  # of more than a block, so that there is something to reuse
    drawn: list[dict[str, Tensor]] = []
    wrong, answers, sizes = 0, set(), []
    for version in range(200):
        tensors = choose.choice(drawn) if drawn and choose.random() < 0.2 else pair.draw(1000 + version, scale=1.0)
        drawn = [*drawn[-9:], tensors]
        pair.load(tensors)
        requests = [DecodeRequest(prompt, 0, 2, (), greedy=True, adapter="policy") for prompt in prompts]
        expected, found = pair.builtin.run(requests), pair.vllm.run(requests)
        wrong += sum(one.token_ids != other.token_ids for one, other in zip(expected, found))
        answers |= {result.token_ids for result in found}
        sizes.append(psutil.Process().memory_info().rss)
    assert wrong == 0 and len(answers) > 300  # the versions do answer differently
    assert len(pair.vllm._in_worker(lambda worker: worker.model_runner.lora_manager.list_adapters())) == 1
    assert max(sizes[150:]) < 1.02 * max(sizes[20:70])


def test_fields_that_serving_asks_for(pair: Pair) -> None:
    """min_p, log-probabilities at temperature 1, the likeliest tokens, penalties, bias, min_tokens."""
    pair.load(pair.draw(7))
    [one] = build_requests(1, adapter="policy", max_new_tokens=6)
    request = replace(one, temperature=0.7, min_p=0.05, raw_logprobs=True, top_logprobs=3)
    told: list[list[Any]] = []
    for engine in (pair.builtin, pair.vllm):
        engine.submit(request)
        events = []
        while engine.busy:
            events += engine.step()
        told.append(events)
    for ours, theirs in zip(*told, strict=True):
        assert (ours.token_id, ours.end) == (theirs.token_id, theirs.end)
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        assert [i for i, _ in ours.top] == [i for i, _ in theirs.top] and len(ours.top) == 3
    how = LogitsOptions(0.7, 0.3, 1.4, ((70, 2.0), (71, -5.0)), min_tokens=3)
    asked = [
        replace(r, logits=how if i % 2 else None) for i, r in enumerate(build_requests(40, stop_ids=tuple(range(90))))
    ]
    assert [r.token_ids for r in pair.vllm.run(asked)] == [r.token_ids for r in pair.builtin.run(asked)]
    assert min(len(r.token_ids) for r, a in zip(pair.vllm.run(asked), asked) if a.logits and a.max_new_tokens > 2) >= 3


def test_rows_that_vllm_reads_in_parts_and_puts_off(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts longer than a step, and a cache too small for all rows: it draws more than once at a place, and takes rows up again.
    What changes logits from token to token goes back with them."""
    from vllm.v1.core.sched.scheduler import Scheduler

    put_off: list[str] = []
    original = Scheduler._preempt_request

    def noted(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        put_off.append(request.request_id)
        return original(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", noted)
    options = replace(pair.vllm.options, longest=256, kv_cache_bytes=2**19, max_rows=8, step_tokens=40)
    small = VLLMEngine(options)
    tensors = pair.draw(8)
    load_adapter_tensors(pair.model, "policy", tensors)
    small.load_adapter("policy", pair.config, tensors)
    how = LogitsOptions(0.7, 0.3, 1.2, ((70, 1.0),), min_tokens=5)
    draw = random.Random(0)
    asked = [
        DecodeRequest(
            tuple(draw.randrange(3, 260) for _ in range(draw.randrange(60, 121))),
            draw.getrandbits(62),
            draw.randrange(20, 90),
            (5, 6),
            adapter="policy" if i % 2 else None,
            logits=how if i % 3 == 0 else None,
        )
        for i in range(24)
    ]
    try:
        found = small.run(asked)
    finally:
        small.close()
    assert put_off and [r.token_ids for r in found] == [r.token_ids for r in pair.builtin.run(asked)]


class TestTheHandOver:
    def test_a_name_is_never_used_twice(self, pair: Pair) -> None:
        seen = set()
        for _ in range(3):
            pair.load(pair.draw(1))
            number, request = pair.vllm._adapters["policy"]
            seen.add((number, request.lora_name))
        assert len({number for number, _ in seen}) == len({name for _, name in seen}) == 3

    def test_what_the_layers_hold_is_hashed(self, pair: Pair) -> None:
        pair.load(pair.draw(1))
        first = pair.vllm.layers_sha256("policy")
        pair.load(pair.draw(2))
        second = pair.vllm.layers_sha256("policy")
        pair.load(pair.draw(1))
        assert pair.vllm.layers_sha256("policy") == first != second

        def spoil(worker: Any) -> None:
            manager = worker.model_runner.lora_manager._adapter_manager
            manager.modules["model.layers.0.mlp.down_proj"].lora_b_stacked[0][0, 0, 0, 0] += 1

        pair.vllm._in_worker(spoil)
        assert pair.vllm.layers_sha256("policy") != first

    def test_an_adapter_that_is_gone_is_not_answered_for(self, pair: Pair) -> None:
        """By neither of its two doors: the engine's own list, and vLLM's, should it have dropped one by itself."""
        pair.load(pair.draw(1))
        number, _ = pair.vllm._adapters["policy"]
        pair.vllm._in_worker(vllm_lora.take, number)
        with pytest.raises(Exception, match=r"(?i)lora|adapter|/memory/"):
            pair.vllm.run(build_requests(1, adapter="policy"))
        pair.vllm.drop_adapter("policy")
        with pytest.raises(ConfigError, match="none: this model has no adapters"):
            pair.vllm.run(build_requests(1, adapter="policy"))
        pair.load(pair.draw(1))
        assert pair.vllm.run(build_requests(1, adapter="policy"))

    def test_tensors_that_vllm_takes_no_notice_of(self, pair: Pair) -> None:
        """A module that is not the model's, a rank that is not the engine's: refused, and nothing is left behind."""
        tensors = pair.draw(1)
        strange = {key.replace("q_proj", "quite_other"): t for key, t in tensors.items() if "layers.0" in key}
        with pytest.raises(ConfigError, match=r"cannot adapt model.layers.0.self_attn.quite_other of LlamaForCausalLM"):
            pair.vllm.load_adapter("policy", pair.config, strange)
        with pytest.raises(ConfigError, match="rank above the engine's; expected at most 8; got 64"):
            pair.vllm.load_adapter("policy", {**pair.config, "r": 64}, tensors)
        with pytest.raises(ConfigError, match="adapter"):
            pair.vllm.run(build_requests(1, adapter="policy"))

    def test_only_some_modules(self, pair: Pair) -> None:
        """q and v alone: k, which vLLM keeps in one matrix with them, stays the base's."""
        whole = pair.draw(6)
        some = {key: t for key, t in whole.items() if "q_proj" in key or "v_proj" in key}
        pair.load({key: t if key in some else torch.zeros_like(t) for key, t in whole.items()})
        pair.vllm.load_adapter("policy", pair.config, some)
        requests = build_requests(30, adapter="policy", greedy=True)
        assert [r.token_ids for r in pair.vllm.run(requests)] == [r.token_ids for r in pair.builtin.run(requests)]


class TestWhatIsRefused:
    def test_requests(self, pair: Pair) -> None:
        """All of them, by number, before anything runs; and the engine goes on."""
        with pytest.raises(ConfigError) as found:
            pair.vllm.run([*build_requests(1), DecodeRequest((999,), 0, 4, (2,)), DecodeRequest((3,) * 200, 0, 4, ())])
        lines = [str(problem) for problem in found.value.problems]
        assert lines[0].startswith("request 1: prompt_ids; expected 0 <= id < 260; got [999]")
        assert "request 2: prompt and reply are longer than the model's context; expected at most 128" in lines[1]
        assert pair.vllm.run(build_requests(2))

    def test_weights_that_are_not_finite(self, pair: Pair) -> None:
        tensors = pair.draw(1)
        next(iter(tensors.values()))[0, 0] = float("inf")
        pair.vllm.load_adapter("policy", pair.config, tensors)
        with pytest.raises(InvariantError, match=r"request 0 .* adapter policy: the model's logits are not finite"):
            pair.vllm.run(build_requests(2, adapter="policy"))
        pair.load(pair.draw(1))
        assert pair.vllm.run(build_requests(2, adapter="policy")) and not pair.vllm.busy

    def test_a_head_dimension_that_its_cpu_kernel_has_not(self, tiny_llama: Callable[..., Path]) -> None:
        folder = tiny_llama(head_dim=8)
        with pytest.raises(ConfigError, match=r"rollout.engine: vLLM 0\.\S+ cannot run this model: .*; fix: set"):
            VLLMEngine(VLLMOptions(str(folder), "float32", torch.device("cpu"), 64, 4, 8, kv_cache_bytes=2**24))

    def test_a_family_that_it_does_not_adapt(self, tiny_gpt2: Callable[..., Path]) -> None:
        with pytest.raises(ConfigError, match="cannot run this model: GPT2LMHeadModel does not support LoRA yet"):
            VLLMEngine(VLLMOptions(str(tiny_gpt2()), "float32", torch.device("cpu"), 64, 4, 8, kv_cache_bytes=2**24))

    def test_a_rank_above_its_highest(self) -> None:
        assert [vllm_lora.largest_rank(r) for r in (1, 2, 8, 9, 512)] == [1, 8, 8, 16, 512]
        with pytest.raises(ConfigError, match=r"lora.r: rank above what vLLM takes; expected at most 512; got 513"):
            vllm_lora.largest_rank(513)


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Gemma2", "Mistral", "Phi3"])
def test_families(family: str, tmp_path: Path) -> None:
    """Fused and split projections, other names and norms: greedy tokens of the builtin engine, under an adapter on all layers."""
    both = Pair(_random(family, tmp_path), LoraConfig(r=4, lora_alpha=8))
    both.load(both.draw(1, scale=0.1))
    requests = build_requests(20, adapter="policy", vocabulary=250)
    builtin, vllm = both.builtin.run(requests), both.vllm.run(requests)
    both.vllm.close()
    assert [r.token_ids for r in builtin] == [r.token_ids for r in vllm]
    assert max(map(gap, builtin, vllm)) < 1e-3


def _random(family: str, folder: Path) -> Path:
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=256,
        initializer_range=0.2,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(folder)
    return folder
