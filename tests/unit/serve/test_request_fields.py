"""Fields that clients of OpenAI and vLLM send, over a real socket: what each does to a reply, and what is told of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel

from rlhf_ray.serve.api_errors import ApiError
from rlhf_ray.serve.openai_types import ChatRequest, CompareRequest, CompletionRequest
from rlhf_ray.serve.request_body import parse_body

from .conftest import LiveService
from .edges import numeric_fields, told_numeric
from .test_http import HELLO, chat, client, send

MakeLive = Callable[..., LiveService]
ASKED: dict[str, Any] = {"model": "one", "prompt": "Name a bird.", "max_tokens": 12}


def complete(service: LiveService, **fields: Any) -> dict[str, Any]:
    status, _, found = send(service, "POST", "/v1/completions", {**ASKED, **fields})
    assert status == 200, found
    return dict(found)


def tokens_of(service: LiveService, **fields: Any) -> list[int]:
    """Ids of a greedy reply."""
    found = complete(service, temperature=0, logprobs=0, **fields)["choices"][0]
    return list(send(service, "POST", "/tokenize", {"prompt": found["text"], "add_special_tokens": False})[2]["tokens"])


def test_sampling_fields_do_what_they_say(live: MakeLive) -> None:
    """Each against the reply without it; the definitions are held in tests/unit/sampler/test_logits.py."""
    service = live()
    plain = complete(service, temperature=0)["choices"][0]["text"]
    for fields in (
        {"presence_penalty": 2.0},
        {"frequency_penalty": 2.0},
        {"repetition_penalty": 5.0},
    ):
        text = complete(service, temperature=0, max_tokens=40, **fields)["choices"][0]["text"]
        assert text != complete(service, temperature=0, max_tokens=40)["choices"][0]["text"], fields
    (a,) = send(service, "POST", "/tokenize", {"prompt": "a", "add_special_tokens": False})[2]["tokens"]
    assert complete(service, temperature=0, logit_bias={str(a): 100})["choices"][0]["text"].replace(" ", "") == "a" * 12
    assert complete(service, seed=3, min_p=1.0)["choices"][0]["text"] == plain
    ended = complete(service, logit_bias={str(a): 100}, stop_token_ids=[a])["choices"][0]
    assert (ended["text"], ended["finish_reason"]) == ("", "stop")
    late = complete(service, logit_bias={str(a): 100}, stop_token_ids=[a], min_tokens=3)
    assert late["usage"]["completion_tokens"] == 4 and late["choices"][0]["finish_reason"] == "stop"
    eos = {"logit_bias": {"2": 100}}
    assert complete(service, **eos)["usage"]["completion_tokens"] == 1
    assert complete(service, **eos, ignore_eos=True)["usage"]["completion_tokens"] == 12
    assert complete(service, **eos, min_tokens=5)["usage"]["completion_tokens"] == 6
    longer = complete(service, **eos, min_tokens=20, max_tokens=None)  # the default is 16
    assert longer["usage"]["completion_tokens"] == 20


def test_a_stop_string_is_looked_for_behind_min_tokens(live: MakeLive) -> None:
    service = live()
    (a,) = send(service, "POST", "/tokenize", {"prompt": "a", "add_special_tokens": False})[2]["tokens"]
    only_a = {"logit_bias": {str(a): 100}, "stop": "a"}
    assert complete(service, **only_a)["choices"][0]["text"] == ""
    found = complete(service, **only_a, min_tokens=4)
    assert found["choices"][0]["text"].count("a") == 4 and found["choices"][0]["finish_reason"] == "stop"


def test_requests_with_and_without_fields_in_one_batch_are_as_alone(live: MakeLive) -> None:
    service = live()
    asked: list[dict[str, Any]] = [
        {},
        {"presence_penalty": 1.0},
        {"logit_bias": {"70": 5}},
        {"min_p": 0.2, "top_k": 5},
        {"min_tokens": 10, "repetition_penalty": 1.3},
    ]
    asked = [{**fields, "seed": i} for i, fields in enumerate(asked)] * 2
    alone = [complete(service, **fields)["choices"] for fields in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        together = [done.result()["choices"] for done in [pool.submit(complete, service, **f) for f in asked]]
    assert alone == together


TOGETHER: list[dict[str, Any]] = [
    {"presence_penalty": 5e-324, "frequency_penalty": -5e-324},
    {"repetition_penalty": 0.01, "temperature": 0.01, "presence_penalty": 2, "frequency_penalty": -2},
    {"repetition_penalty": 100, "temperature": 2},
    {"logit_bias": {str(i): -100 for i in range(250)}, "temperature": 0.01},
    {"top_k": 1_000_000, "top_p": 1 - 1e-16, "min_p": 1 - 1e-16},
]
NOT_BY_TYPE = frozenset(
    ("max_tokens", "max_completion_tokens", "n", "best_of", "min_tokens", "length_penalty", "stop_token_ids", "prompt")
)
"""Bounded by the service's limits, the model's vocabulary or each other: what their types allow is answered 200 or 400."""
BESIDE: dict[str, dict[str, Any]] = {"top_logprobs": {"logprobs": True}}
"""What a field needs beside it."""


def body_of(model: type[BaseModel], name: str, value: Any) -> dict[str, Any]:
    asked: dict[str, Any] = {"model": "one", "max_tokens": 3, **BESIDE.get(name, {})}
    asked |= {"messages": HELLO} if model is ChatRequest else {"prompt": "Name a bird."}
    if name == "max_completion_tokens":
        del asked["max_tokens"]
    return {**asked, name: value}


def cases(model: type[BaseModel], inside: bool) -> list[tuple[str, dict[str, Any]]]:
    """(field, body) for every numeric field of `model`, with values that its type allows, or does not."""
    return [
        (name, body_of(model, name, number.wrap(value)))
        for name, own in numeric_fields(model).items()
        for number in own
        for value in number.values()
        if number.allows(value) is inside
    ]


@pytest.mark.parametrize("model", [ChatRequest, CompletionRequest, CompareRequest])
def test_every_numeric_field_has_its_edges(model: type[BaseModel]) -> None:
    """By the JSON schema of the request, which is another account of its types than the one that the cases come from."""
    schema = model.model_json_schema()
    told = {name for name, part in schema["properties"].items() if told_numeric(part)}
    assert told == numeric_fields(model).keys() and {"temperature", "top_k", "logit_bias", "seed"} <= told
    inner = {
        (name, field)
        for name, part in schema["$defs"].items()
        for field, own in part.get("properties", {}).items()
        if told_numeric(own)
    }
    assert inner <= {("ToolCall", "index")}, "a number within a field: this one is not read"
    assert {name for name, _ in cases(model, True)} == told
    bounded = {name for name, own in numeric_fields(model).items() if any(number.bounds for number in own)}
    assert {name for name, _ in cases(model, False)} == bounded


@pytest.mark.parametrize("model", [ChatRequest, CompletionRequest])
def test_numbers_beyond_the_bounds_of_their_field_are_refused(model: type[BaseModel]) -> None:
    for name, body in cases(model, inside=False):
        with pytest.raises(ApiError) as caught:
            parse_body(json.dumps(body).encode(), model)
        assert caught.value.status == 400 and (caught.value.param or "").partition(".")[0] == name, body


def test_fields_at_the_edges_of_float32_fail_nobody_in_the_batch(live: MakeLive) -> None:
    service = live()
    innocent = {"seed": 5}
    right = complete(service, **innocent)["choices"]
    own = set(ChatRequest.model_fields) - set(CompletionRequest.model_fields)
    asked = [("/v1/completions", name, body) for name, body in cases(CompletionRequest, inside=True)]
    asked += [("/v1/chat/completions", name, body) for name, body in cases(ChatRequest, inside=True) if name in own]
    asked += [("/v1/completions", "", {**ASKED, **fields}) for fields in TOGETHER]
    with ThreadPoolExecutor(8) as pool:
        edges = [pool.submit(send, service, "POST", path, body) for path, _, body in asked]
        others = [pool.submit(complete, service, **innocent) for _ in range(8)]
        statuses = [done.result()[0] for done in edges]
        assert all(done.result()["choices"] == right for done in others)
    wrong = [
        (body, status)
        for (_, name, body), status in zip(asked, statuses)
        if status not in ((200, 400) if name in NOT_BY_TYPE else (200,))
    ]
    assert wrong == [] and service.replica.engine.failures == 0
    for name in NOT_BY_TYPE - {"length_penalty", "prompt"}:
        assert 200 in {status for (_, field, _), status in zip(asked, statuses) if field == name}, name


def test_log_probabilities_are_the_models_own_whatever_is_done_to_its_logits(live: MakeLive, base_dir: Path) -> None:
    """vLLM's raw_logprobs: temperature, penalties and bias are not in them (were: at the temperature)."""
    from transformers import AutoModelForCausalLM

    service, model = live(), AutoModelForCausalLM.from_pretrained(base_dir)
    ids = send(service, "POST", "/tokenize", {"prompt": "Hello"})[2]["tokens"]
    fields: dict[str, Any] = {"temperature": 0.3, "presence_penalty": 1.0, "logit_bias": {"70": 3}, "seed": 1}
    found = complete(service, model="base", prompt=ids, logprobs=4, **fields)["choices"][0]["logprobs"]
    first = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    best = first.topk(4).values.tolist()
    assert sorted(found["top_logprobs"][0].values(), reverse=True)[:4] == pytest.approx(best, abs=1e-4)
    assert found["token_logprobs"][0] == pytest.approx(found["top_logprobs"][0][found["tokens"][0]])
    assert all(token in others for token, others in zip(found["tokens"], found["top_logprobs"]))


def test_top_logprobs_of_a_chat_in_one_piece_and_in_a_stream(live: MakeLive) -> None:
    ai = client(live())
    asked: dict[str, Any] = {"model": "one", "messages": HELLO, "seed": 5, "max_tokens": 10, "logprobs": True}
    whole = ai.chat.completions.create(**asked, top_logprobs=3).choices[0].logprobs.content
    assert all(len(token.top_logprobs) == 3 for token in whole)
    assert all(a.logprob >= b.logprob for token in whole for a, b in zip(token.top_logprobs, token.top_logprobs[1:]))
    greedy = ai.chat.completions.create(**{**asked, "temperature": 0}, top_logprobs=1).choices[0].logprobs.content
    assert [(t.token, t.logprob, t.bytes) for t in greedy] == [
        (o.token, o.logprob, o.bytes) for t in greedy for o in t.top_logprobs
    ]
    parts = list(ai.chat.completions.create(**asked, top_logprobs=3, stream=True))
    streamed = [token for part in parts if part.choices[0].logprobs for token in part.choices[0].logprobs.content]
    assert streamed == whole
    text = ai.completions.create(model="one", prompt="Hi", seed=1, max_tokens=6, logprobs=2)
    pieces = list(ai.completions.create(model="one", prompt="Hi", seed=1, max_tokens=6, logprobs=2, stream=True))
    told = [other for piece in pieces if piece.choices[0].logprobs for other in piece.choices[0].logprobs.top_logprobs]
    assert told == text.choices[0].logprobs.top_logprobs


def test_the_bytes_of_log_probabilities_join_up_to_the_reply(live: MakeLive) -> None:
    """Also of characters that take several tokens."""
    service = live()
    replies = [chat(service, logprobs=True, seed=seed, max_tokens=60)[1]["choices"][0] for seed in range(6)]
    pieces = [b"".join(bytes(token["bytes"]) for token in reply["logprobs"]["content"]) for reply in replies]
    for reply, raw in zip(replies, pieces):
        text = reply["message"]["content"]
        assert raw == text.encode() or ("\ufffd" in text and raw.decode("utf-8", "replace") == text)


def test_prompt_logprobs_as_vllm_tells_them(live: MakeLive, base_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    service, model = live(), AutoModelForCausalLM.from_pretrained(base_dir)
    ids = send(service, "POST", "/tokenize", {"prompt": "a b"})[2]["tokens"]
    right = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    for fields in ({"max_tokens": 0}, {"max_tokens": 3, "temperature": 0.5}):
        told = complete(service, model="base", prompt="a b", prompt_logprobs=2, **fields)["choices"][0]
        table = told["prompt_logprobs"]
        assert table[0] is None and len(table) == len(ids)
        for place, token, row in zip(table[1:], ids[1:], right):
            own = place[str(token)]
            assert own["logprob"] == pytest.approx(row[token].item(), abs=1e-4)
            assert own["rank"] == int((row > row[token]).sum()) + 1
            assert 2 <= len(place) <= 3 and {"decoded_token", "logprob", "rank"} == own.keys()
            assert [p["rank"] for p in place.values()][:2] == [1, 2]
    assert (
        len(complete(service, prompt="a b", prompt_logprobs=0, max_tokens=1)["choices"][0]["prompt_logprobs"][1]) == 1
    )
    found = chat(service, prompt_logprobs=1)[1]
    assert found["prompt_logprobs"][0] is None and len(found["prompt_logprobs"]) > 3
    assert chat(service, prompt_logprobs=1, stream=True)[0] == 400
    asked = {"models": ["base", "one"], "messages": HELLO, "max_tokens": 1, "prompt_logprobs": 1}
    compared = send(service, "POST", "/v1/compare", asked)[2]["choices"]
    assert [c["prompt_logprobs"] for c in compared] == [
        chat(service, model=model, prompt_logprobs=1, max_tokens=1)[1]["prompt_logprobs"] for model in ("base", "one")
    ], "a comparison computed them and told nothing"


def test_the_kl_to_the_base_is_at_the_temperature_that_was_sampled_at(live: MakeLive) -> None:
    service = live()
    asked: dict[str, Any] = {"kl": True, "seed": 5, "max_tokens": 12, "temperature": 0.5}
    assert chat(service, model="base", **asked)[1]["choices"][0]["kl"] == 0
    half, one = (chat(service, model="one", **{**asked, "temperature": t})[1]["choices"][0]["kl"] for t in (0.5, 1.0))
    assert math.isfinite(half) and half != one


def test_lists_longer_than_the_places_are_queued(live: MakeLive) -> None:
    """20 prompts x 3 replies on 4 places (were refused: more than places and queue together), as each prompt alone."""
    service = live(limits={"max_batch_rows": 4, "max_waiting_rows": 2})
    prompts = [f"Name {i} birds." for i in range(20)]
    found = complete(service, prompt=prompts, n=3, temperature=0)
    assert [choice["index"] for choice in found["choices"]] == list(range(60))
    texts = [choice["text"] for choice in found["choices"]]
    alone = [complete(service, prompt=prompt, temperature=0)["choices"][0]["text"] for prompt in prompts[::7]]
    assert texts[::21] == alone and texts[0:60:3] == texts[1:60:3] == texts[2:60:3]
    assert service.replica.places_taken == 0 and service.replica.engine.running == 0


def test_best_of_returns_the_likeliest(live: MakeLive) -> None:
    service = live()
    every = complete(service, n=6, seed=5, logprobs=0)
    means = [sum(p := c["logprobs"]["token_logprobs"]) / len(p) for c in every["choices"]]
    ranked = [every["choices"][i]["text"] for i in sorted(range(6), key=lambda i: -means[i])]
    best = complete(service, n=2, best_of=6, seed=5)
    assert [choice["text"] for choice in best["choices"]] == ranked[:2]
    assert [choice["index"] for choice in best["choices"]] == [0, 1] and best["usage"] == every["usage"]
    two = complete(service, prompt=["Name a bird.", "Hello"], n=1, best_of=3, seed=5)["choices"]
    assert len(two) == 2
    assert send(service, "POST", "/v1/completions", {**ASKED, "best_of": 3, "stream": True})[0] == 400
    assert send(service, "POST", "/v1/completions", {**ASKED, "best_of": 1, "n": 2})[0] == 400


def test_best_of_does_not_prefer_replies_that_a_stop_string_empties(live: MakeLive) -> None:
    """A reply without text had the mean 0, above every other one. It counts the tokens that ended it."""
    service, first = live(), dict[str, float]()
    for choice in complete(service, n=6, seed=5, logprobs=0)["choices"]:
        first[choice["text"][:1]] = choice["logprobs"]["token_logprobs"][0]
    stop = min(first, key=lambda text: first[text])
    every = complete(service, n=6, seed=5, logprobs=0, stop=stop)["choices"]
    texts = [choice["text"] for choice in every]
    assert stop.strip() and "" in texts and any(texts)
    means = [sum(p := c["logprobs"]["token_logprobs"]) / len(p) for c in every if c["text"]]
    assert max(means) > first[stop] + 0.1, "what is emptied is the less likely"
    assert complete(service, n=1, best_of=6, seed=5, stop=stop)["choices"][0]["text"] in set(texts) - {""}


def test_a_prompt_that_is_too_long_says_what_client_libraries_look_for(live: MakeLive) -> None:
    status, found = chat(live(), messages=[{"role": "user", "content": "x" * 5000}])
    assert status == 400 and found["error"]["code"] == "context_length_exceeded"
    assert "This model's maximum context length is" in found["error"]["message"]


def test_a_request_id_names_a_request_and_an_idempotency_key_makes_it_one(live: MakeLive) -> None:
    """`X-Request-Id` made every sample of a client that keeps one id the same."""
    service = live()
    asked = {"model": "one", "messages": HELLO, "max_tokens": 12}

    def ids(header: str) -> set[str]:
        return {send(service, "POST", "/v1/chat/completions", asked, {header: "a"})[2]["id"] for _ in range(3)}

    assert len(ids("x-request-id")) == 3
    assert len(ids("idempotency-key")) == 1
    header, stream = {"idempotency-key": "a"}, {**asked, "stream": True}
    streams = {send(service, "POST", "/v1/chat/completions", stream, header)[2].split('"')[3] for _ in range(2)}
    assert len(streams) == 2, "written anew, as the document says"
    document = send(service, "GET", "/openapi.json")[2]
    assert "Idempotency-Key" in document["paths"]["/v1/chat/completions"]["post"]["summary"]
    lines = (Path(service.config.output_dir) / "access.jsonl").read_text().splitlines()
    assert any(json.loads(line)["request_id"] == "a" for line in lines)


def test_tokenize_and_detokenize(live: MakeLive) -> None:
    service = live()
    found = send(service, "POST", "/tokenize", {"model": "one", "prompt": "a b", "return_token_strs": True})[2]
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"]) == 4 and found["max_model_len"] > 100
    bare = send(service, "POST", "/tokenize", {"prompt": "a b", "add_special_tokens": False})[2]
    assert bare["tokens"] == found["tokens"][1:] and bare["token_strs"] is None
    assert send(service, "POST", "/detokenize", {"tokens": bare["tokens"]})[2] == {"prompt": "a b"}
    info = send(service, "GET", "/tokenizer_info")[2]
    assert (info["bos_token"], info["eos_token"], info["chat_template"]) == ("<s>", "</s>", None)
    turns = send(service, "POST", "/tokenize", {"messages": HELLO})[2]
    asked = {"model": "base", "messages": HELLO, "max_tokens": 1}
    used = send(service, "POST", "/v1/chat/completions", asked)[2]["usage"]
    assert turns["count"] == used["prompt_tokens"]
    assert send(service, "POST", "/tokenize", {"model": "nobody", "prompt": "a"})[0] == 404
    assert send(service, "POST", "/tokenize", {})[0] == 400
    assert send(service, "POST", "/detokenize", {"tokens": [99_999]})[0] == 400


def test_health_version_and_head(live: MakeLive) -> None:
    service = live()
    assert send(service, "GET", "/health")[::2] == (200, "")
    assert send(service, "GET", "/version")[2].keys() == {"version"}
    for path in ("/", "/health", "/version", "/v1/models", "/v1/models/one", "/openapi.json"):
        status, headers, body = send(service, "HEAD", path)
        assert (status, body) == (200, ""), path
        whole = send(service, "GET", path)[1]
        assert headers.get("content-type") == whole.get("content-type")


def test_pages_of_allowed_origins_may_use_the_service(live: MakeLive) -> None:
    closed, opened = live(), live(allowed_origins=["https://app.example.org"])
    origin, other = {"origin": "https://app.example.org"}, {"origin": "https://evil.example"}
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    assert send(closed, "GET", "/v1/models", headers=origin)[0] == 403
    assert send(closed, "OPTIONS", "/v1/completions", headers={**origin, **asks})[0] == 403
    status, headers, _ = send(opened, "OPTIONS", "/v1/completions", headers={**origin, **asks})
    assert status == 200 and headers["access-control-allow-origin"] == origin["origin"]
    status, headers, _ = send(opened, "GET", "/v1/models", headers=origin)
    assert status == 200 and headers["access-control-allow-origin"] == origin["origin"]
    for method in ("GET", "OPTIONS"):
        assert send(opened, method, "/v1/models", headers={**other, **asks})[0] == 403
    assert send(opened, "GET", "/v1/models", headers={**origin, "host": "evil.example"})[0] == 403


def test_the_openapi_document_names_every_route_and_field(live: MakeLive) -> None:
    """Answers are checked against it by schemathesis (tests/clients.py)."""
    service = live()
    document = send(service, "GET", "/openapi.json")[2]
    routes = {(r.path.replace(":path", ""), m) for r in service.api.app.app.routes for m in r.methods}  # type: ignore[attr-defined]
    told = {(path, method.upper()) for path, methods in document["paths"].items() for method in methods}
    assert {r for r in routes if r[1] != "HEAD" and r[0] not in ("/", "/openapi.json")} == told
    schemas = document["components"]["schemas"]
    for model in (ChatRequest, CompletionRequest):
        assert schemas[model.__name__]["properties"].keys() == model.model_fields.keys()
    references = set(json.dumps(document).split('"#/components/schemas/')[1:])
    assert {text.partition('"')[0] for text in references} <= schemas.keys()
    assert "security" not in document
