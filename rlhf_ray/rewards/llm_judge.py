"""A language model as judge, behind an OpenAI-compatible endpoint: one reply rated, or two compared.

A pool of annotators (prompts, temperatures, models) as in AlpacaFarm (Dubois et al. 2023, arXiv:2305.14387): which member judges
the replies to a prompt is drawn by seed from the prompt, so it is the same one for every policy. Pairs are asked about in both
orders, and one reply wins if it is preferred both times (Zheng et al. 2023, arXiv:2306.05685). Every answer is kept by its content
before it is used: what is there is not asked, or paid, again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.config import AnnotatorConfig, LLMJudgeConfig
from rlhf_ray.maths.rng import derived_seed
from rlhf_ray.rewards.http_client import HttpClient
from rlhf_ray.rewards.judge_prompts import (
    DRAW,
    FIRST,
    SECOND,
    JudgePrompt,
    load_prompt,
    verdict_form,
)
from rlhf_ray.rewards.judge_usage import JudgeUsage
from rlhf_ray.rewards.protocol import Reward, RewardInputs
from rlhf_ray.storage.answers import MISSING, Answers, digest

VERSION = 1
"""Of what is kept of an answer."""
REFUSED: dict[str, Any] = {"text": "", "refused": True, "prompt_tokens": None, "completion_tokens": None}
"""What an endpoint says that does not take a question."""
_OF_ONE_QUESTION = ("context_length", "context length", "content_filter", "content_policy", "string_above_max_length")


@dataclass(frozen=True)
class Opinion:
    """What came of one question. value: a score or a verdict, None if there is none: refused, or unparsable to the end."""

    value: int | None
    refused: bool = False
    unparsable: bool = False


@dataclass(frozen=True)
class PairOpinion:
    """code: 0 draw, 1 or 2 the better one, None if an answer was refused or unparsable.  flipped: it went with the order."""

    code: int | None
    refused: bool = False
    unparsable: bool = False
    flipped: bool = False


@dataclass(frozen=True)
class _Annotator:
    prompt: JudgePrompt
    temperature: float
    model: str


@dataclass
class _Question:
    """messages: so far.  salt: of the seed of its verdict."""

    annotator: _Annotator
    messages: list[dict[str, str]]
    salt: str


class LLMJudge:
    """name: of the reward.  client: for the endpoint's /chat/completions, with `accept=read_completion` and
    `accept_error=read_refusal`.  answers: what is kept.

    progress: told how many questions of how many are answered."""

    def __init__(
        self,
        name: str,
        config: LLMJudgeConfig,
        client: HttpClient,
        answers: Answers,
        usage: JudgeUsage,
        progress: Callable[[int, int], None] = lambda done, of: None,
    ) -> None:
        self.name, self.config, self.client, self.answers, self.usage = name, config, client, answers, usage
        self.progress = progress
        where = f"rewards.{name}.llm.annotators"
        self.pool = [
            _Annotator(load_prompt(a.prompt, config.mode, where), a.temperature, a.model or config.model)
            for a in config.annotators or (AnnotatorConfig(),)
        ]
        self.form = verdict_form(config.mode, config.structured_output, config.min_score, config.max_score)

    def rate(self, instructions: Sequence[str], outputs: Sequence[str]) -> list[Opinion]:
        """A score for each reply. Raises Interrupted: the endpoint cannot be asked, or a limit is reached; start it again, and what
        was answered is not asked again."""
        low, high = self.config.min_score, self.config.max_score
        questions = [
            self._question(i, output=o, min_score=low, max_score=high)
            for i, o in zip(instructions, outputs, strict=True)
        ]
        return self._ask(questions)

    def compare(self, instructions: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]) -> list[PairOpinion]:
        """Which of two replies to each prompt is better; those that read the same draw, without a question. Raises as `rate`."""
        questions: list[_Question] = []
        asked: list[
            list[tuple[int, bool]]
        ] = []  # of each pair: numbers of its questions, and whether they were exchanged
        for instruction, first, second in zip(instructions, firsts, seconds, strict=True):
            orders = [] if first == second else self._orders(instruction)
            asked.append([(len(questions) + k, exchanged) for k, exchanged in enumerate(orders)])
            for exchanged in orders:
                one, other = (second, first) if exchanged else (first, second)
                questions.append(self._question(instruction, output_1=one, output_2=other))
        found = self._ask(questions)
        return [_together([(found[number], exchanged) for number, exchanged in pair]) for pair in asked]

    def _orders(self, instruction: str) -> list[bool]:
        if self.config.both_orders:
            return [False, True]
        return [bool(derived_seed(self.config.seed, "order", instruction) % 2)]

    def _question(self, instruction: str, **values: str | int) -> _Question:
        drawn = derived_seed(self.config.seed, "annotator", instruction) % len(self.pool)
        annotator = self.pool[drawn]
        messages = annotator.prompt.messages(instruction=instruction, **values)
        messages[-1]["content"] += self.form.behind
        return _Question(annotator, messages, instruction)

    def _ask(self, questions: Sequence[_Question]) -> list[Opinion]:
        found: list[Opinion] = [Opinion(None, unparsable=True)] * len(questions)
        open_ = list(range(len(questions)))
        for attempt in range(self.config.verdict_retries + 1):
            answers = self._answers([self._body(questions[i], attempt) for i in open_])
            still = []
            for i, answer in zip(open_, answers):
                value = self.form.read(answer["text"])
                if answer["refused"]:
                    found[i] = Opinion(None, refused=True)
                elif value is not None:
                    found[i] = Opinion(value)
                else:
                    again = {"role": "user", "content": self.form.again}
                    questions[i].messages += [{"role": "assistant", "content": answer["text"]}, again]
                    still.append(i)
            open_ = still
        return found

    def _body(self, question: _Question, attempt: int) -> dict[str, Any]:
        annotator = question.annotator
        body: dict[str, Any] = {"model": annotator.model, "messages": list(question.messages)}
        body["temperature"] = annotator.temperature
        if self.config.max_tokens is not None:
            body["max_tokens"] = self.config.max_tokens
        if self.form.response_format is not None:
            body["response_format"] = self.form.response_format
        if annotator.temperature:
            body["seed"] = derived_seed(self.config.seed, "verdict", question.salt, attempt) % 2**31
        return body

    def _answers(self, bodies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The answer to each, from what is kept or from the endpoint; equal questions are asked once."""
        keys = [digest(["judge", VERSION, self.client.url, body]) for body in bodies]
        found = {key: self.answers.get(key) for key in keys}
        missing = [i for i, key in enumerate(keys) if found[key] is MISSING and keys.index(key) == i]
        self.usage.cached += len(found) - len(missing)
        done = len(bodies) - len(missing)

        def keep(number: int, answer: dict[str, Any]) -> Any:
            nonlocal done
            done += 1
            if answer is REFUSED:  # free, and another time it may be taken
                return answer
            kept = self.answers.keep(keys[missing[number]], answer)
            self.usage.add(answer)
            self.progress(done, len(bodies))
            return kept

        asked = self.client.ask_all([bodies[i] for i in missing], self.usage.require_left, keep)
        found |= {keys[i]: answer for i, answer in zip(missing, asked)}
        return [found[key] for key in keys]


def read_completion(answer: Any) -> dict[str, Any]:
    """What is kept of a chat completion: {text, refused, prompt_tokens, completion_tokens}, tokens None where they are not told.

    refused: by the model (`refusal`) or by a filter before it. ValueError if it is no chat completion."""
    try:
        choice = answer["choices"][0]
        text, refusal = choice["message"].get("content"), choice["message"].get("refusal")
        usage = answer.get("usage") or {}
        if not isinstance(text, (str, type(None))):
            raise TypeError("content")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ValueError("did not answer with a chat completion (choices[0].message.content)") from None
    return {
        "text": text or "",
        "refused": bool(refusal) or choice.get("finish_reason") == "content_filter",
        **{
            name: _count(usage.get(name)) if isinstance(usage, dict) else None
            for name in ("prompt_tokens", "completion_tokens")
        },
    }


def _count(value: Any) -> int | None:
    """None for what is no number of tokens."""
    is_one = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 and value == value // 1
    return int(value) if is_one else None


def read_refusal(status: int, answer: Any) -> dict[str, Any] | None:
    """REFUSED for an error that is about this question alone: longer than the judge's context, stopped by a filter. None else."""
    error = answer.get("error") if isinstance(answer, dict) else None
    if status not in (400, 413, 422) or not isinstance(error, dict):
        return None
    told = f"{error.get('code')} {error.get('type')} {error.get('message')}".lower()
    return REFUSED if any(sign in told for sign in _OF_ONE_QUESTION) else None


def _together(opinions: Sequence[tuple[Opinion, bool]]) -> PairOpinion:
    """What the orders of one pair say together. No opinion: the replies read the same."""
    exchange = {DRAW: DRAW, FIRST: SECOND, SECOND: FIRST}
    values = [o.value if o.value is None or not exchanged else exchange[o.value] for o, exchanged in opinions]
    refused, unparsable = any(o.refused for o, _ in opinions), any(o.unparsable for o, _ in opinions)
    if None in values:
        return PairOpinion(None, refused, unparsable)
    flipped = len(values) == 2 and {FIRST, SECOND} == set(values)
    return PairOpinion(values[0] if len(set(values)) == 1 else DRAW, flipped=flipped)


class LLMReward(Reward):
    """A pointwise judge as a reward: its score, NaN where it refuses or is unparsable, which is counted."""

    waits = True

    def __init__(self, name: str, weight: float, judge: LLMJudge) -> None:
        self.name, self.weight, self.judge = name, weight, judge

    def score(self, inputs: RewardInputs) -> Tensor:
        return self.parts(inputs)[self.name]

    def parts(self, inputs: RewardInputs) -> dict[str, Tensor]:
        """f32[rows] each: also `<name>/refused` and `<name>/unparsable`, 1 where it was so."""
        found = self.judge.rate([row.prompt.plain() for row in inputs.rows], list(inputs.texts.completions))
        return {
            self.name: torch.tensor([math.nan if o.value is None else float(o.value) for o in found]),
            f"{self.name}/refused": torch.tensor([float(o.refused) for o in found]),
            f"{self.name}/unparsable": torch.tensor([float(o.unparsable) for o in found]),
        }
