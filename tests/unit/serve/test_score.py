"""/v1/score: a reward adapter that is served is a reward server, with the numbers that it has where it is loaded."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.batches import Rollout
from rlhf_ray.config import LLMJudgeConfig, RewardSource
from rlhf_ray.console import LocalConsole
from rlhf_ray.data.records import Prompt, Row
from rlhf_ray.errors import Interrupted
from rlhf_ray.rewards.build import request_limits
from rlhf_ray.rewards.http_client import HttpClient, credentials
from rlhf_ray.rewards.http_reward import HttpReward, make_http_reward
from rlhf_ray.rewards.judge_usage import JudgeUsage
from rlhf_ray.rewards.llm_judge import LLMJudge, read_completion, read_refusal
from rlhf_ray.rewards.protocol import RewardInputs, Texts
from rlhf_ray.rewards.scoring_model import load_scoring_model
from rlhf_ray.serve import score as score_module
from rlhf_ray.serve.api_keys import add_key
from rlhf_ray.stages.score import score
from rlhf_ray.storage.answers import Answers

from .conftest import LiveService

MakeLive = Callable[..., LiveService]


def post(service: LiveService, body: Any, query: str = "", headers: dict[str, str] | None = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=30)
    connection.request(
        "POST", f"/v1/score{query}", json.dumps(body), {"content-type": "application/json", **(headers or {})}
    )
    response = connection.getresponse()
    found = json.loads(response.read())
    connection.close()
    return response.status, found


def sampled(rows: int) -> RewardInputs:
    """Prompts and replies of different lengths, as ids that are no text that anybody would write."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(3, 250, (rows, 20), generator=generator)
    prompt_mask = torch.arange(9) >= torch.arange(rows)[:, None] % 8
    response_mask = torch.arange(11) < 1 + torch.arange(rows)[:, None] % 10
    rollout = Rollout(
        tokens,
        prompt_mask,
        response_mask,
        torch.zeros(rows, 11),
        torch.ones(rows, dtype=torch.bool),
        torch.arange(rows),
    )
    ids = [t[m].tolist() for t, m in zip(rollout.response_ids, response_mask)]
    texts = Texts(["?"] * rows, ["?"] * rows, ids, [{}] * rows)
    return RewardInputs(rollout, [], lambda *_: texts)


def served(service: LiveService, batch_size: int = 32, **options: Any) -> HttpReward:
    url = f"{service.url}/v1/score?model=judge"
    client = HttpClient("reward rm", url, options.pop("headers", {}), timeout_s=30, max_retries=0, concurrency=2)
    return HttpReward("rm", 1.0, client, batch_size, None, service.replica.backbone.identity.tokenizer_sha256)


def test_it_says_what_the_run_says(live: MakeLive) -> None:
    """To the rounding of float32: a service computes its adapters beside others."""
    service = live()
    run = service.config.adapters["judge"]
    here = load_scoring_model(RewardSource(run=run), "none", torch.device("cpu"), LocalConsole())
    rows = sampled(40)
    scores = served(service).score(rows)
    torch.testing.assert_close(scores, here.reward.score(rows), rtol=0, atol=2e-5)
    assert scores.std() > 1 and torch.equal(served(service, batch_size=16).score(rows), scores)


def test_texts_are_read_as_the_reward_model_reads_them(live: MakeLive) -> None:
    """Without ids, or with those of another tokenizer: encoded, with the end token after a reply that ended by itself."""
    service = live()
    found = post(service, {"prompts": ["Say hi.", "Say hi."], "completions": ["Hi!", "Hi!"], "finished": [True, False]})
    status, answer = found
    assert status == 200 and answer["object"] == "score" and answer["model"] == "judge" and answer["ids"] == ["0", "1"]
    reader = load_scoring_model(
        RewardSource(run=service.config.adapters["judge"]), "none", torch.device("cpu"), LocalConsole()
    )
    tokenizer = service.replica.backbone.tokenizer
    prompt = tokenizer("Say hi.")["input_ids"]
    reply = tokenizer("Hi!", add_special_tokens=False)["input_ids"]
    expected = reader.score([prompt] * 2, [[*reply, tokenizer.eos_token_id], reply])
    assert answer["rewards"] == pytest.approx(expected, abs=1e-5) and expected[0] != expected[1]
    foreign = {"prompts": ["Say hi."], "completions": ["Hi!"], "tokenizer_sha256": "0", "prompt_ids": [[1]]}
    assert post(service, {**foreign, "completion_ids": [[5]]})[1]["rewards"] == pytest.approx(
        answer["rewards"][:1], abs=1e-5
    )
    messages = {
        "prompts": [[{"role": "user", "content": "Say hi."}]],
        "completions": [[{"role": "assistant", "content": "Hi!"}]],
    }
    assert post(service, messages, "?model=judge")[0] == 200


def test_replies_end_as_in_the_training_of_the_reward_model(
    live: MakeLive, tmp_path: Path, base_dir: Path, tiny_run: Callable[..., Path]
) -> None:
    """One that was trained without the end token reads texts without it, finished or not."""
    without = tiny_run(tmp_path / "without", base_dir, "reward", seed=3, template="none", add_eos_token=False)
    body = {"prompts": ["Say hi.", "Say hi."], "completions": ["Hi!", "Hi!"], "finished": [True, False]}
    rewards = post(live(adapters={"judge": str(without)}), body)[1]["rewards"]
    reader = load_scoring_model(RewardSource(run=str(without)), "none", torch.device("cpu"), LocalConsole())
    encoded = reader.reader.encode([Row("x:1", Prompt("Say hi."))], ["Hi!"])
    assert rewards == pytest.approx(reader.score(*encoded) * 2, abs=1e-5)
    assert rewards[1] == pytest.approx(post(live(), body)[1]["rewards"][1], abs=1e-5) and rewards[0] == rewards[1]


def test_the_score_command_asks_it_as_ppo_does(live: MakeLive, tmp_path: Path) -> None:
    """`score --url`: replies and pairs of files, with the numbers of `score --run`; what the service cannot read is left out."""
    service, console = live(), LocalConsole(quiet=True)
    by_run = RewardSource(run=service.config.adapters["judge"])
    by_url = RewardSource(url=f"{service.url}/v1/score?model=judge", batch_size=2)
    rows = [{"instruction": f"Name bird {i}.", "output": "owl " * (i + 1)} for i in range(5)]
    rows.append({"instruction": "Name all birds.", "output": "word " * 3000})
    replies, pairs = tmp_path / "replies.jsonl", tmp_path / "pairs.jsonl"
    replies.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pair = {"user_input": "Name a bird.", "completion_a": "An owl.", "completion_b": "A cat."}
    pairs.write_text(json.dumps(pair) + "\n")
    for file in (str(replies), str(pairs)):
        here, there = (score(source=source, file=file, template="none", console=console) for source in (by_run, by_url))
        assert [row["where"] for row in there] == [row["where"] for row in here] and len(here) in (5, 1)
        for one, other in zip(here, there):
            numbers = [name for name in one if name.startswith("reward")]
            assert [other[n] for n in numbers] == pytest.approx([one[n] for n in numbers], abs=2e-5)
            assert {**one, **dict.fromkeys(numbers)} == {**other, **dict.fromkeys(numbers)}
    rewards = [row["reward"] for row in score(source=by_url, file=str(replies), console=console)]
    assert max(rewards) - min(rewards) > 1e-3


def test_a_reply_that_cannot_be_read_has_no_reward(live: MakeLive) -> None:
    service = live()
    long = "word " * 3000
    status, found = post(
        service, {"ids": ["a", 7, "c"], "prompts": ["p"] * 3, "completions": ["", long, "yes"], "finished": [False] * 3}
    )
    assert status == 200 and found["ids"] == ["a", 7, "c"]
    assert found["rewards"][:2] == [None, None] and isinstance(found["rewards"][2], float)


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        ({"prompts": ["p"], "completions": ["a", "b"]}, 400, "completions: expected 1, one for each prompt; got 2"),
        ({"prompts": [], "completions": []}, 400, "prompts"),
        ({"prompts": ["p"], "completions": ["a"], "model": "one"}, 400, "is no reward adapter"),
        ({"prompts": ["p"], "completions": ["a"], "model": "none"}, 404, "does not exist"),
        ({"prompts": [""], "completions": ["a"]}, 400, "prompt is empty"),
        ({"prompts": ["p"]}, 400, "completions"),
        ([1], 400, "one JSON object"),
    ],
)
def test_bad_requests(live: MakeLive, body: Any, status: int, told: str) -> None:
    found = post(live(), body)
    assert found[0] == status and told in found[1]["error"]["message"]
    ids = {"prompts": ["p"], "completions": ["a"], "prompt_ids": [[10**6]], "completion_ids": [[3]]}
    own = {"tokenizer_sha256": live().replica.backbone.identity.tokenizer_sha256}
    assert post(live(), {**ids, **own})[0] == 400


def test_a_request_ends_at_its_time_although_the_decode_thread_is_busy(live: MakeLive) -> None:
    service = live(limits={"request_timeout_s": 2})
    body = {"prompts": ["p"], "completions": ["a"]}
    assert post(service, body)[0] == 200
    release = threading.Event()
    held = service.replica.engine.call(lambda model: release.wait(20))
    since = time.monotonic()
    try:
        status, found = post(service, body)
    finally:
        release.set()
    assert status == 504 and found["error"]["code"] == "timeout" and time.monotonic() - since < 10
    assert held.result(5) and post(service, body)[0] == 200, "its place is free again"


def test_a_key_from_a_file_opens_it(live: MakeLive, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("keys")
    good, other = add_key(folder / "keys.json", "ppo"), add_key(folder / "keys.json", "bob", models=("one",))
    service = live(api_keys=str(folder / "keys.json"))

    def headers(key: str) -> dict[str, str]:
        file = Path(folder / "headers")
        file.write_text(f"Authorization: Bearer {key}\n")
        file.chmod(0o600)
        return credentials("rewards.rm", str(file), None)

    assert served(service, headers=headers(good)).score(sampled(2)).isfinite().all()
    for key, told in ((other, "status 404"), ("rr-wrong", "status 401")):
        with pytest.raises(Interrupted, match=told) as error:
            served(service, headers=headers(key)).score(sampled(2))
        assert key not in str(error.value)


def test_it_keeps_the_limits_of_a_key(
    live: MakeLive, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was charged nothing, took no place, and ten thousand rows were one reply."""
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    key = add_key(file, "ppo", max_concurrent=4, max_tokens_per_minute=500)
    service = live(api_keys=str(file), limits={"max_batch_rows": 1, "max_waiting_rows": 0})
    scored, seen = score_module._pass, list[tuple[int, int]]()

    def watched(replica: Any, *rest: Any) -> list[float]:
        seen.append((service.api.usage.rows["ppo"], replica.places_taken))
        return scored(replica, *rest)

    monkeypatch.setattr(score_module, "_pass", watched)

    def ask() -> tuple[int, Any]:
        return post(
            service,
            {"prompts": ["Say hi."] * 20, "completions": ["Hi!"] * 20},
            headers={"authorization": f"Bearer {key}"},
        )

    async def while_it_is_full() -> tuple[int, Any]:
        async with AsyncExitStack() as resources:
            service.replica.claim("other", 1, resources)
            return await asyncio.to_thread(ask)

    status, found = ask()
    assert status == 200 and seen == [(4, 1)] * 2 and not service.api.usage.rows
    tokenizer, usage = service.replica.backbone.tokenizer, found["usage"]
    assert usage["prompt_tokens"] == 20 * len(tokenizer("Say hi.")["input_ids"])
    assert usage["completion_tokens"] == 20 * (1 + len(tokenizer("Hi!", add_special_tokens=False)["input_ids"]))
    assert service.api.usage._tokens["ppo"][0] == 500 - usage["total_tokens"] > 0
    assert service.call(while_it_is_full())[0] == 429 and service.replica.places_taken == 0
    while service.api.usage._tokens["ppo"][0] > 0:
        assert ask()[0] == 200
    assert ask()[0] == 429 and not service.api.usage.rows


def test_a_job_at_its_defaults_scores_with_a_key_that_may_have_few_rows(
    live: MakeLive, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first request took all that the key may have, the three beside it got 429, and after five tries the job ended."""
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    monkeypatch.setenv("SCORE_KEY", add_key(file, "ppo", max_concurrent=4))
    service = live(api_keys=str(file), limits={"max_waiting_rows": 1})
    scored, at_once = score_module._pass, list[int]()

    def slow(*given: Any) -> list[float]:
        at_once.append(service.api.usage.rows["ppo"])
        time.sleep(0.05)
        return scored(*given)

    monkeypatch.setattr(score_module, "_pass", slow)
    source = RewardSource(name="rm", url=f"{service.url}/v1/score?model=judge", api_key_env="SCORE_KEY")
    reward = make_http_reward(source, None, service.replica.backbone.identity.tokenizer_sha256)
    assert (reward.batch_size, reward.client.concurrency, reward.client.max_retries) == (64, 4, 5)
    assert reward.score(sampled(256)).isfinite().all()
    assert reward.client.retries == 0 and len(at_once) == 16 and max(at_once) <= 4
    assert not service.api.usage.rows


def test_a_judge_asks_this_service_as_any_other(live: MakeLive, tmp_path: Path) -> None:
    """A random model is no judge: its answers are no verdicts, which is counted, not guessed; held to a schema, they are. Every
    field of a request is taken."""
    service = live()
    prompt = tmp_path / "short.txt"
    prompt.write_text("[user]\n{instruction} {output} SCORE:\n")
    pool = ({"temperature": 0.5, "prompt": str(prompt)}, {"prompt": str(prompt)})
    config = LLMJudgeConfig(base_url=f"{service.url}/v1", model="one", annotators=pool, max_tokens=8, verdict_retries=1)
    client = HttpClient(
        "judge",
        f"{config.base_url}/chat/completions",
        {},
        accept=read_completion,
        accept_error=read_refusal,
        **request_limits(config),
    )
    judge = LLMJudge("j", config, client, Answers(tmp_path), JudgeUsage("judge", config, tmp_path / "usage"))
    found = judge.rate([f"Name bird {i}." for i in range(4)], ["owl"] * 4)
    assert all(opinion.value is None and opinion.unparsable and not opinion.refused for opinion in found)
    assert judge.usage.total()["requests"] == 8 and judge.usage.total()["completion_tokens"] > 0
    judge.pool = LLMJudge("j", config.model_copy(update={"annotators": ()}), client, judge.answers, judge.usage).pool
    by_schema = config.model_copy(update={"structured_output": True, "max_tokens": 64})
    held = LLMJudge("j", by_schema, client, judge.answers, JudgeUsage("judge", by_schema, tmp_path / "held"))
    scores = [opinion.value for opinion in held.rate([f"Name bird {i}." for i in range(4)], ["owl"] * 4)]
    assert all(score is not None and 1 <= score <= 10 for score in scores), "a random model that is held to the schema"
    (long,) = judge.rate(["Name a bird."], ["owl"])  # 475 tokens for a context of 256: a fault of this question alone
    assert long.refused and not long.unparsable and judge.usage.total()["requests"] == 8
