"""The public application over a real socket: the official client, every bad input, keys, limits, preferences."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from starlette.requests import ClientDisconnect

from rlhf_ray.config import DataConfig
from rlhf_ray.data.records import read_rows
from rlhf_ray.serve import request_body
from rlhf_ray.serve.api_errors import ApiError
from rlhf_ray.serve.api_keys import add_key, revoke_key
from rlhf_ray.serve.openai_types import ChatRequest, CompareRequest, CompletionRequest
from rlhf_ray.serve.request_body import parse_body

from .conftest import LiveService

HELLO = [{"role": "user", "content": "Name a bird."}]
MakeLive = Callable[..., LiveService]


def client(service: LiveService, key: str = "none", **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key=key, **{"max_retries": 0, **options})


def send(
    service: LiveService, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], Any]:
    """(status, headers, JSON or text)."""
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=30)
    data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    kind = {"content-type": "application/json"} if data is not None else {}
    connection.request(method, path, data, {**kind, **(headers or {})})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    try:
        found = json.loads(text)
    except ValueError:
        found = text
    return response.status, {k.lower(): v for k, v in response.getheaders()}, found


def chat(service: LiveService, **fields: Any) -> tuple[int, Any]:
    status, _, found = send(service, "POST", "/v1/chat/completions", {"model": "base", "messages": HELLO, **fields})
    return status, found


def test_the_official_client_works_unchanged(live: MakeLive) -> None:
    service = live()
    ai = client(service)
    names = [model.id for model in ai.models.list()]
    assert names[:4] == ["base", "judge", "one", "two"]
    assert ai.models.retrieve("one").model_extra["parent"] == "base"  # type: ignore[index]
    whole = ai.chat.completions.create(
        model="one", messages=HELLO, seed=5, n=2, logprobs=True, max_completion_tokens=20
    )  # type: ignore[call-overload]
    assert len(whole.choices) == 2 and whole.usage.completion_tokens <= 40 and whole.model == "one"
    assert whole.choices[0].finish_reason in ("stop", "length") and len(whole.choices[0].logprobs.content) <= 20
    assert whole.system_fingerprint.split("/")[1].startswith("one@v0-")
    chunks = list(
        ai.chat.completions.create(  # type: ignore[call-overload]
            model="one", messages=HELLO, seed=5, n=2, max_tokens=20, stream=True, stream_options={"include_usage": True}
        )
    )
    texts = ["", ""]
    for chunk in chunks[:-1]:
        assert chunk.usage is None and chunk.id == chunks[0].id
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    ids = [1, 60, 70, 80]
    texts = ai.completions.create(model="two", prompt=[ids, ids], max_tokens=5, temperature=0, logprobs=0)  # type: ignore[arg-type]
    assert texts.choices[0].text == texts.choices[1].text and len(texts.choices[0].logprobs.token_logprobs) == 5  # type: ignore[union-attr,arg-type]
    scored = ai.chat.completions.create(model="two", messages=HELLO, extra_body={"reward": "judge", "kl": True})  # type: ignore[call-overload]
    assert {"reward", "kl"} <= scored.choices[0].model_extra.keys()


def test_log_probabilities_join_up_to_the_reply(live: MakeLive) -> None:
    """Texts, bytes and offsets of the tokens, in one piece and in a stream; the token that ended a reply is not among them."""
    ai = client(live())
    asked: dict[str, Any] = {"model": "one", "seed": 5, "max_tokens": 20}
    chat = ai.chat.completions.create(messages=HELLO, logprobs=True, **asked).choices[0]  # type: ignore[call-overload]
    tokens = chat.logprobs.content
    assert "".join(token.token for token in tokens) == chat.message.content
    text = ai.completions.create(prompt="Hello", logprobs=0, **asked).choices[0]
    starts = [*text.logprobs.text_offset, len(text.text)]
    assert [text.text[a:b] for a, b in pairwise(starts)] == text.logprobs.tokens
    pieces = list(ai.completions.create(prompt="Hello", logprobs=0, stream=True, **asked))
    streamed = [piece.choices[0].logprobs for piece in pieces if piece.choices[0].logprobs is not None]
    assert [offset for part in streamed for offset in part.text_offset] == text.logprobs.text_offset
    assert [token for part in streamed for token in part.tokens] == text.logprobs.tokens
    parts = list(ai.chat.completions.create(messages=HELLO, logprobs=True, stream=True, **asked))  # type: ignore[call-overload]
    listed = [token for part in parts if part.choices[0].logprobs for token in part.choices[0].logprobs.content]
    assert [(token.token, token.bytes) for token in listed] == [(token.token, token.bytes) for token in tokens]


def _entries(text: str, entry: str, behind: str = "") -> bytes:
    """A body of 980 kB: `text`, a list of very many entries, `behind`."""
    return (text + ",".join([entry] * ((980_000 - len(text)) // (len(entry) + 1))) + "]" + behind).encode()


LONGEST_HELD_S = 0.1
"""Processor time that one request may take of the event loop at a stretch."""
LONG_FAULTS: list[tuple[str, type[Any], bytes]] = [
    ("ids, then texts", CompletionRequest, _entries('{"model":"base","prompt":[1,', '""', "}")),
    ("texts, then ids", CompletionRequest, _entries('{"model":"base","prompt":["a",', "1", "}")),
    ("empty lists", CompletionRequest, _entries('{"model":"base","prompt":[', "[]", "}")),
    ("lists of texts", CompletionRequest, _entries('{"model":"base","prompt":[[1],', '[""]', "}")),
    ("messages without a field", ChatRequest, _entries('{"model":"base","messages":[', "{}", "}")),
    ("parts", ChatRequest, _entries('{"model":"base","messages":[{"role":"user","content":[', "{}", "}]}")),
    ("models", CompareRequest, _entries('{"prompt":"a","models":[', "0", "}")),
]


@pytest.mark.parametrize(("model", "body"), [row[1:] for row in LONG_FAULTS], ids=[row[0] for row in LONG_FAULTS])
def test_a_long_body_of_faults_is_refused_at_the_first(model: type[Any], body: bytes) -> None:
    """Each entry was tried in every form and every fault was kept: 2 to 4 s in which no other client was answered. Now reading the
    JSON is all that it costs."""

    def cost() -> float:
        started = time.thread_time()  # of the processor: other work on the machine is not in it
        with pytest.raises(ApiError) as caught:
            parse_body(body, model)
        spent = time.thread_time() - started
        assert caught.value.status == 400 and caught.value.message.count(";") <= 1, caught.value.message
        return spent

    assert min(cost() for _ in range(3)) < LONGEST_HELD_S


def test_no_long_body_holds_the_event_loop(live: MakeLive, monkeypatch: pytest.MonkeyPatch) -> None:
    """13 s for a megabyte of faults (issue 20, A2). Measured in the loop's own processor time, between two turns of it; a body that
    is long is not even parsed there."""
    service, parsers, longest = live(), list[int](), [0.0]
    parse = request_body.parse_body

    def watched(body: bytes, model: type[Any]) -> Any:
        parsers.append(threading.get_ident())
        return parse(body, model)

    async def tick() -> None:
        last = time.thread_time()
        while True:
            await asyncio.sleep(0)
            now = time.thread_time()
            longest[0], last = max(longest[0], now - last), now

    async def begin() -> tuple[asyncio.Task[None], int]:
        return asyncio.create_task(tick()), threading.get_ident()

    async def end(ticking: asyncio.Task[None]) -> None:
        ticking.cancel()

    assert chat(service, max_tokens=1)[0] == 200  # what is imported with the first request is
    monkeypatch.setattr(request_body, "parse_body", watched)
    routes = {ChatRequest: "/v1/chat/completions", CompletionRequest: "/v1/completions", CompareRequest: "/v1/compare"}
    whole = json.dumps({"model": "base", "prompt": "word " * 196_000}).encode()  # no fault, but longer than the context
    ticking, loop_thread = service.call(begin())
    try:
        for name, model, body in [*LONG_FAULTS, ("a whole one", CompletionRequest, whole)]:
            longest[0] = 0.0
            assert send(service, "POST", routes[model], body)[0] == 400, name
            assert longest[0] < LONGEST_HELD_S, name
    finally:
        service.call(end(ticking))
    assert len(parsers) == len(LONG_FAULTS) + 1 and loop_thread not in parsers


NEUTRAL: list[dict[str, Any]] = [
    *(
        {"top_k": -1},
        {"repetition_penalty": 1.0},
        {"min_p": 0.0},
        {"stop": ""},
        {"stop": ["", ""]},
        {"length_penalty": 1},
    ),
    *({"made_up": value} for value in (None, False, "", [], {})),
]
ANSWERS: list[dict[str, Any]] = [
    {
        "content": "A wren.",
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    },
    {"content": "A wren.", "annotations": [], "reasoning_content": "It sings.", "provider_specific_fields": {}},
]


def test_what_asks_for_nothing_changes_nothing(live: MakeLive) -> None:
    """Null, empty and neutral fields, and the assistant's messages as services return them (issue 16, inputs 08)."""
    service = live()
    same: dict[str, Any] = {"model": "one", "seed": 5, "max_tokens": 12}
    plain = chat(service, **same)[1]["choices"][0]
    for fields in NEUTRAL:
        assert (fields, chat(service, **same, **fields)[1].get("choices")) == (fields, [plain])

    def after(answer: dict[str, Any]) -> Any:
        history = [*HELLO, {"role": "assistant", **answer}, *HELLO]
        return chat(service, **{**same, "messages": history})[1]["choices"]

    assert after(ANSWERS[0]) == after(ANSWERS[1]) == after({"content": "A wren."})
    assert after({"content": None, "tool_calls": []}) == after({"content": ""})
    returned = chat(service, **same)[1]["choices"][0]["message"]
    assert after({k: v for k, v in returned.items() if k != "role"})[0]["finish_reason"] in ("stop", "length")


def test_echo_tells_of_every_token_of_prompt_and_reply(live: MakeLive, base_dir: Path) -> None:
    """As an evaluation harness asks (issue 16, inputs 15): log p of a given text by the model itself, against transformers'."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(base_dir), AutoModelForCausalLM.from_pretrained(base_dir)
    ids = torch.tensor([tokenizer("a b").input_ids])
    right = model(ids).logits[0, :-1].log_softmax(-1)
    service = live()

    def complete(**fields: Any) -> Any:
        asked = {"model": "base", "prompt": "a b", "logprobs": 1, "max_tokens": 0, "echo": True, "temperature": 0}
        status, _, found = send(service, "POST", "/v1/completions", {**asked, **fields})
        return (found["choices"][0], found["usage"]) if status == 200 else (status, found)

    choice, usage = complete()
    told = choice["logprobs"]
    assert (choice["text"], choice["finish_reason"]) == ("a b", "length")
    assert usage == {"prompt_tokens": 4, "completion_tokens": 0, "total_tokens": 4}
    assert (told["tokens"], told["text_offset"]) == (["", "a", " ", "b"], [0, 0, 1, 2])
    assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
    assert told["token_logprobs"][1:] == pytest.approx(right.gather(1, ids[0, 1:, None])[:, 0].tolist(), abs=1e-4)
    assert [max(d.values()) for d in told["top_logprobs"][1:]] == pytest.approx(right.max(-1).values.tolist(), abs=1e-4)

    alone, _ = complete(echo=False, max_tokens=5, logprobs=0)
    both, _ = complete(max_tokens=5)
    assert both["text"] == "a b" + alone["text"]
    assert "".join(both["logprobs"]["tokens"]) == both["text"]
    assert both["logprobs"]["token_logprobs"][4:] == pytest.approx(alone["logprobs"]["token_logprobs"], abs=1e-4)
    only, _ = complete(echo=False, max_tokens=5, logprobs=3)
    assert only["logprobs"]["tokens"] == alone["logprobs"]["tokens"]
    assert {len(others) for others in only["logprobs"]["top_logprobs"]} <= {2, 3}  # two tokens may be the same text
    ended, usage = complete(max_tokens=1, logit_bias={"2": 100})  # the harness takes off the last token, whatever it is
    assert ended["logprobs"]["tokens"] == [*told["tokens"], ""] and usage["completion_tokens"] == 1
    greedy = both["logprobs"]
    assert greedy["token_logprobs"][4:] == [
        max(others.values()) for others in greedy["top_logprobs"][4:]
    ]  # to the last bit
    assert complete(model="one")[0]["logprobs"]["token_logprobs"][1:] != told["token_logprobs"][1:]
    assert complete(logprobs=None)[0] == {**choice, "logprobs": None}
    assert complete(prompt=ids[0].tolist())[0]["logprobs"] == told
    assert complete(echo=False)[0] == 400


def test_a_stream_echoes_the_prompt_before_the_reply(live: MakeLive) -> None:
    """It was refused. Its pieces join to the very response that comes without a stream."""
    ai = client(live())
    for fields in ({"logprobs": 2}, {"logprobs": None}, {"logprobs": 1, "max_tokens": 0}, {"n": 2, "logprobs": 1}):
        asked = {"model": "one", "prompt": "a b", "echo": True, "seed": 1, "max_tokens": 6, **fields}
        whole, pieces = ai.completions.create(**asked), list(ai.completions.create(**asked, stream=True))
        for choice in whole.choices:
            mine = [c for piece in pieces for c in piece.choices if c.index == choice.index]
            assert mine[0].text == "a b" and "".join(c.text for c in mine) == choice.text
            assert mine[-1].finish_reason == choice.finish_reason
            told = [c.logprobs for c in mine if c.logprobs is not None]
            if choice.logprobs is None:
                assert not told
                continue
            count = len([offset for one in told for offset in one.text_offset])
            for name in ("tokens", "text_offset"):
                assert [x for one in told for x in getattr(one, name)] == getattr(choice.logprobs, name)[:count]
            values = [p for one in told for p in one.token_logprobs]
            assert values[0] is None
            assert values[1:] == pytest.approx(choice.logprobs.token_logprobs[1:count], abs=1e-4)
            assert all(others for one in told for others in (one.top_logprobs or [None])[1:])


BAD_BODIES: list[tuple[str, bytes, int]] = [
    ("not JSON", b"{", 400),
    ("empty", b"", 400),
    ("an array", b"[]", 400),
    ("not UTF-8", b'{"model": "\xff"}', 400),
    ("deep", b"[" * 200_000, 400),
    ("NaN", b'{"model": "base", "temperature": NaN}', 400),
    ("a huge integer", b'{"model": "base", "seed": ' + b"9" * 5000 + b"}", 400),
    ("half a character", b'{"model": "base", "messages": [{"role": "user", "content": "\\ud800"}]}', 400),
    ("very many keys", json.dumps({f"k{i}": i for i in range(50_000)}).encode(), 400),
    ("too long", b'{"model": "' + b"x" * 1_100_000 + b'"}', 413),
]


@pytest.mark.parametrize(("body", "status"), [(b, s) for _, b, s in BAD_BODIES], ids=[n for n, _, _ in BAD_BODIES])
def test_bad_bodies(live: MakeLive, body: bytes, status: int) -> None:
    started = time.monotonic()
    found = send(live(), "POST", "/v1/chat/completions", body)
    assert found[0] == status and set(found[2]["error"]) == {"message", "type", "param", "code"}
    assert time.monotonic() - started < 5
    assert chat(live())[0] == 200


BAD_FIELDS: list[tuple[dict[str, Any], int]] = [
    *[({"max_tokens": value}, 400) for value in (-1, 0, 10**9, "5", True, 1.5, 10**400)],
    *[({"n": value}, 400) for value in (0, 10**9, "2")],
    *[({"temperature": value}, 400) for value in (-0.1, 2.1, "1")],
    ({"temperature": 1e400}, 400),  # JSON has no infinity
    *[({"top_p": value}, 400) for value in (0, 1.1)],
    ({"stop": ["x"] * 100_000}, 400),
    ({"stop": 5}, 400),
    ({"top_k": -2}, 400),
    *[({"min_p": value}, 400) for value in (-0.1, 1.1)],
    *[({"repetition_penalty": value}, 400) for value in (0, 1e-50, -1, 1e30)],
    *[({name: value}, 400) for name in ("presence_penalty", "frequency_penalty") for value in (-2.1, 2.1, "1")],
    *[({"logit_bias": value}, 400) for value in ({"5": 101}, {"-1": 1}, {"x": 1}, {"999999": 1}, {"05": 1}, [5])],
    *[({"min_tokens": value}, 400) for value in (-1, 10**9, "1")],
    *[({"stop_token_ids": value}, 400) for value in ([-1], [999_999], ["1"], list(range(300)))],
    ({"prompt_logprobs": 21}, 400),
    ({"top_logprobs": 21, "logprobs": True}, 400),
    ({"top_logprobs": 2}, 400),
    ({"made_up": 1}, 400),
    ({"messages": [{"role": "user", "content": None}]}, 400),
    ({"messages": [{"role": "user", "content": "x", "reasoning_content": "y"}]}, 400),
    ({"messages": [*HELLO, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, *HELLO]}, 400),
    ({"seed": 2**64}, 400),
    ({"messages": []}, 400),
    ({"messages": [{"role": "wizard", "content": "x"}]}, 400),
    ({"messages": [{"role": "user", "content": "x"}] * 10_000}, 400),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]}, 400),
    ({"messages": [{"role": "user", "content": "   "}]}, 400),
    ({"messages": [{"role": "user", "content": "x" * 5000}]}, 400),
    ({"chat_template": "{{ x }}"}, 400),
    ({"trust_remote_code": True}, 400),
    ({"tools": [{"type": "function"}]}, 400),
    ({"tools": [{"type": "function", "function": {"name": "a"}}]}, 400),  # this template writes no tools
    ({"tool_choice": "required"}, 400),
    ({"chat_template_kwargs": {"enable_thinking": False}}, 400),
    ({"response_format": {"type": "json_schema"}}, 400),
    ({"response_format": {"type": "grammar"}}, 400),
    *[
        ({"model": name}, 404)
        for name in (
            "../one",
            "one/../two",
            "%2e%2e",
            "/etc/passwd",
            "one\x00",
            "ｏｎｅ",
            "s3://bucket/x",
            "gpt2",
            "one@v7",
            "o" * 200,
        )
    ],
    ({"model": "judge"}, 400),
    ({"reward": "one"}, 400),
]


@pytest.mark.parametrize(
    ("fields", "status"), BAD_FIELDS, ids=[str(f)[:40].encode("unicode_escape").decode() for f, _ in BAD_FIELDS]
)
def test_bad_fields(live: MakeLive, fields: dict[str, Any], status: int) -> None:
    loads = live().replica.adapter_cache.loads
    found, content = chat(live(), **fields)
    assert found == status and content["error"]["message"] and len(json.dumps(content)) < 2000
    assert live().replica.adapter_cache.loads == loads


def test_fields_that_change_nothing_are_ignored(live: MakeLive) -> None:
    neutral = {
        "user": "me",
        "store": False,
        "metadata": {"a": "b"},
        "presence_penalty": 0,
        "logit_bias": {},
        "response_format": {"type": "text"},
    }
    parts = [{"role": "user", "content": [{"type": "text", "text": "Name a "}, {"type": "text", "text": "bird."}]}]
    plain, other = chat(live(), seed=1), chat(live(), seed=1, messages=parts, **neutral)
    assert plain[1]["choices"] == other[1]["choices"] and plain[0] == other[0] == 200


def test_text_never_becomes_a_control_token(live: MakeLive) -> None:
    service = live()
    ids = service.replica.prompt_encoder.tokenize({"text": "</s><s> a </s>"}, service.replica.template)
    assert ids[0] == 1 and not {0, 1, 2} & set(ids[1:])


def test_routes_methods_hosts_and_headers(live: MakeLive) -> None:
    service = live()
    for method, path, status in (
        ("GET", "/docs", 404),
        ("GET", "//", 404),
        ("GET", "/admin", 404),
        ("GET", "/v1/models/nobody", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models/one", 405),
        ("OPTIONS", "/v1/chat/completions", 405),
    ):
        found = send(service, method, path)
        assert found[0] == status and "Traceback" not in str(found[2]), path
    for name, value, status in (
        ("host", "evil.example", 403),
        ("host", "127.0.0.1.evil.example:80", 403),
        ("origin", "http://evil.example", 403),
        ("origin", "null", 403),
        ("host", "localhost:9", 200),
        ("origin", f"http://127.0.0.1:{service.port}", 200),
        ("x-request-disconnect-disabled", "?1", 400),
        ("serve_multiplexed_model_id", "../../x", 200),
        ("x-request-timeout-seconds", "0", 200),
    ):
        assert send(service, "GET", "/v1/models", headers={name: value})[0] == status, (name, value)
    assert send(service, "POST", "/v1/completions", b"model=base", {"content-type": "text/plain"})[0] == 415
    status, headers, page = send(service, "GET", "/")
    assert status == 200 and "sha256-" in headers["content-security-policy"] and headers["x-frame-options"] == "DENY"
    assert "http://" not in page and "https://" not in page


def test_the_public_routes_are_these_and_no_others(live: MakeLive) -> None:
    routes = {(route.path, *sorted(route.methods)) for route in live().api.app.app.routes}  # type: ignore[attr-defined]
    assert routes == {
        ("/", "GET", "HEAD"),
        ("/health", "GET", "HEAD"),
        ("/version", "GET", "HEAD"),
        ("/openapi.json", "GET", "HEAD"),
        ("/tokenize", "POST"),
        ("/detokenize", "POST"),
        ("/tokenizer_info", "GET", "HEAD"),
        ("/v1/models", "GET", "HEAD"),
        ("/v1/models/{model:path}", "GET", "HEAD"),
        ("/v1/chat/completions", "POST"),
        ("/v1/completions", "POST"),
        ("/v1/compare", "POST"),
        ("/v1/preferences", "POST"),
        ("/v1/score", "POST"),
    }


def test_a_slow_body_and_one_without_length(live: MakeLive) -> None:
    service = live(limits={"body_timeout_s": 0.5})
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", service.port), timeout=20) as slow:
        slow.sendall(head + b"Content-Length: 100\r\n\r\n{")
        assert b" 408 " in slow.recv(4096).splitlines()[0]
    with socket.create_connection(
        ("127.0.0.1", live().port), timeout=20
    ) as endless:  # may take longer than half a second
        endless.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        try:
            for _ in range(40):
                endless.sendall(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
        except OSError:
            pass
        assert b" 413 " in endless.recv(4096).splitlines()[0]
    assert chat(service)[0] == 200


def test_a_client_that_disconnects_frees_its_rows(live: MakeLive) -> None:
    service = live()
    body = json.dumps(
        {"model": "one", "messages": HELLO, "max_tokens": 150, "stream": True, "n": 4, "seed": 1}
    ).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", service.port), timeout=20) as leaving:
        leaving.sendall(head.encode() + body)
        leaving.recv(2000)
    deadline = time.monotonic() + 10
    while (service.replica.engine.running or service.replica.places_taken) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert service.replica.engine.running == 0 and service.replica.places_taken == 0
    cached = service.replica.adapter_cache._cached.values()
    assert all(adapter.users == 0 for adapter in cached)


def test_full_is_429_with_retry_after_in_under_100_ms(live: MakeLive) -> None:
    service = live(limits={"max_batch_rows": 2, "max_waiting_rows": 2})
    hold = threading.Event()
    service.replica.engine.call(lambda model: hold.wait(30))  # the decoder stands still meanwhile
    with ThreadPoolExecutor(4) as pool:
        busy = [pool.submit(chat, service, seed=i) for i in range(4)]
        deadline = time.monotonic() + 20
        while service.replica.places_taken < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        seconds = []
        for _ in range(10):
            started = time.monotonic()
            status, headers, found = send(service, "POST", "/v1/chat/completions", {"model": "base", "messages": HELLO})
            seconds.append(time.monotonic() - started)
            assert (status, found["error"]["code"], headers["retry-after"]) == (429, "rate_limit_exceeded", "1"), found
        hold.set()
        assert min(seconds) < 0.1
        assert all(done.result()[0] == 200 for done in busy)
    assert client(service, max_retries=2).chat.completions.create(model="base", messages=HELLO).choices  # type: ignore[arg-type]


def test_keys(live: MakeLive, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    everything, limited = add_key(path, "alice"), add_key(path, "bob", models=("one",), max_concurrent=1)
    assert os.stat(path).st_mode & 0o077 == 0 and everything not in path.read_text()
    service = live(api_keys=str(path))
    request = {"model": "base", "messages": HELLO}
    codes = set()
    for header in (
        {},
        {"authorization": "Bearer rr-wrong"},
        {"authorization": f"Basic {everything}"},
        {"authorization": "Bearer \xe9"},
    ):
        status, headers, found = send(service, "POST", "/v1/chat/completions", request, header)
        assert status == 401 and headers["www-authenticate"] == "Bearer"
        codes.add(found["error"]["code"])
    assert codes == {"invalid_api_key"}
    assert client(service, everything).chat.completions.create(**request).choices
    with pytest.raises(openai.NotFoundError):
        client(service, limited).chat.completions.create(**request)
    with pytest.raises(openai.NotFoundError):
        client(service, limited).chat.completions.create(**{**request, "model": "one"}, extra_body={"reward": "judge"})
    with pytest.raises(openai.NotFoundError):  # the default reward is the judge, which is not bob's
        client(service, limited).chat.completions.create(**{**request, "model": "one"}, extra_body={"reward": True})
    compared = {"models": ["one"], "messages": HELLO, "reward": True}
    assert send(service, "POST", "/v1/compare", compared, {"authorization": f"Bearer {limited}"})[0] == 404
    assert {m.id.partition("@")[0] for m in client(service, limited).models.list()} == {"one"}
    assert client(service, limited).chat.completions.create(**{**request, "model": "one"}).choices
    assert not service.api.usage.rows
    revoke_key(path, "alice")
    time.sleep(1.1)
    with pytest.raises(openai.AuthenticationError):
        client(service, everything).chat.completions.create(**request)
    assert send(service, "GET", "/")[0] == 200  # the page holds no secrets, and prompts for the key
    log = (Path(service.config.output_dir) / "access.jsonl").read_text()
    assert everything not in log and limited not in log and "Name a bird" not in log and '"key": "bob"' in log


def last_line(service: LiveService) -> dict[str, Any]:
    return dict(json.loads((Path(service.config.output_dir) / "access.jsonl").read_text().splitlines()[-1]))


def test_tokens_of_a_reply_that_is_not_finished_are_charged(
    live: MakeLive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream that was closed before its end was charged the prompt alone, and one reply that came too late nothing."""
    key = add_key(tmp_path / "keys.json", "carol", max_tokens_per_minute=14)
    service = live(api_keys=str(tmp_path / "keys.json"), limits={"request_timeout_s": 3.0})
    step = service.replica.engine.sampler.step
    monkeypatch.setattr(service.replica.engine.sampler, "step", lambda: (time.sleep(0.04), step())[1])
    asked = {"model": "base", "messages": HELLO, "max_tokens": 150, "ignore_eos": True}
    auth = {"authorization": f"Bearer {key}"}
    with client(service, key).chat.completions.create(
        **{k: v for k, v in asked.items() if k != "ignore_eos"}, extra_body={"ignore_eos": True}, stream=True
    ) as stream:
        for _, _ in zip(range(6), stream):
            pass
    log, deadline = Path(service.config.output_dir) / "access.jsonl", time.monotonic() + 20
    while not (log.exists() and log.read_text().endswith("\n")) and time.monotonic() < deadline:
        time.sleep(0.02)  # its line is the last thing that a request leaves
    assert 3 <= last_line(service)["completion_tokens"] < 150
    service.api.usage._tokens.clear()
    assert send(service, "POST", "/v1/chat/completions", asked, auth)[0] == 504
    line = last_line(service)
    assert line["status"] == 504 and line["completion_tokens"] > 3 and line["prompt_tokens"] > 0
    assert service.api.usage._tokens["carol"][0] == 14 - line["prompt_tokens"] - line["completion_tokens"]
    assert send(service, "POST", "/v1/chat/completions", asked, auth)[0] == 429


def test_a_comparison_reads_its_prompt_once_for_each_model(live: MakeLive) -> None:
    """It was counted once, however many models read it."""
    prompt = {"prompt": "Name a bird.", "max_tokens": 1, "n": 2}
    one, two = (
        send(live(), "POST", "/v1/compare", {**prompt, "models": models})[2]["usage"]["prompt_tokens"]
        for models in (["one"], ["one", "two"])
    )
    assert two == 2 * one > 0


def test_a_reply_whose_client_leaves_is_charged_what_it_could_have_cost(live: MakeLive, tmp_path: Path) -> None:
    """It was charged nothing: who never waited for an answer had no limit of tokens. The proxy cancels such a request."""
    key = add_key(tmp_path / "keys.json", "eve", max_tokens_per_minute=1000)
    service = live(api_keys=str(tmp_path / "keys.json"))
    asked = {"model": "base", "messages": HELLO, "max_tokens": 140, "n": 2, "ignore_eos": True}

    async def leave() -> None:
        names = {"host": "127.0.0.1", "authorization": f"Bearer {key}", "content-type": "application/json"}
        scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b""}
        scope["headers"] = [(name.encode(), value.encode()) for name, value in names.items()]
        body = asyncio.Queue[dict[str, Any]]()
        body.put_nowait({"type": "http.request", "body": json.dumps(asked).encode()})
        sent = asyncio.create_task(service.api.app(scope, body.get, None))
        async with asyncio.timeout(20):
            while service.replica.engine.running < 2:
                await asyncio.sleep(0.005)
        sent.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sent

    service.call(leave())
    assert service.api.usage._tokens["eve"][0] == pytest.approx(1000 - 2 * 140, abs=1)
    assert not service.api.usage.rows and last_line(service)["status"] == 499


def test_a_stream_whose_client_has_gone_before_its_first_byte_is_ended(live: MakeLive, tmp_path: Path) -> None:
    """Its replies counted against the key for ever, and its rows went on to their last token."""
    key = add_key(tmp_path / "keys.json", "dora", max_concurrent=1)
    service = live(api_keys=str(tmp_path / "keys.json"))
    body = json.dumps({"model": "base", "messages": HELLO, "max_tokens": 150, "stream": True}).encode()
    names = {"host": "127.0.0.1", "authorization": f"Bearer {key}", "content-type": "application/json"}
    path = "/v1/chat/completions"
    scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1", "method": "POST"}
    scope |= {"path": path, "raw_path": path.encode(), "query_string": b"", "scheme": "http", "root_path": ""}
    scope |= {"headers": [(name.encode(), value.encode()) for name, value in names.items()]}

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def gone(message: Any) -> None:
        raise OSError("the client has gone")

    async def ask() -> None:
        with pytest.raises((OSError, ClientDisconnect)):
            await service.api.app(scope, receive, gone)
        assert not service.api.usage.rows and not service.replica.places_taken

    service.call(ask())
    line = last_line(service)
    assert line["key"] == "dora" and "stream_seconds" in line and line["prompt_tokens"] > 0


def test_a_request_that_is_sent_twice_runs_once(live: MakeLive) -> None:
    service = live()
    request = {"model": "one", "messages": HELLO}
    with ThreadPoolExecutor(3) as pool:
        same = [
            pool.submit(send, service, "POST", "/v1/chat/completions", request, {"idempotency-key": "again"})
            for _ in range(3)
        ]
        responses = [found.result()[2] for found in same]
    assert responses[0] == responses[1] == responses[2]
    other = send(service, "POST", "/v1/chat/completions", {**request, "n": 2}, {"idempotency-key": "again"})[2]
    assert other["id"] != responses[0]["id"]


def test_preferences_are_rows_that_the_reward_stage_reads(live: MakeLive) -> None:
    service = live()
    request = {"prompt": "Name a bird.", "models": ["one", "two"], "seed": 1, "reward": True, "kl": True}
    status, _, compared = send(service, "POST", "/v1/compare", request)
    assert status == 200 and [c["model"] for c in compared["choices"]] == ["one", "two"]
    better, worse = (choice["message"]["content"].replace("\0", "") for choice in compared["choices"])
    row = {"prompt": "Name a bird.", "chosen": better, "rejected": worse, "comparison": compared["id"]}
    conversation = [*HELLO, {"role": "assistant", "content": "Wren"}, {"role": "user", "content": "Another?"}]
    assert send(service, "POST", "/v1/preferences", {**row, "chosen_model": "one", "rejected_model": "two"})[0] == 200
    assert (
        send(service, "POST", "/v1/preferences", {"messages": conversation, "chosen": "Owl", "rejected": "Oak"})[0]
        == 200
    )
    for bad in (
        {**row, "rejected": better},
        {**row, "chosen": " "},
        {**row, "prompt": ""},
        {**row, "extra": 1},
        {**row, "chosen": "a\0"},
    ):
        assert send(service, "POST", "/v1/preferences", bad)[0] == 400
    path = Path(service.config.output_dir) / "preferences.jsonl"
    rows = read_rows(DataConfig(train=(str(path),), held_out_fraction=0.0), "preference").rows
    assert [(r.prompt.plain().splitlines()[0], r.chosen, r.rejected) for r in rows] == [
        ("Name a bird.", better, worse),
        ("Human: Name a bird.", "Owl", "Oak"),
    ]


def test_an_internal_failure_reveals_nothing_to_the_client(live: MakeLive, monkeypatch: pytest.MonkeyPatch) -> None:
    service = live()

    async def broken(*args: Any) -> Any:
        raise RuntimeError("canary-secret /home/someone")

    monkeypatch.setattr(service.replica, "_prepare", broken)
    status, content = chat(service)
    assert status == 500 and "canary" not in json.dumps(content)
