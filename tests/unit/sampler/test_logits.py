"""Penalties, bias, min_tokens, min_p and grammars: from their definitions, and every row of a mixed batch as it is alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor

from rlhf_ray.errors import ConfigError
from rlhf_ray.sampler.engine import Sampler
from rlhf_ray.sampler.logits import LogitsOptions
from rlhf_ray.sampler.requests import DecodeRequest, DecodeResult
from rlhf_ray.sampler.sampling import keep_min_p

Made = dict[int, DecodeResult]


class OnlyEven:
    """A grammar of even ids that may end after three tokens."""

    def matcher(self, stop_ids: Sequence[int]) -> OnlyEven:
        made = OnlyEven()
        made.stop_ids, made.count = list(stop_ids), 0  # type: ignore[attr-defined]
        return made

    def allowed(self, vocabulary: int) -> Tensor:
        found = torch.arange(vocabulary) % 2 == 0
        found[self.stop_ids] = self.count >= 3  # type: ignore[attr-defined]
        return found

    def accept(self, token_id: int) -> None:
        assert token_id % 2 == 0
        self.count += 1  # type: ignore[attr-defined]


def by_definition(model: Any, request: DecodeRequest, reply: Sequence[int]) -> list[Tensor]:
    """The logits of every place of a reply as vLLM's documents define the fields, in plain Python over one forward pass."""
    options = request.logits or LogitsOptions()
    with torch.no_grad():
        raw = model(torch.tensor([[*request.prompt_ids, *reply]])).logits[0, len(request.prompt_ids) - 1 : -1].float()
    found = []
    for t, row in enumerate(raw):
        values = row.tolist()
        for token_id, bias in options.logit_bias:
            values[token_id] += bias
        so_far = list(reply[:t])
        for i in range(len(values)):
            if i in so_far or i in request.prompt_ids:
                values[i] = (
                    values[i] / options.repetition_penalty if values[i] > 0 else values[i] * options.repetition_penalty
                )
            values[i] -= options.frequency_penalty * so_far.count(i) + options.presence_penalty * (i in so_far)
            if t < options.min_tokens and i in request.stop_ids:
                values[i] = -math.inf
        found.append(torch.tensor(values))
    return found


FIELDS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "presence": {"logits": LogitsOptions(presence_penalty=1.5)},
    "frequency": {"logits": LogitsOptions(frequency_penalty=-1.0)},
    "repetition": {"logits": LogitsOptions(repetition_penalty=1.7)},
    "bias": {"logits": LogitsOptions(logit_bias=((5, 4.0), (7, -100.0)))},
    "min_tokens": {"logits": LogitsOptions(min_tokens=10), "stop_ids": tuple(range(0, 90))},
    "all": {
        "logits": LogitsOptions(0.5, 0.5, 1.2, ((9, 2.0),), 4),
        "stop_ids": (9, 11),
        "min_p": 0.05,
        "top_k": 20,
        "top_p": 0.9,
    },
    "min_p": {"min_p": 0.3},
    "grammar": {"logits": LogitsOptions(grammar=OnlyEven()), "stop_ids": (4, 6)},
}
EDGES: dict[str, dict[str, Any]] = {
    "min_p zero in float32": {"min_p": 1e-300},
    "min_p 1": {"min_p": 1.0},
    "largest penalties": {"logits": LogitsOptions(2.0, 2.0, 100.0)},
    "smallest penalties": {"logits": LogitsOptions(-2.0, -2.0, 0.01)},
    "denormal penalties": {"logits": LogitsOptions(5e-324, 1e-45, 1 + 1e-16)},
    "largest bias": {"logits": LogitsOptions(logit_bias=tuple((i, 100.0) for i in range(97)))},
    "smallest bias": {"logits": LogitsOptions(logit_bias=tuple((i, -100.0) for i in range(97)))},
}


def requests_of(
    make_requests: Callable[..., list[DecodeRequest]], fields: dict[str, dict[str, Any]]
) -> list[DecodeRequest]:
    """Two rows for each entry, a greedy one and a sampled one."""
    plain = make_requests(2 * len(fields), seed=4, max_new_tokens=24, raw_logprobs=True, temperature=0.8)
    rows = zip(plain[::2], plain[1::2], fields.values())
    return [r for a, b, f in rows for r in (replace(a, **f), replace(b, **f, greedy=True))]


def test_every_row_of_a_mixed_batch_is_as_it_is_alone(llama: Any, make_requests: Any) -> None:
    requests = requests_of(make_requests, FIELDS | EDGES)
    together = Sampler(llama, 0, max_rows=7).run(requests)  # rows come and go: their counts are made again
    apart = [Sampler(llama, 0).run([request])[0] for request in requests]
    assert [r.token_ids for r in together] == [r.token_ids for r in apart]
    assert all(len(result.token_ids) > 1 and all(map(math.isfinite, result.logprobs)) for result in together)


def test_rows_that_ask_for_nothing_are_left_bit_for_bit(llama: Any, make_requests: Any) -> None:
    plain = make_requests(6, seed=4, max_new_tokens=24)
    asking = [
        replace(r, logits=LogitsOptions(0.5, 0.5, 1.3, ((3, 1.0),), 2), min_p=0.1) for r in make_requests(6, seed=9)
    ]
    neutral = [replace(r, logits=LogitsOptions(), min_p=0.0) for r in make_requests(6, seed=9)]

    def beside(others: list[DecodeRequest]) -> list[DecodeResult]:
        limited = [replace(r, max_new_tokens=24) for r in others]  # so that rows come and go as in the other batch
        return Sampler(llama, 0).run([*plain, *limited])[:6]

    assert (
        beside(asking)
        == beside(neutral)
        == Sampler(llama, 0).run([*plain, *[replace(r, logits=None, max_new_tokens=24) for r in neutral]])[:6]
    )


@pytest.mark.parametrize("name", [name for name in FIELDS if name != "grammar"])
def test_greedy_tokens_follow_the_definition(llama: Any, make_requests: Any, name: str) -> None:
    request = replace(make_requests(1, seed=4, max_new_tokens=24)[0], greedy=True, **FIELDS[name])
    reply = Sampler(llama, 0).run([request])[0].token_ids
    for token, logits in zip(reply, by_definition(llama, request, reply), strict=True):
        assert logits[token] > logits.max() - 1e-4
    others = Sampler(llama, 0).run([replace(request, logits=None, stop_ids=())])[0].token_ids
    assert (reply == others) == (name in ("nothing", "min_p"))


def test_penalties_by_hand() -> None:
    """Logits 2, -2, 1, 0; token 0 in the prompt, token 1 twice in the reply. Repetition 2: 2 / 2 = 1, -2 * 2 = -4; then
    frequency 0.5: -4 - 2 * 0.5 = -5; then presence 0.25: -5.25."""
    from rlhf_ray.sampler.logits import LogitsPlan
    from rlhf_ray.sampler.rows import DecodeRow

    row = DecodeRow(0, DecodeRequest((0,), 0, 9, (), logits=LogitsOptions(0.25, 0.5, 2.0)), frozenset(), [1, 1])
    plan = LogitsPlan.of([row], torch.device("cpu"))
    assert plan is not None
    assert plan.apply(torch.tensor([[2.0, -2.0, 1.0, 0.0]])).tolist() == [[1.0, -5.25, 1.0, 0.0]]
    plan.advance(torch.tensor([3]))
    assert plan.apply(torch.tensor([[2.0, -2.0, 1.0, 0.0]])).tolist() == [[1.0, -5.25, 1.0, -0.75]]


def test_repetition_penalty_and_min_p_equal_transformers(llama: Any) -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 3
    ids = torch.tensor([[3, 8, 3]] * 4)
    from rlhf_ray.sampler.logits import LogitsPlan
    from rlhf_ray.sampler.rows import DecodeRow

    asked = DecodeRequest((3, 8), 0, 9, (), logits=LogitsOptions(repetition_penalty=1.4))
    plan = LogitsPlan.of([DecodeRow(i, asked, frozenset(), [3]) for i in range(4)], torch.device("cpu"))
    assert plan is not None
    assert torch.equal(plan.apply(logits), RepetitionPenaltyLogitsProcessor(1.4)(ids, logits.clone()))
    for p in (0.0, 0.02, 0.5, 1.0):
        ours = keep_min_p(logits.log_softmax(-1), torch.full((4,), math.log(p) if p else -math.inf))
        kept = MinPLogitsWarper(p)(None, logits).isfinite()
        assert torch.equal(ours.isfinite(), kept) and kept.any(-1).all()


def test_reported_log_probabilities_are_the_models_own(llama: Any, make_requests: Any, plain_logprobs: Any) -> None:
    """raw: temperature 1, before penalties and truncation, as vLLM's `raw_logprobs`; and so are those of the likeliest tokens."""
    fields = {"logits": LogitsOptions(1.0, 1.0, 1.5), "min_p": 0.1, "temperature": 0.5, "raw_logprobs": True}
    request = replace(make_requests(1, seed=4, max_new_tokens=24)[0], top_logprobs=3, **fields)
    sampler, events = Sampler(llama, 0), []
    sampler.submit(request)
    while sampler.busy:
        events += sampler.step()
    reply = DecodeResult(tuple(e.token_id for e in events), tuple(e.logprob for e in events), False)
    right = plain_logprobs(llama, replace(request, temperature=1.0), reply)
    torch.testing.assert_close(
        torch.tensor(reply.logprobs), right.gather(1, torch.tensor(reply.token_ids)[:, None])[:, 0], atol=1e-4, rtol=0
    )
    best = right.topk(3)
    assert [[i for i, _ in e.top] for e in events] == best.indices.tolist()
    torch.testing.assert_close(torch.tensor([[p for _, p in e.top] for e in events]), best.values, atol=1e-4, rtol=0)


def test_a_grammar_is_kept_to_exactly_and_a_row_goes_on_within_it(llama: Any, make_requests: Any) -> None:
    request = replace(make_requests(1, seed=4)[0], max_new_tokens=12, **FIELDS["grammar"])
    whole = Sampler(llama, 0).run([request])[0]
    assert all(i % 2 == 0 for i in whole.token_ids) and len(whole.token_ids) >= 4
    again = Sampler(llama, 0).run([replace(request, begun=whole.token_ids[:2])])[0]
    assert again.token_ids == whole.token_ids


def test_a_row_without_any_token_left_fails_alone(llama: Any, make_requests: Any) -> None:
    class Nothing(OnlyEven):
        def allowed(self, vocabulary: int) -> Tensor:
            return torch.zeros(vocabulary, dtype=torch.bool)

        def matcher(self, stop_ids: Sequence[int]) -> OnlyEven:
            return Nothing()

    sampler = Sampler(llama, 0)
    good = sampler.submit(make_requests(1, seed=4, max_new_tokens=5)[0])
    bad = sampler.submit(replace(make_requests(1, seed=5)[0], logits=LogitsOptions(grammar=Nothing())))
    events = []
    while sampler.busy:
        events += sampler.step()
    assert [e.end for e in events if e.request_id == bad] == ["error"]
    assert [e.end for e in events if e.request_id == good] == [None] * 4 + ["length"]


def test_what_is_out_of_range_is_told(llama: Any, make_requests: Any) -> None:
    request = make_requests(1)[0]
    for fields in ({"min_p": 1.5}, {"logits": LogitsOptions(logit_bias=((97, 1.0),))}):
        with pytest.raises(ConfigError, match=r"min_p|logit_bias"):
            Sampler(llama, 0).submit(replace(request, **fields))
