"""Rewards that wait for others are asked while the models go on: by the order of events, and to the same bits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_ray.batches import PromptBatch, Rollout, Scores
from rlhf_ray.console import NullConsole
from rlhf_ray.data.collate import TokenisedPrompt
from rlhf_ray.data.prompts import Prompt
from rlhf_ray.data.records import Row
from rlhf_ray.errors import Interrupted
from rlhf_ray.models.batching import Batching
from rlhf_ray.rewards.http_client import HttpClient
from rlhf_ray.rewards.http_reward import HttpReward
from rlhf_ray.rewards.protocol import Reward, Texts
from rlhf_ray.rewards.sources import FunctionReward, ModelReward
from rlhf_ray.roles.collector import Collected, LocalCollector
from rlhf_ray.roles.generator import ActiveAdapter, Decoding
from rlhf_ray.roles.scorer import Scorer
from rlhf_ray.runtime.beside import Beside
from rlhf_ray.runtime.session import Session
from tests.servers import serving

CPU = torch.device("cpu")
SOON_S = 10.0
"""How long somebody waits for what must come first; a system that does one thing after the other waits in vain."""
CHUNKS = 3


class Events:
    """What happened, in its order."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self._changed = threading.Condition()

    def note(self, what: str) -> None:
        with self._changed:
            self.seen.append(what)
            self._changed.notify_all()

    def wait_for(self, what: str) -> None:
        with self._changed:
            self._changed.wait_for(lambda: what in self.seen, SOON_S)

    def in_order(self, *wanted: str) -> bool:
        places = [self.seen.index(what) for what in wanted]
        return places == sorted(places)


class Sampling:
    """A generator: chunk c's replies are three times token c + 5."""

    def __init__(self, events: Events) -> None:
        self.events = events

    def generate(self, prompts: PromptBatch, adapter: Any, decoding: Any, role: str, step: int) -> Rollout:
        rows = len(prompts)
        chunk = int(prompts.row_id[0]) // 2
        self.events.note(f"sample {chunk}")
        return Rollout(
            tokens=torch.cat([prompts.prompt_ids, torch.full((rows, 3), chunk + 5)], dim=1),
            prompt_mask=prompts.prompt_mask,
            response_mask=torch.ones(rows, 3, dtype=torch.bool),
            sample_logprobs=torch.zeros(rows, 3),
            finished=torch.ones(rows, dtype=torch.bool),
            row_id=prompts.row_id,
        )


def texts(rollout: Rollout, rows: Sequence[Row]) -> Texts:
    ids = rollout.response_ids.tolist()
    return Texts(["a"] * len(ids), [" ".join(map(str, row)) for row in ids], ids, [row.columns for row in rows])


def models(kind: str, role: str, seq: Any, *given: Any) -> Any:
    if kind == "logprobs":
        return torch.where(seq.response_mask, -1.0 / seq.tokens[:, -1:], 0.0), None
    return seq.tokens.sum(dim=1) / 7.0


def collect(rewards: Sequence[Reward], events: Events, calls: Callable[..., Any] = models, **how: Any) -> Collected:
    scorer = Scorer(calls, rewards, texts, 1.0, Batching(2), CPU, **how)
    session = Session(0, 1, CPU, 1, NullConsole())
    collector = LocalCollector(Sampling(events), scorer, session, 2, 0)  # type: ignore[arg-type]
    prompts = [TokenisedPrompt((3, 4), Row("f:1", Prompt("a"))) for _ in range(2 * CHUNKS)]
    return collector.collect(prompts, [3] * len(prompts), ActiveAdapter("policy"), Decoding((2,)), "rollout", 1)


def served(url: str) -> HttpReward:
    client = HttpClient("server", url, {}, timeout_s=2 * SOON_S, max_retries=0, concurrency=2)
    return HttpReward("server", 1.0, client, 64, None)


def chunk_of(body: Any) -> int:
    return int(body["completions"][0].split()[0]) - 5


def rewarded(body: Any) -> Any:
    return {"rewards": [float(c.split()[0]) / 3.0 for c in body["completions"]]}


def test_a_server_answers_while_later_chunks_are_sampled() -> None:
    """It answers about chunk 0 when chunk 2 is being sampled: whoever waits for the answer first, never samples that."""
    events = Events()

    def answer(body: Any) -> Any:
        if chunk_of(body) == 0:
            events.wait_for("sample 2")
            events.note("answered 0")
        return rewarded(body)

    with serving(answer) as server:
        found = collect([served(server.url)], events)
    assert events.in_order("sample 0", "sample 2", "answered 0"), events.seen
    assert found.scores.reward.tolist() == torch.tensor([5 / 3, 5 / 3, 2, 2, 7 / 3, 7 / 3]).tolist()


def test_a_server_is_asked_before_the_reference_has_read_the_chunk() -> None:
    """Also where one call scores one chunk, as an actor of a split run does."""
    events = Events()

    def calls(*given: Any) -> Any:
        events.wait_for("asked")
        events.note("reference")
        return models(*given)

    def answer(body: Any) -> Any:
        events.note("asked")
        return rewarded(body)

    with serving(answer) as server:
        scorer = Scorer(calls, [served(server.url)], texts, 1.0, Batching(2), CPU)
        prompts = PromptBatch(
            torch.tensor([[3, 4]]), torch.ones(1, 2, dtype=torch.bool), torch.tensor([0]), torch.tensor([3])
        )
        rollout = Sampling(Events()).generate(prompts, None, None, "rollout", 1)
        scores = scorer.score_at(rollout, [Row("f:1", Prompt("a"))], 1.0)
    assert events.in_order("asked", "reference"), events.seen
    assert scores.ref_logprobs.tolist() == torch.full((1, 3), -1.0 / 5).tolist()


CODE = """
import random, threading
THREADS = {"plain": set(), "waits": set()}

def plain(prompts, completions):
    THREADS["plain"].add(threading.get_ident())
    return [random.random() for _ in completions]

async def waits(prompts, completions):
    THREADS["waits"].add(threading.get_ident())
    return [random.random() for _ in completions]
"""


def every_kind(tmp_path: Path, url: str) -> list[Reward]:
    path = tmp_path / "functions.py"
    path.write_text(CODE)
    ids = ModelReward("ids", 0.5, models, "ids", Batching(2), CPU)
    return [
        FunctionReward("waits", 2.0, f"{path}:waits"),
        ids,
        FunctionReward("plain", 1.0, f"{path}:plain"),
        served(url),
    ]


def same(a: Scores, b: Scores) -> bool:
    tensors = [(a.reward, b.reward), (a.ref_logprobs, b.ref_logprobs), *((a.parts[n], b.parts[n]) for n in a.parts)]
    return list(a.parts) == list(b.parts) and all(torch.equal(x, y) for x, y in tensors)


def test_the_scores_are_those_of_one_thread_bit_for_bit(tmp_path: Path) -> None:
    """Random draws of functions included. A plain function keeps the thread of the run; one that waits has another."""
    with serving(rewarded) as server:
        apart = every_kind(tmp_path, server.url)
        beside = collect(apart, Events()).scores
        waits, plain = (reward.function.__globals__["THREADS"] for reward in (apart[0], apart[2]))  # type: ignore[attr-defined]
        assert plain["plain"] == {threading.get_ident()} and waits["waits"].isdisjoint(plain["plain"])
        alone = collect(every_kind(tmp_path, server.url), Events(), overlaps=False).scores
    assert list(beside.parts) == ["waits", "ids", "plain", "server"]
    assert same(beside, alone)


def test_a_reward_that_cannot_be_had_ends_the_step() -> None:
    """When it is known, and not behind the last chunk; nothing more is asked then."""
    events = Events()

    def answer(body: Any) -> Any:
        events.note(f"asked {chunk_of(body)}")
        return {"rewards": "none"}

    class Known(Sampling):
        """Samples the last chunk when the first answer has arrived."""

        def generate(self, prompts: PromptBatch, *given: Any) -> Rollout:
            if int(prompts.row_id[0]) == 2 * (CHUNKS - 1):
                threads = [t for t in threading.enumerate() if t.name == "beside"]
                for thread in threads:
                    thread.join(SOON_S)
            return super().generate(prompts, *given)

    passes = []

    def calls(*given: Any) -> Tensor:
        passes.append(given)
        return models(*given)

    with serving(answer) as server:
        scorer = Scorer(calls, [served(server.url)], texts, 1.0, Batching(2), CPU)
        collector = LocalCollector(Known(events), scorer, Session(0, 1, CPU, 1, NullConsole()), 2, 0)  # type: ignore[arg-type]
        prompts = [TokenisedPrompt((3, 4), Row("f:1", Prompt("a"))) for _ in range(2 * CHUNKS)]
        with pytest.raises(Interrupted, match="server: did not answer with rewards"):
            collector.collect(prompts, [3] * len(prompts), ActiveAdapter("policy"), Decoding((2,)), "rollout", 1)
    assert len(passes) < CHUNKS, "the last chunk was not scored; a quick answer may spare one more"


def test_one_thread_beside_does_its_work_in_order_and_ends() -> None:
    beside, done, gate, begun = Beside(), list[int](), threading.Event(), threading.Event()

    def work(number: int) -> int:
        begun.set()
        gate.wait(SOON_S)
        done.append(number)
        return number

    def thread() -> threading.Thread:
        return next(t for t in threading.enumerate() if t.name == "beside")

    futures = [beside.begin(partial(work, number)) for number in range(4)]
    assert begun.wait(SOON_S)
    first, last = thread(), beside.begin(partial(work, 4))
    beside.drop()
    gate.set()
    assert futures[0].result(SOON_S) == 0
    first.join(SOON_S)
    assert not first.is_alive() and done == [0] and not last.done(), "what had not begun is forgotten"
    assert [f.result(SOON_S) for f in [beside.begin(partial(work, number)) for number in range(4)]] == [0, 1, 2, 3]
    with pytest.raises(ZeroDivisionError):
        beside.begin(lambda: 1 // 0).result(SOON_S)
