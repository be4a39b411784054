"""The reward of texts: one reply, or every row of a file. Pairs also tell how often the reward model prefers the chosen reply.

A text is scored as PPO scores replies (rewards/scoring_model.py; by a server: rewards/http_reward.py). Runs in this process.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.config import DataConfig, RewardSource
from rlhf_ray.console import Console, LocalConsole, quiet_libraries
from rlhf_ray.data.formats import RowKind, detect
from rlhf_ray.data.prompts import Prompt
from rlhf_ray.data.records import Row, RowSet, read_rows
from rlhf_ray.data.templates import load_template
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.maths.standard_errors import standard_error
from rlhf_ray.maths.stats import preference_metrics, wilson_interval
from rlhf_ray.metrics import figure
from rlhf_ray.rewards.http_reward import make_http_reward
from rlhf_ray.rewards.protocol import Texts
from rlhf_ray.rewards.scoring_model import load_scoring_model
from rlhf_ray.rewards.sources import FunctionReward, none_broken
from rlhf_ray.runtime.session import process_session
from rlhf_ray.storage.rows_file import write_rows

CONFIDENCE = 0.95
ONE_ROW = "--completion"
NOT_SCORED = (
    "too long for the model, a reply without a token, or one that the function or server answers with no number"
)

Grade = Callable[[Sequence[Row], Sequence[str]], list[float | None]]
"""Rewards of replies to the rows' prompts; None for a reply that cannot be scored (too long, or no token)."""


@quiet_libraries()
def score(
    *,
    source: RewardSource,
    file: str | None = None,
    prompt: str | None = None,
    completion: str | None = None,
    out: str | None = None,
    template: str | None = None,
    num_threads: int | None = None,
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Score `completion` (as a reply to `prompt`), or every row of `file`, with a reward run, a reward checkpoint, a function or a
    reward server.

    template: default: the one the reward model was trained with; for a function or a server, the prompt as it is.

    Rows of replies give {where, prompt, completion, reward}. Rows of pairs give {where, prompt, chosen, rejected, reward_chosen,
    reward_rejected, correct}, and the console tells the accuracy with its 95 % Wilson interval. `out` gets the rows as JSON lines,
    or as one JSON list if its name ends in .json. Rows that cannot be scored are left out, counted and told.

    Raises ConfigError, DataError, ArtifactError; of a server ResourceError (nobody listens) and Interrupted (it does not answer as
    it should)."""
    console = console or LocalConsole()
    if (completion is None) == (file is None):
        raise ConfigError.at("score", "needs a completion or a file", "exactly one of the two")
    read = _read(file, console) if file is not None else None
    grade = grader_of(source, template, num_threads, console)
    if read is None:
        row = Row(ONE_ROW, Prompt(prompt or ""), completion=completion, columns={"prompt": prompt or ""})
        found = [{k: v for k, v in line.items() if k != "where"} for line in score_responses([row], grade, console)]
        if not found:
            raise DataError.at(ONE_ROW, f"cannot be scored: {NOT_SCORED}")
    elif read.rows[0].chosen is not None:
        found = score_pairs(read.rows, grade, console)
        console.log(pair_verdict(found))
    else:
        found = score_responses(read.rows, grade, console)
        console.log(response_verdict(found))
    if out is not None:
        write_rows(out, found)
    return found


def _read(file: str, console: Console) -> RowSet:
    """The file's rows as pairs where it has pairs, else as replies. Raises DataError."""
    data = DataConfig(train=(file,), on_bad_row="skip")
    first = read_rows(data, "prompt").rows[0]
    kinds: tuple[RowKind, ...] = ("preference", "sft")
    kind = next((kind for kind in kinds if detect(first.columns, kind) is not None), None)
    if kind is None:
        raise DataError.at(file, "has prompts and no replies to score", "pairs, or prompts with a reply each")
    read = read_rows(data, kind)
    for tally in (read.dropped, read.skipped):
        if tally.total:
            console.warn(f"{file}: {tally}")
    return read


def score_responses(rows: Sequence[Row], grade: Grade, console: Console) -> list[dict[str, Any]]:
    """One line per row that can be scored."""
    rewards = grade(rows, [row.completion or "" for row in rows])
    _tell_left_out([row for row, reward in zip(rows, rewards) if reward is None], console)
    return [
        {"where": row.where, "prompt": row.prompt.plain(), "completion": row.completion, "reward": reward}
        for row, reward in zip(rows, rewards)
        if reward is not None
    ]


def score_pairs(rows: Sequence[Row], grade: Grade, console: Console) -> list[dict[str, Any]]:
    """One line per pair both of whose replies can be scored. correct: the chosen one scores higher."""
    chosen = grade(rows, [row.chosen or "" for row in rows])
    rejected = grade(rows, [row.rejected or "" for row in rows])
    both = list(zip(rows, chosen, rejected))
    _tell_left_out([row for row, better, worse in both if better is None or worse is None], console)
    return [
        {
            "where": row.where,
            "prompt": row.prompt.plain(),
            "chosen": row.chosen,
            "rejected": row.rejected,
            "reward_chosen": better,
            "reward_rejected": worse,
            "correct": better > worse,
        }
        for row, better, worse in both
        if better is not None and worse is not None
    ]


def _tell_left_out(rows: Sequence[Row], console: Console) -> None:
    if rows:
        console.warn(f"{len(rows)} rows left out: {NOT_SCORED} (first {rows[0].where})")


def pair_verdict(rows: Sequence[dict[str, Any]]) -> str:
    """Accuracy (a tie counts half) with its 95 % Wilson interval, and the mean margin."""
    if not rows:
        return "no pair could be scored"
    margins = torch.tensor([row["reward_chosen"] - row["reward_rejected"] for row in rows], dtype=torch.float64)
    accuracy = preference_metrics(margins, torch.ones(len(rows), dtype=torch.bool))["accuracy"]
    low, high = wilson_interval(accuracy * len(rows), len(rows), CONFIDENCE)
    ties = int((margins == 0).sum())
    return (
        f"accuracy {accuracy:.1%} (95% interval {low:.1%} to {high:.1%}) of {len(rows)} pairs"
        + (f", {ties} ties counted half" if ties else "")
        + f"; mean margin {figure(float(margins.mean()))}"
    )


def response_verdict(rows: Sequence[dict[str, Any]]) -> str:
    """Mean reward with its standard error."""
    if not rows:
        return "no reply could be scored"
    rewards = [row["reward"] for row in rows]
    error = f" ± {figure(standard_error(rewards))}" if len(rows) > 1 else ""
    return f"mean reward {figure(sum(rewards) / len(rewards))}{error} of {len(rows)} replies"


def grader_of(source: RewardSource, template: str | None, num_threads: int | None, console: Console) -> Grade:
    if source.function is not None:
        return function_grader(source, template)
    if source.url is not None:
        return server_grader(source, template)
    return model_grader(source, template, num_threads, console)


def function_grader(source: RewardSource, template: str | None) -> Grade:
    """A Python function on texts. Raises ConfigError if it asks for token ids, which exist only where a model is."""
    reward = FunctionReward(source.name, source.weight, source.function or "")
    if "completion_ids" in inspect.signature(reward.function).parameters:
        raise ConfigError.at(
            "function", f"{source.function} reads completion_ids, but there is no tokenizer here", fix="use evaluate"
        )
    return _text_grader(reward.score_texts, template, f"reward {source.name} ({source.function})")


def server_grader(source: RewardSource, template: str | None) -> Grade:
    """A reward server on texts, by the protocol of rewards[].url; every reply is one that ended by itself, as in a data file."""
    reward = make_http_reward(source, None)

    def score_texts(texts: Texts) -> Tensor:
        return reward.score_texts(texts, [True] * len(texts.prompts), [])

    return _text_grader(score_texts, template, reward.client.where)


def _text_grader(score_texts: Callable[[Texts], Tensor], template: str | None, where: str) -> Grade:
    """Of what reads texts: prompts in `template`, which is none unless it is named."""
    prompt_template = load_template(template or "none")

    def grade(rows: Sequence[Row], responses: Sequence[str]) -> list[float | None]:
        prompts = [prompt_template.render(row.prompt) for row in rows]
        texts = Texts(prompts, list(responses), [[] for _ in rows], [row.columns for row in rows])
        found = none_broken(score_texts(texts), where)
        return [None if math.isnan(score) else score for score in found.tolist()]

    return grade


def model_grader(source: RewardSource, template: str | None, num_threads: int | None, console: Console) -> Grade:
    """A reward run or checkpoint on token ids."""
    model = load_scoring_model(source, template, process_session(console, num_threads).device, console)

    def grade(rows: Sequence[Row], responses: Sequence[str]) -> list[float | None]:
        return model.score(*model.reader.encode(rows, responses))

    return grade
