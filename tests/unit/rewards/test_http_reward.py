"""Rewards from a server: the protocol, what a server may do wrong, what is kept, and what must not be told."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.batches import Rollout
from rlhf_ray.errors import ConfigError, Interrupted, ResourceError
from rlhf_ray.rewards import http_client
from rlhf_ray.rewards.http_client import HttpClient, check_reachable, credentials
from rlhf_ray.rewards.http_reward import HttpReward
from rlhf_ray.rewards.protocol import RewardInputs, Texts
from rlhf_ray.runtime.watchdog import is_asking
from rlhf_ray.storage.answers import Answers
from tests.servers import Reply, ScriptedServer, serving


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "FIRST_PAUSE_S", 0.01)


def lengths(body: dict[str, Any]) -> dict[str, Any]:
    """The true reward: how long a completion is; none for an empty one. Answered in another order than asked."""
    rows = [(i, float(len(c)) / 3 if c else None) for i, c in zip(body["ids"], body["completions"])]
    return {"ids": [i for i, _ in reversed(rows)], "rewards": [r for _, r in reversed(rows)]}


def inputs(*completions: str, columns: list[dict[str, Any]] | None = None) -> RewardInputs:
    n = len(completions)
    mask = torch.ones(n, 1, dtype=torch.bool)
    tokens = torch.arange(2 * n).reshape(n, 2)
    rollout = Rollout(tokens, mask, mask, torch.zeros(n, 1), torch.tensor([True] * n), torch.arange(n))
    texts = Texts([f"p{i} " for i in range(n)], completions, [[2 * i + 1] for i in range(n)], columns or [{}] * n)
    return RewardInputs(rollout, [], lambda *_: texts)


def reward(url: str, answers: Path | None = None, batch_size: int = 2, **options: Any) -> HttpReward:
    given = {"timeout_s": 5.0, "max_retries": 3, "concurrency": 2, **options}
    client = HttpClient(f"reward rm ({url})", url, given.pop("headers", {}), **given)
    return HttpReward("rm", 1.0, client, batch_size, None if answers is None else Answers(answers), "abc")


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with serving(lengths) as found:
        yield found


def test_replies_are_scored_by_id_and_batch(server: ScriptedServer) -> None:
    columns = [
        {"answer": i, "when": float("nan"), "only": 1} if i == 0 else {"answer": i, "when": 1.0} for i in range(5)
    ]
    scores = reward(server.url).score(inputs("a", "", "ccc", "dddd", "eeeee", columns=columns))
    assert scores.isnan().tolist() == [False, True, False, False, False]
    assert torch.equal(scores[[0, 2, 3, 4]], torch.tensor([1 / 3, 1.0, 4 / 3, 5 / 3]))
    assert sorted(len(body["ids"]) for body in server.asked) == [1, 2, 2]
    first = next(body for body in server.asked if body["ids"][0] == "0")
    assert first == {
        "version": 1,
        "ids": ["0", "1"],
        "prompts": ["p0 ", "p1 "],
        "completions": ["a", ""],
        "finished": [True, True],
        "columns": {"answer": [0, 1], "when": [None, 1.0]},
        "query": ["p0 a", "p1 "],
        "tokenizer_sha256": "abc",
        "prompt_ids": [[0], [2]],
        "completion_ids": [[1], [3]],
    }
    assert server.most_busy <= 2


def test_an_openrlhf_server_fits() -> None:
    """It reads `query`, and answers with `rewards` in that order (openrlhf/cli/serve_rm.py)."""
    with serving(lambda body: {"rewards": [float(len(q)) for q in body["query"]], "extra_logs": {}}) as found:
        assert reward(found.url).score(inputs("a", "bb", "ccc")).tolist() == [4.0, 5.0, 6.0]


@pytest.mark.parametrize(
    "fault",
    [
        Reply({"error": "busy"}, 429, {"Retry-After": "0"}),
        Reply({"error": "down"}, 500),
        Reply(b"<html>bad gateway</html>", 200),
        Reply({"ids": ["0"], "rewards": [0.0]}, wait_s=20.0),
    ],
    ids=["429", "500", "nonsense", "slow"],
)
def test_a_fault_that_passes_is_tried_again(server: ScriptedServer, fault: Reply) -> None:
    server.faults.append(fault)
    assert reward(server.url, timeout_s=2.0 if fault.wait_s else 30.0).score(inputs("aaa")).tolist() == [1.0]
    assert len(server.asked) == 2


def test_the_watchdog_knows_of_requests_that_are_under_way() -> None:
    """Through all tries of one, and not a moment longer."""
    seen = list[bool]()

    def answer(body: dict[str, Any]) -> Any:
        seen.append(is_asking())
        return lengths(body) if len(seen) > 2 else Reply({}, 503)

    with serving(answer) as found:
        assert reward(found.url).score(inputs("aaa")).tolist() == [1.0]
    assert seen == [True] * 3 and not is_asking()


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (Reply({"detail": "no such route"}, 404), 'answered with status 404: {"detail": "no such route"}'),
        (Reply("down", 503), r"answered with status 503: \"down\" (3 tries)"),
        (Reply(b"what?"), "did not answer with JSON: b'what?' (3 tries)"),
        (
            {"ids": ["0"], "rewards": [1.0]},
            "answered with the wrong number of rewards; expected 2; got 1 rewards, 1 ids",
        ),
        ({"rewards": [1.0, 2.0, 3.0]}, "answered with the wrong number of rewards; expected 2; got 3 rewards"),
        ({"ids": ["0", "7"], "rewards": [1.0, 2.0]}, "answered with other ids than it was asked about"),
        ({"ids": ["0", "0"], "rewards": [1.0, 2.0]}, "each of them once; got an id twice"),
        ({"scores": [1.0, 2.0]}, "did not answer with rewards"),
        ([1.0, 2.0], "did not answer with rewards"),
        ({"rewards": [1.0, "high"]}, "did not return a list of numbers; expected list[float]; got 'high' for reply 1"),
        (Reply({}, 307, {"Location": "http://example.org/x"}), "redirects to another host, example.org"),
        (Reply({}, 302, {"Location": "/x"}), "answered with redirect 302, which would lose the request"),
        (Reply({}, wait_s=2.0), "no answer within timeout_s 0.3 (3 tries)"),
    ],
)
def test_a_fault_that_stays_stops_the_run_in_one_line(answer: Any, told: str) -> None:
    limit = 0.3 if isinstance(answer, Reply) and answer.wait_s else 30.0
    with serving(lambda body: answer) as found, pytest.raises(Interrupted) as error:
        reward(found.url, max_retries=2, timeout_s=limit).score(inputs("a", "b"))
    (line,) = error.value.lines()
    assert told.replace('\\"', '"') in line and line.startswith(f"error: reward rm ({found.url}): ")


def test_nan_is_a_fault_and_is_not_kept(tmp_path: Path) -> None:
    """As with a Python function: null does not apply, NaN stops. On a resume the server, which was mended, is asked again."""
    with serving(lambda body: Reply(b'{"rewards": [NaN, null]}')) as found:
        assert [
            math.isinf(x) or (math.isnan(x) and "null") for x in reward(found.url, tmp_path).score(inputs("a", "b"))
        ] == [True, "null"]
        found.answer = lengths
        assert reward(found.url, tmp_path).score(inputs("aaa", "bbb")).tolist() == [1.0, 1.0]


def test_a_redirect_on_the_same_host_is_followed() -> None:
    """FastAPI answers /score with 307 to /score/ where a route was written so."""
    with serving(lengths, Reply({}, 307, {"Location": "/score/"})) as found:
        assert reward(found.url).score(inputs("aaa")).tolist() == [1.0]


def test_what_was_answered_survives_a_kill(server: ScriptedServer, tmp_path: Path) -> None:
    """A server whose answers change (a judge that samples): killed after two of three requests, the resumed run gets what it had
    been told, and asks only the third."""
    told = iter(range(100))

    def moody(body: dict[str, Any]) -> Any:
        return {"rewards": [float(next(told)) for _ in body["ids"]]} if len(server.asked) <= 2 else Reply("gone", 503)

    server.answer = moody
    rows = inputs("a", "b", "c", "d", "e", "f")
    with pytest.raises(Interrupted):
        reward(server.url, tmp_path, max_retries=0, concurrency=1).score(rows)
    before = len(server.asked)
    server.answer = lambda body: {"rewards": [100.0 for _ in body["ids"]]}
    resumed = reward(server.url, tmp_path, concurrency=1).score(rows)
    assert resumed.tolist() == [0.0, 1.0, 2.0, 3.0, 100.0, 100.0] and len(server.asked) == before + 1
    assert torch.equal(reward(server.url, tmp_path).score(rows), resumed) and len(server.asked) == before + 1


def test_the_first_answer_stays(tmp_path: Path) -> None:
    """Two scorers that have the same chunk (one was lost, and came back) use one answer. A damaged file is asked for again."""
    one, other = Answers(tmp_path), Answers(tmp_path)
    assert one.keep("ab", [0.1, None]) == [0.1, None] and other.keep("ab", [9.0]) == [0.1, None] == other.get("ab")
    (file,) = tmp_path.rglob("*.json")
    file.write_text('{"answer": [0.')
    assert other.keep("ab", [9.0]) == [9.0] == one.get("ab")
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [file.name]


def test_keys_come_from_the_node_and_are_never_told(
    server: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "headers"
    file.write_text("X-Team: seven\n\nAuthorization: Bearer secret-in-a-file\n")
    with pytest.raises(
        ConfigError, match=r"rm.headers_file: .* can be read by others; expected mode 600; got|fix: chmod 600"
    ):
        credentials("rewards.rm", str(file), None)
    file.chmod(0o600)
    headers = credentials("rewards.rm", str(file), None)
    server.answer = lambda body: Reply({"error": f"I do not know {server.seen[-1]['Authorization']}"}, 401)
    with pytest.raises(Interrupted) as refused:
        reward(server.url, headers=headers).score(inputs("a"))
    assert server.seen[-1]["X-Team"] == "seven" and server.seen[-1]["Authorization"] == "Bearer secret-in-a-file"
    assert "secret-in-a-file" not in str(refused.value) and "status 401" in str(refused.value)
    assert len(server.asked) == 1  # a refusal is not tried again
    with pytest.raises(ConfigError, match="RM_KEY is not set on this node"):
        credentials("rewards.rm", None, "RM_KEY")
    monkeypatch.setenv("RM_KEY", "from-the-environment")
    assert credentials("rewards.rm", None, "RM_KEY") == {"Authorization": "Bearer from-the-environment"}
    for text, told in (("no colon\n", "headers:1: is no header; expected Name: value"), ("é: x\n", "is not ASCII")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=told):
            credentials("rewards.rm", str(file), None)
    with pytest.raises(ConfigError, match="cannot be read on this node"):
        credentials("rewards.rm", str(tmp_path / "none"), None)


def test_a_server_that_is_not_there_is_told_before_anything_is_loaded(server: ScriptedServer) -> None:
    check_reachable("rewards.rm.url", server.url)
    for url in ("http://127.0.0.1:9/score", "http://no-such-host.invalid/score"):
        with pytest.raises(ResourceError, match=r"rewards.rm.url: .* cannot be reached from this node"):
            check_reachable("rewards.rm.url", url)
    with pytest.raises(Interrupted, match="cannot be reached"):
        reward("http://127.0.0.1:9/score", max_retries=1).score(inputs("a"))


def test_scorers_ask_at_the_same_time(server: ScriptedServer) -> None:
    four = threading.Barrier(4)
    server.answer = lambda body: (four.wait(20), lengths(body))[1]
    reward(server.url, batch_size=1, concurrency=4).score(inputs(*("abcdefgh"[:i] for i in range(1, 9))))
    assert server.most_busy == 4


def test_requests_keep_to_their_rate() -> None:
    import time

    with serving(lengths) as found:
        started = time.monotonic()
        reward(found.url, batch_size=1, requests_per_minute=1200).score(inputs("a", "b", "c", "d"))
        assert time.monotonic() - started >= 0.15


def test_text_that_is_no_unicode_and_columns_that_are_no_json_are_sent(server: ScriptedServer) -> None:
    """A lone surrogate can come out of a tokenizer; a parquet file holds dates."""
    import datetime

    columns = [{"when": datetime.date(2026, 1, 2), "nested": {"x": float("inf"), 1: (b"x",)}}]
    reward(server.url).score(inputs("\ud800", columns=columns))
    assert (
        json.dumps(server.asked[0]["columns"]) == '{"nested": [{"x": null, "1": ["b\'x\'"]}], "when": ["2026-01-02"]}'
    )


def test_as_many_requests_are_under_way_as_the_job_says() -> None:
    """More than the 100 connections that aiohttp keeps by itself: none waits for one until its time is up."""
    all_there = threading.Barrier(110, timeout=20.0)

    def together(body: Any) -> Any:
        all_there.wait()
        return body

    with serving(together) as found:
        client = HttpClient("reward rm", found.url, {}, timeout_s=30.0, max_retries=0, concurrency=110)
        assert client.ask_all(list(range(110))) == list(range(110))


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer secret-key"}], ids=["no key", "a key"])
def test_a_login_of_netrc_is_not_sent_and_proxies_are_used(
    headers: dict[str, str], server: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine rewards.example login somebody password private\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("http_proxy", server.url.removesuffix("/score"))
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    rm = reward("http://rewards.example/score", headers=headers)
    assert rm.score(inputs("aaa")).tolist() == [1.0]
    assert server.seen[0].get("Authorization") == headers.get("Authorization")
    check_reachable("reward rm", "http://rewards.example/score")
    monkeypatch.setenv("no_proxy", "rewards.example")
    with pytest.raises(Interrupted, match="cannot be reached"):
        reward("http://rewards.example/score", max_retries=0).score(inputs("aaa"))
    with pytest.raises(ResourceError, match="cannot be reached from this node"):
        check_reachable("reward rm", "http://rewards.example/score")


def test_tries_count_towards_requests_per_minute(server: ScriptedServer) -> None:
    server.faults += [Reply({"error": "down"}, 500)] * 2
    started = time.monotonic()
    assert reward(server.url, requests_per_minute=300).score(inputs("aaa")).tolist() == [1.0]
    assert len(server.asked) == 3 and time.monotonic() - started >= 0.4


def test_a_date_without_a_zone_is_one_of_utc(server: ScriptedServer) -> None:
    server.faults.append(Reply("busy", 429, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 -0000"}))
    assert reward(server.url).score(inputs("aaa")).tolist() == [1.0]
