"""What one reply is: its tokens, where it stops, its log-probabilities, and which requests are refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from rlhf_ray.errors import ConfigError, InvariantError
from rlhf_ray.sampler.engine import DecodeRequest, Sampler, rows_at_once

PAD = 0


def generate_greedy(model, request, eos):
    """transformers' own loop, one prompt at a time: no padding anywhere."""
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=False, max_new_tokens=request.max_new_tokens, eos_token_id=list(eos) or None, pad_token_id=PAD
    )
    out = model.generate(torch.tensor([request.prompt_ids]), generation_config=config)
    return tuple(out[0, len(request.prompt_ids) :].tolist())


@pytest.mark.parametrize("max_rows", [1, 3, 8, 64])
def test_greedy_equals_generate_token_for_token(llama, make_requests, assert_plain, max_rows):
    stop = (5, 11, 60)
    requests = make_requests(20, greedy=True, stop_ids=stop)
    results = Sampler(llama, PAD, max_rows).run(requests)
    assert [r.token_ids for r in results] == [generate_greedy(llama, q, stop) for q in requests]
    assert 0 < sum(r.finished for r in results) < len(results)  # the test means something only if both happen
    assert_plain(llama, requests, results)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_logprobs_equal_a_plain_forward_at_the_temperature(llama, make_requests, assert_plain, temperature):
    requests = make_requests(30, temperature=temperature)
    results = Sampler(llama, PAD, max_rows=7).run(requests)
    assert [len(r.token_ids) for r in results] == [q.max_new_tokens for q in requests]
    assert_plain(llama, requests, results)


def test_logprobs_are_of_the_whole_distribution_under_top_k_and_top_p(llama, make_requests, assert_plain):
    requests = make_requests(12, top_k=4, top_p=0.8)
    assert_plain(llama, requests, Sampler(llama, PAD).run(requests))


def test_each_row_has_its_own_settings(llama, make_requests, assert_plain, plain_logprobs):
    settings = [
        {"greedy": True},
        {"top_k": 1},
        {"top_p": 1e-6},
        {"temperature": 0.05},
        {"temperature": 3.0},
        {"top_k": 5},
        {"top_p": 0.5, "temperature": 0.7},
        {"stop_ids": tuple(range(3, 50))},
    ]
    requests = [dataclasses.replace(q, **s) for q, s in zip(make_requests(24), settings * 3)]
    results = Sampler(llama, PAD, max_rows=6).run(requests)
    assert_plain(llama, requests, results)
    for request, result in zip(requests, results):
        every = plain_logprobs(llama, request, result)
        if request.top_k == 1 or request.top_p < 1e-3:
            assert every.argmax(-1).tolist() == list(result.token_ids)
        rank = (every > every.gather(1, torch.tensor(result.token_ids)[:, None])).sum(-1)
        if request.top_k:
            assert int(rank.max()) < request.top_k
        assert len(result.token_ids) == request.max_new_tokens or result.finished


def test_f9_f27_any_stop_id_ends_a_reply_and_nothing_follows_it(llama, make_requests):
    stop = (7, 8, 9, 33)
    requests = make_requests(60, stop_ids=stop, temperature=2.0)
    results = Sampler(llama, PAD, max_rows=16).run(requests)
    assert {r.token_ids[-1] for r in results if r.finished} == set(stop)  # every id of the list does it
    for request, result in zip(requests, results):
        *before, last = result.token_ids
        assert not set(before) & set(stop)
        assert result.finished == (last in stop)
        assert result.finished or len(result.token_ids) == request.max_new_tokens
        assert len(result.logprobs) == len(result.token_ids) <= request.max_new_tokens


def test_f9_a_stop_id_in_the_last_allowed_column_counts_as_finished(llama, make_requests):
    sampler = Sampler(llama, PAD)
    for request in make_requests(10, max_new_tokens=6):
        last = sampler.run([request])[0].token_ids[-1]
        again = sampler.run([dataclasses.replace(request, stop_ids=(last,))])[0]
        assert again.finished and again.token_ids[-1] == last
        if len(again.token_ids) == 6:
            break
    else:
        pytest.fail("no reply whose last allowed token comes up there first")


def test_replies_come_in_request_order_and_do_not_depend_on_the_number_of_slots(llama, make_requests):
    requests = make_requests(25, stop_ids=(5,))
    wide, narrow = (Sampler(llama, PAD, max_rows).run(requests) for max_rows in (64, 4))
    assert [r.token_ids for r in wide] == [
        r.token_ids for r in narrow
    ]  # no near-tie among these few; see test_determinism


def test_equal_prompts_share_their_reading_and_differ_by_seed(llama, make_requests, assert_plain):
    prompt = make_requests(1, seed=3)[0].prompt_ids
    requests = make_requests(12, prompt_ids=prompt, max_new_tokens=12)
    results = Sampler(llama, PAD).run(requests)
    assert len({r.token_ids for r in results}) == len(results)
    assert_plain(llama, requests, results)
    same_seed = Sampler(llama, PAD).run([requests[0]] * 3)
    assert len({r.token_ids for r in same_seed}) == 1


def test_a_group_reads_its_prompt_once(llama, make_requests):
    """Counted at the embedding: one pass reads the prompt, all but its last token, for 12 replies; then a token of each row."""
    passes = []
    llama.get_input_embeddings().register_forward_pre_hook(lambda module, args: passes.append(tuple(args[0].shape)))
    prompt = make_requests(1, seed=3)[0].prompt_ids
    Sampler(llama, PAD).run(make_requests(12, prompt_ids=prompt, max_new_tokens=4))
    assert passes[0] == (1, len(prompt) - 1) and all(width == 1 for _, width in passes[1:])
    passes.clear()
    Sampler(llama, PAD).run([*make_requests(6, prompt_ids=prompt), *make_requests(6, prompt_ids=(*prompt, 5))])
    assert sum(rows for rows, width in passes if width > 1) == 2


def test_no_requests_give_no_results(llama):
    assert Sampler(llama, PAD).run([]) == []


def test_run_wants_an_engine_without_submitted_requests(llama, make_requests):
    sampler = Sampler(llama, PAD)
    sampler.submit(make_requests(1)[0])
    with pytest.raises(RuntimeError, match="submitted"):
        sampler.run(make_requests(1))


GOOD = DecodeRequest(prompt_ids=(3, 4), row_seed=1, max_new_tokens=4, stop_ids=(2,))
REFUSED = {
    "empty prompt": ({"prompt_ids": ()}, "prompt_ids"),
    "prompt id": ({"prompt_ids": (3, 97)}, r"prompt_ids.*\[97\]"),
    "F27 foreign stop id": ({"stop_ids": (2, 100_000)}, r"stop_ids.*0 <= id < 97.*\[100000\]"),
    "negative stop id": ({"stop_ids": (-1,)}, r"stop_ids.*\[-1\]"),
    "context": ({"max_new_tokens": 159}, "160.*2 prompt tokens.*159 new tokens"),
    "no new tokens": ({"max_new_tokens": 0}, "max_new_tokens"),
    "temperature 0": ({"temperature": 0.0}, "temperature.*greedy"),
    "temperature nan": ({"temperature": float("nan")}, "temperature"),
    "top_p 0": ({"top_p": 0.0}, "top_p"),
    "top_p above 1": ({"top_p": 1.1}, "top_p"),
    "top_k": ({"top_k": -1}, "top_k"),
    "seed": ({"row_seed": 2**63}, "row_seed"),
    "adapter": ({"adapter": "policy"}, "adapter.*no adapters"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_requests(llama, case):
    fields, message = REFUSED[case]
    sampler = Sampler(llama, PAD)
    with pytest.raises(ValueError, match=message):
        sampler.run([GOOD, dataclasses.replace(GOOD, **fields)])
    with pytest.raises(ConfigError, match=message):
        sampler.submit(dataclasses.replace(GOOD, **fields))
    assert len(sampler.run([GOOD])) == 1  # a refusal leaves nothing behind


def test_the_whole_context_can_be_used(llama, assert_plain):
    request = dataclasses.replace(GOOD, max_new_tokens=158, stop_ids=())
    result = Sampler(llama, PAD).run([request])
    assert len(result[0].token_ids) == 158
    assert_plain(llama, [request], result)


def test_all_problems_are_told_at_once(llama):
    bad = [dataclasses.replace(GOOD, stop_ids=(97,), temperature=-1.0), GOOD, dataclasses.replace(GOOD, prompt_ids=())]
    with pytest.raises(ConfigError) as error:
        Sampler(llama, PAD).run(bad)
    assert [p.where for p in error.value.problems] == ["request 0", "request 0", "request 2"]


def test_a_pad_id_outside_the_vocabulary_is_refused(llama):
    with pytest.raises(ConfigError, match="pad_id"):
        Sampler(llama, 97)


def test_logits_that_are_not_finite_stop_the_run(make_llama, make_requests):
    model = make_llama()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    sampler = Sampler(model, PAD)
    with pytest.raises(InvariantError, match=r"request 0 .*not finite"):
        sampler.run(make_requests(3))
    with torch.no_grad():
        model.model.norm.weight[0] = 1.0
    assert len(sampler.run(make_requests(3))) == 3


@pytest.mark.data
def test_f9_the_real_tiny_model_ends_its_stories_with_id_1(data_dir: Path, assert_plain):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = data_dir / "models" / "stories260K"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token_id == 2  # and the model never says it
    texts = ["The dog was happy and said thank you. They played together all day.", "Tom had a red ball.", "The end"]
    requests = [DecodeRequest(tuple(tokenizer(t).input_ids), 5, 250, (1, 2), greedy=True) for t in texts]
    results = Sampler(model, tokenizer.pad_token_id).run(requests)
    assert_plain(model, requests, results)
    ended = [(q, r) for q, r in zip(requests, results) if r.finished]
    assert ended and all(r.token_ids[-1] == 1 for _, r in ended)
    shortest, response = min(ended, key=lambda pair: len(pair[1].token_ids))
    assert response.token_ids == generate_greedy(model, shortest, (1, 2))


@pytest.mark.parametrize("kind", [{}, {"sliding_window": 16}])
def test_columns_beside_the_rows_change_no_token(make_llama, make_requests, assert_plain, kind):
    """On a GPU a step attends to a multiple of 64 columns: the same tokens, with what is masked beside them; also where rows come
    and go, and where a model's own windows count the columns."""
    if kind:
        from transformers import MistralConfig, MistralForCausalLM

        torch.manual_seed(0)
        sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32}
        heads = {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 160,
            "initializer_range": 0.2,
        }
        model = MistralForCausalLM(MistralConfig(**sizes, **heads, **kind)).eval()
    else:
        model = make_llama()
    requests = [dataclasses.replace(r, greedy=i % 2 == 0) for i, r in enumerate(make_requests(20, stop_ids=(5, 11)))]
    narrow = Sampler(model, PAD, max_rows=7)
    wide = Sampler(model, PAD, max_rows=7, width_multiple=64)
    widths: list[int] = []
    forward = wide._logits
    wide._logits = lambda *args: widths.append(args[4].get_mask_sizes(1, 0)[0]) or forward(*args)
    found = wide.run(requests)
    assert [r.token_ids for r in found] == [r.token_ids for r in narrow.run(requests)]
    assert set(widths[-20:]) <= {64, 128} and len(requests) == len(found)
    assert_plain(model, requests, found)


def test_how_many_rows_take_a_step_together():
    assert [rows_at_once(None, 512, device) for device in ("cpu", "cuda", "meta")] == [64, 256, 64]
    assert [rows_at_once(wanted, 128, "cuda") for wanted in (None, 96, 1000)] == [128, 96, 128]


def test_a_chunk_that_begins_together_needs_no_column_to_spare(llama, make_requests):
    """A key-value buffer as large as its rows, made once and never moved; the same replies as with rows that follow each other."""
    requests = make_requests(12, stop_ids=(5, 11))
    sampler, seen = Sampler(llama, PAD, max_rows=12), []
    forward = sampler._logits
    sampler._logits = lambda *args: seen.append(args[4]) or forward(*args)
    found = sampler.run(requests)
    longest = max(len(r.prompt_ids) for r in requests) + max(r.max_new_tokens for r in requests)
    assert seen[-1].shape == (12, -(-longest // 32) * 32)
    assert [r.token_ids for r in found] == [r.token_ids for r in Sampler(llama, PAD, max_rows=5).run(requests)]
