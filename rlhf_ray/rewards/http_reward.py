"""A reward that lives on a server. Its protocol, version 1, is one POST per batch of replies, JSON both ways:

    {"version": 1,
     "ids": ["0", "1"],                           names of the replies in this request
     "prompts": ["...", "..."],                   as the policy read them; lists of messages where the data's `prompt` is one
     "completions": ["...", "..."],               without special tokens; then a list of one assistant message each
     "finished": [true, false],                   whether the reply ended by itself
     "columns": {"answer": ["4", "7"], ...},      columns of the data that all rows have
     "query": ["...", "..."],                     prompt and completion as one text
     "tokenizer_sha256": "...", "prompt_ids": [[1, 5], [1, 7]], "completion_ids": [[9, 2], [4]]}     not of texts (`score --url`)

    {"ids": ["0", "1"], "rewards": [0.25, null]}

A number per reply; null where the reward does not apply. `ids` of the answer may be in any order, and rewards go by them; an answer
without ids is taken in the order of the request. So OpenRLHF's reward servers fit as they are (they read `query`, and answer with
`rewards`). `rlhf-ray serve` speaks this protocol under /v1/score: where the tokenizer is its own it reads the very ids.

What a server said to a request is kept (storage/answers.py) before it is used: a run that is killed and resumed samples the same
replies again, and gets the same rewards, whatever the server would say by then.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.config import RewardSource
from rlhf_ray.errors import Interrupted
from rlhf_ray.rewards.http_client import HttpClient, check_reachable, credentials
from rlhf_ray.rewards.protocol import Reward, RewardInputs, Texts
from rlhf_ray.rewards.sources import checked_rewards, shared_columns, spoken
from rlhf_ray.storage.answers import MISSING, Answers, digest

VERSION = 1
FIX = "fix the server"


class HttpReward(Reward):
    """batch_size: replies per request.  answers: where what was said is kept; None to keep nothing.  tokenizer_sha256: of the
    policy's tokenizer, for servers that have the same one; empty where texts are scored that no tokenizer here has read: then no
    ids are sent."""

    waits = True

    def __init__(
        self,
        name: str,
        weight: float,
        client: HttpClient,
        batch_size: int,
        answers: Answers | None,
        tokenizer_sha256: str = "",
    ) -> None:
        self.name, self.weight, self.client, self.batch_size = name, weight, client, batch_size
        self.answers, self.tokenizer_sha256 = answers, tokenizer_sha256

    def score(self, inputs: RewardInputs) -> Tensor:
        """f32[rows]: what the server says, NaN for null, infinite for NaN. Raises Interrupted if it cannot be asked, or
        answers with anything but a number per reply."""
        rollout = inputs.rollout
        prompt_ids = [ids[mask].tolist() for ids, mask in zip(rollout.prompt_ids, rollout.prompt_mask)]
        return self.score_texts(inputs.texts, inputs.finished, prompt_ids)

    def score_texts(self, texts: Texts, finished: Sequence[bool], prompt_ids: Sequence[list[int]]) -> Tensor:
        """`score` of texts. finished, prompt_ids: of each."""
        rows = len(texts.prompts)
        batches = [range(i, min(i + self.batch_size, rows)) for i in range(0, rows, self.batch_size)]
        bodies = [self._body(texts, finished, prompt_ids, batch) for batch in batches]
        keys = [digest([self.name, body]) for body in bodies]
        found: list[Any] = [MISSING if self.answers is None else self.answers.get(key) for key in keys]
        asked = [i for i, answer in enumerate(found) if answer is MISSING]

        def keep(number: int, answer: Any) -> Any:
            rewards = by_id(answer, bodies[asked[number]]["ids"], self.client.where)
            told = checked_rewards(rewards, len(rewards), self.client.where, FIX)
            is_broken = bool(torch.isinf(told).any())
            rewards = [None if math.isnan(x) else x for x in told.tolist()]
            return rewards if self.answers is None or is_broken else self.answers.keep(keys[asked[number]], rewards)

        for i, answer in zip(asked, self.client.ask_all([bodies[i] for i in asked], done=keep)):
            found[i] = answer
        return torch.tensor([math.nan if x is None else x for answer in found for x in answer], dtype=torch.float32)

    def _body(
        self, texts: Texts, finished: Sequence[bool], prompt_ids: Sequence[list[int]], rows: range
    ) -> dict[str, Any]:
        start, stop = rows.start, rows.stop
        some = Texts(
            texts.prompts[start:stop],
            texts.completions[start:stop],
            texts.completion_ids[start:stop],
            texts.columns[start:stop],
        )
        body = {
            "version": VERSION,
            "ids": [str(i) for i in rows],
            **spoken(some),
            "finished": [bool(finished[i]) for i in rows],
            "columns": plain(shared_columns(some)),
            "query": [prompt + said for prompt, said in zip(some.prompts, some.completions)],
        }
        if not self.tokenizer_sha256:
            return body
        return {
            **body,
            "tokenizer_sha256": self.tokenizer_sha256,
            "prompt_ids": [list(prompt_ids[i]) for i in rows],
            "completion_ids": [list(ids) for ids in some.completion_ids],
        }


def make_http_reward(reward: RewardSource, answers: Answers | None, tokenizer_sha256: str = "") -> HttpReward:
    """The reward server that `reward` names. answers, tokenizer_sha256: of `HttpReward`.

    ConfigError: its key is not there; ResourceError: nobody listens."""
    where, url = f"rewards.{reward.name}", str(reward.url)
    headers = credentials(where, reward.headers_file, reward.api_key_env)
    check_reachable(f"{where}.url", url)
    client = HttpClient(
        f"reward {reward.name} ({url})",
        url,
        headers,
        timeout_s=float(reward.timeout_s or 0.0),
        max_retries=int(reward.max_retries or 0),
        concurrency=int(reward.concurrency or 1),
    )
    return HttpReward(reward.name, reward.weight, client, int(reward.batch_size or 1), answers, tokenizer_sha256)


def by_id(answer: Any, ids: Sequence[str], where: str) -> list[Any]:
    """The rewards of an answer in the order of `ids`. Raises Interrupted if they are not those of exactly the replies asked for."""
    if not isinstance(answer, dict) or not isinstance(answer.get("rewards"), list):
        has = f"object with {', '.join(map(str, answer)) or 'nothing'}"[:100] if isinstance(answer, dict) else ""
        got = has or type(answer).__name__
        raise Interrupted.at(where, "did not answer with rewards", '{"ids": [...], "rewards": [...]}', got, FIX)
    rewards, given = answer["rewards"], answer.get("ids")
    if given is None and len(rewards) == len(ids):
        return rewards
    if len(rewards) != len(ids) or not isinstance(given, list) or len(given) != len(rewards):
        got = f"{len(rewards)} rewards" + (f", {len(given)} ids" if isinstance(given, list) else "")
        raise Interrupted.at(where, "answered with the wrong number of rewards", str(len(ids)), got, FIX)
    found = dict(zip(map(str, given), rewards))
    if found.keys() != set(ids):
        strange = next((i for i in map(str, given) if i not in ids), None)
        got = f"id {strange[:40]!r}" if strange is not None else "an id twice"
        raise Interrupted.at(where, "answered with other ids than it was asked about", "each of them once", got, FIX)
    return [found[i] for i in ids]


def plain(value: Any) -> Any:
    """A column of a data file as JSON: what JSON cannot say (dates, bytes) as text, NaN and infinity as null."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)
