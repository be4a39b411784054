"""Policies that are not loaded here: replies in a file, or of a model that is served elsewhere. They join the others as a rollout,
so that they are scored, measured and judged like them; what needs log-probabilities (KL) they have not."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf_ray.batches import Rollout
from rlhf_ray.config import DataConfig, EndpointConfig, EvaluateConfig, PolicySpec
from rlhf_ray.data.collate import TokenisedPrompt, pad_left, pad_right
from rlhf_ray.data.continuation import texts_after_prompts
from rlhf_ray.data.encode import encode_texts
from rlhf_ray.data.formats import FORMATS, Dropped
from rlhf_ray.data.lines import BadRow
from rlhf_ray.data.records import Row, read_rows
from rlhf_ray.errors import ConfigError, DataError, Problem
from rlhf_ray.maths.rng import row_seed
from rlhf_ray.models.backbone import Backbone
from rlhf_ray.rewards.build import request_limits
from rlhf_ray.rewards.http_client import HttpClient, check_reachable, credentials
from rlhf_ray.rewards.llm_judge import read_completion
from rlhf_ray.storage.answers import MISSING, Answers, digest

_LONE = re.compile("[\ud800-\udfff]")
"""Half a character, as a server sends it whose reply was cut there: no tokenizer takes it. The answer is kept as it came."""


@dataclass(frozen=True)
class Replies:
    """texts, finished: one to each prompt; finished: it ended by itself."""

    texts: list[str]
    finished: list[bool]


def replies_in_file(spec: PolicySpec, config: EvaluateConfig) -> dict[str, str]:
    """{canonical prompt: reply} of a file of outputs; of rows that ask the same the first counts. Nothing is a reply, too, which
    may lose. Raises DataError, ConfigError."""
    data = DataConfig(train=(str(spec.outputs),), held_out_fraction=0.0, on_bad_row=config.data.on_bad_row)
    read = read_rows(data, "prompt")
    form = FORMATS[read.files[0].format]
    if not form.gives("sft"):
        raise DataError.at(str(spec.outputs), "has prompts and no replies", "rows of a prompt and its reply each")
    found: dict[str, str] = {}
    problems = []
    for row in read.rows:
        prompt, reply = row.prompt, ""
        try:
            parsed = form.parse(row.columns, "sft")
            prompt, reply = parsed.prompt, parsed.completion or ""
        except Dropped:
            continue
        except BadRow as bad:
            if bad.reason != "empty completion":
                problems.append(Problem(row.where, bad.message, fix=bad.fix))
                continue
        found.setdefault(prompt.canonical(), reply)
    if data.on_bad_row == "stop":
        DataError.raise_all(problems)
    return found


def with_replies(rows: Sequence[Row], outputs: Mapping[str, Mapping[str, str]]) -> tuple[list[Row], dict[str, int]]:
    """The rows that every file of outputs has a reply to, and how many each of them lacks. Raises ConfigError if none is left.

    outputs: by policy."""
    lacks = {name: sum(row.prompt.canonical() not in found for row in rows) for name, found in outputs.items()}
    kept = [row for row in rows if all(row.prompt.canonical() in found for found in outputs.values())]
    if rows and not kept:
        name = max(lacks, key=lambda policy: lacks[policy])
        raise ConfigError.at(
            f"policies.{name}.outputs",
            "has no reply to any prompt of the evaluation",
            "rows that ask the same instruction and input",
            fix="name that file in data.eval, or the prompts that it answers",
        )
    return kept, {name: count for name, count in lacks.items() if count}


class ServedPolicy:
    """A model behind an endpoint. answers: what it said is kept there: an evaluation that is started again asks for the rest.

    Raises ConfigError, ResourceError: a key is missing, nobody listens."""

    def __init__(self, name: str, endpoint: EndpointConfig, config: EvaluateConfig, answers: Answers) -> None:
        self.endpoint, self.config, self.answers = endpoint, config, answers
        where = f"policies.{name}.endpoint"
        url = f"{endpoint.base_url.rstrip('/')}/chat/completions"
        headers = credentials(where, endpoint.headers_file, endpoint.api_key_env)
        self.client = HttpClient(f"policy {name} ({url})", url, headers, accept=_said, **request_limits(endpoint))
        check_reachable(f"{where}.base_url", endpoint.base_url)

    def answer(self, prompts: Sequence[TokenisedPrompt], role: str) -> Replies:
        """A reply to each prompt, by the job's decoding; row i has the seed that row i of every policy has. Raises Interrupted."""
        bodies = [self._body(prompt, i, role) for i, prompt in enumerate(prompts)]
        keys = [digest([self.client.url, body]) for body in bodies]
        found: dict[str, Any] = {key: self.answers.get(key) for key in keys}
        missing = [i for i, key in enumerate(keys) if found[key] is MISSING and keys.index(key) == i]
        asked = self.client.ask_all(
            [bodies[i] for i in missing], done=lambda n, said: self.answers.keep(keys[missing[n]], said)
        )
        found |= {keys[i]: said for i, said in zip(missing, asked)}
        texts = [_LONE.sub("\ufffd", found[key]["text"]) for key in keys]
        return Replies(texts, [found[key]["finished"] for key in keys])

    def _body(self, prompt: TokenisedPrompt, row: int, role: str) -> dict[str, Any]:
        sampling, messages = self.config.sampling, prompt.row.prompt.as_messages()
        body: dict[str, Any] = {
            "model": self.endpoint.model,
            "messages": [{"role": m.role, "content": m.content} for m in messages],
            "max_tokens": self.config.response_length,
        }
        if not sampling.do_sample:
            return body | {"temperature": 0}
        body |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
        body |= {"top_k": sampling.top_k} if sampling.top_k else {}
        return body | {"seed": row_seed(self.config.seed, role, 0, row) % 2**31}


def _said(answer: Any) -> dict[str, Any]:
    """What is kept of a reply. ValueError if it is no chat completion."""
    found = read_completion(answer)
    return {"text": found["text"], "finished": answer["choices"][0].get("finish_reason") == "stop"}


def as_rollout(
    prompts: Sequence[TokenisedPrompt], replies: Replies, backbone: Backbone, end_id: int, limit: int
) -> tuple[Rollout, int]:
    """The replies as if they had been sampled here, log-probabilities 0; and how many are cut to what the models can read.

    end_id: ends a reply that ended by itself.  limit: tokens of prompt and reply together."""
    encoded = encode_texts(backbone.tokenizer, texts_after_prompts(backbone.tokenizer, replies.texts))
    whole = [[*ids, end_id] if ended or not ids else ids for ids, ended in zip(encoded, replies.finished, strict=True)]
    rooms = [limit - len(prompt.ids) for prompt in prompts]
    cut = [len(ids) > room for ids, room in zip(whole, rooms)]
    before, real_before = pad_left([prompt.ids for prompt in prompts], backbone.pad_id)
    after, real_after = pad_right([ids[:room] for ids, room in zip(whole, rooms)], backbone.pad_id)
    rollout = Rollout(
        torch.cat([before, after], dim=1),
        real_before,
        real_after,
        torch.zeros(after.shape),
        torch.tensor([ended and not short for ended, short in zip(replies.finished, cut)]),
        torch.arange(len(prompts)),
    )
    return rollout, sum(cut)
