"""What a stage would make of a data file, before anything is trained: format, counts, lengths, what is left out and why, and rows
as the model will read them, with what is learnt of them. Needs a tokenizer, no weights.
"""

from __future__ import annotations

import itertools
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from rlhf_ray.config import STAGES, DPOConfig, JobFields, PPOConfig, RewardConfig, SFTConfig
from rlhf_ray.config.defaults import EVAL_MAX_ROWS
from rlhf_ray.data.formats import RowKind
from rlhf_ray.data.load import load_rows
from rlhf_ray.data.records import Row
from rlhf_ray.data.splits import Half
from rlhf_ray.data.stored import SLICE
from rlhf_ray.data.streamed import in_slices
from rlhf_ray.data.templates import Template, load_template, unused_chat_template
from rlhf_ray.data.tokenise import (
    IGNORE_INDEX,
    Tokenised,
    TokenisedPair,
    TokenisedPrompt,
    TokenisedRow,
    TooLong,
    tokenise_pairs,
    tokenise_prompts,
    tokenise_sft,
)
from rlhf_ray.errors import Problem
from rlhf_ray.models.context import context_length, usable_length
from rlhf_ray.models.sources import CONFIG_ERRORS, load_error, resolve_source
from rlhf_ray.models.tokenizer import load_tokenizer

Job: TypeAlias = SFTConfig | DPOConfig | RewardConfig | PPOConfig
Piece = tuple[str, bool]
"""A text, and whether it is learnt."""
READ_AS: dict[str, tuple[RowKind, Half | None]] = {
    "sft": ("sft", None),
    "dpo": ("preference", "reward"),
    "reward": ("preference", "reward"),
    "ppo": ("prompt", "ppo"),
}
"""Stage -> kind of its rows, and whose half of them it takes where stages are disjoint."""
UNLIMITED = 2**30
BAR, COLUMN = 40, 12
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
LEARNT, PLAIN = "\033[30;42m", "\033[0m"


@dataclass(frozen=True)
class DataCheck:
    """lines: for a person.   stops: what ends the job that the check has only counted."""

    lines: tuple[str, ...]
    stops: tuple[Problem, ...]


def check_data(config: JobFields, shown_rows: int = 3, colour: bool = False) -> DataCheck:
    """config: of an sft, dpo, reward or ppo job, of which data, model, template and lengths are read.

    Rows that cannot be used are counted, whatever data.on_bad_row says; so are rows that are too long.   colour: ANSI colours on
    what is learnt, else it stands between \u00ab and \u00bb; control characters of the data are escaped.

    Raises DataError if no row can be used; ConfigError, ArtifactError."""
    assert isinstance(config, (SFTConfig, DPOConfig, RewardConfig, PPOConfig))
    stage = next(name for name, cls in STAGES.items() if type(config) is cls)
    rows = load_rows(config.data.model_copy(update={"on_bad_row": "skip"}), *READ_AS[stage])
    tokenizer = load_tokenizer(config.model_name_or_path, config.revision)
    template = load_template(config.template, tokenizer, config.template_date, config.chat_template_kwargs)
    limit, room, what, notes = _limits(config, tokenizer)
    too_long: TooLong = "truncate" if config.data.too_long == "truncate" else "drop"
    most = config.data.eval_max_rows or EVAL_MAX_ROWS if stage == "ppo" else None
    done, held, lengths, shown = Tokenised[Any](), Tokenised[Any](), array("i"), list[Any]()
    for part in in_slices(rows.train, SLICE):
        whole = _tokenise(config, part, template, tokenizer, UNLIMITED, "stop")
        lengths.extend(map(_length, whole.examples))
        cut = _tokenise(config, part, template, tokenizer, limit, too_long)
        done.count(cut)
        shown += cut.examples[: shown_rows - len(shown)]
    for part in in_slices(itertools.islice(rows.held_out, most), SLICE):
        held.count(_tokenise(config, part, template, tokenizer, limit, too_long))
    bad = rows.skipped + done.skipped.total + held.skipped.total
    lines = [
        f"{item['path']}: {item['rows']:,} rows of format {item['format']}, read for {stage} with template {config.template}"
        for item in rows.manifest
    ]
    notes += [*unused_chat_template(config, tokenizer), *rows.warnings, *done.warnings]
    notes += [f"held out: {warning}" for warning in held.warnings]
    lines += [*rows.summary, *map(str, done.tallies), *(f"held out: {tally}" for tally in held.tallies)]
    lines = [_escaped(line) for line in (*lines, *(f"warning: {text}" for text in notes))]
    lines += ["", *histogram(lengths, room, what)]
    for example in shown:
        lines += ["", f"{_escaped(_where(example))}, {_length(example):,} tokens, as the model reads it"]
        lines += [_painted(pieces, colour) for pieces in _pieces(example, tokenizer)]
    return DataCheck(tuple(lines), tuple(_stops(config, bad, done.over + held.over)))


def _stops(config: Job, bad: int, over: int) -> Iterator[Problem]:
    if bad and config.data.on_bad_row == "stop":
        fix = "correct them; data.on_bad_row=skip leaves them out"
        yield Problem("data.on_bad_row: stop", "the job stops at rows that it cannot use", "none", f"{bad:,}", fix)
    if over and config.data.too_long == "stop":
        fix = "data.too_long=drop leaves them out, truncate cuts them"
        yield Problem("data.too_long: stop", "the job stops at rows that are too long", "none", f"{over:,}", fix)


def _limits(config: Job, tokenizer: Any) -> tuple[int, int, str, list[str]]:
    """(tokens of prompt and reply together; tokens of what is read here: in PPO, of the prompt; what sets these; warnings)."""
    from transformers import AutoConfig

    source = resolve_source(config.model_name_or_path, config.revision)
    try:
        text = AutoConfig.from_pretrained(str(source.folder), trust_remote_code=False).get_text_config()
    except CONFIG_ERRORS as error:
        raise load_error(source, error) from error
    context = context_length(text, tokenizer)
    reply = config.response_length if isinstance(config, PPOConfig) else None
    limit, notes = usable_length(config.max_length, context, text, reply)
    what = "max_length" if config.max_length == limit else "the model's context"
    if not isinstance(config, PPOConfig):
        return limit, limit, what, notes
    room = limit - config.response_length
    if config.max_prompt_length is not None and config.max_prompt_length < room:
        return limit, config.max_prompt_length, "max_prompt_length", notes
    return limit, room, f"{what} less response_length", notes


def _tokenise(
    config: Job,
    rows: Sequence[Row],
    template: Template,
    tokenizer: Any,
    max_length: int,
    too_long: TooLong,
) -> Any:
    """max_length: UNLIMITED is for whole rows, without any other limit either."""
    shared: dict[str, Any] = {
        "on_bad_row": "skip",
        "special_tokens": config.data.special_tokens,
        "too_long": too_long,
        "max_length": max_length,
    }
    if isinstance(config, PPOConfig):
        reply, most = config.response_length, config.max_prompt_length
        reply, most = (0, None) if max_length == UNLIMITED else (reply, most)
        return tokenise_prompts(rows, template, tokenizer, response_length=reply, max_prompt_length=most, **shared)
    shared |= {"add_eos_token": config.add_eos_token}
    if not isinstance(config, SFTConfig):
        return tokenise_pairs(rows, template, tokenizer, **shared)
    turns: dict[str, Any] = {"train_on_inputs": config.train_on_inputs, "train_on_turns": config.train_on_turns}
    return tokenise_sft(rows, template, tokenizer, **shared, **turns)


def histogram(lengths: Sequence[int], limit: int, what: str = "max_length") -> list[str]:
    """How many rows have which length, in bins of equal width up to the longest, and how many are over the limit, which `what`
    sets."""
    if not lengths:
        return ["no row has a token"]
    ordered, bins = sorted(lengths), 8
    width = max(-(-ordered[-1] // bins), 1)
    counts = [sum(1 for n in ordered if i * width < n <= (i + 1) * width) for i in range(bins)]
    over = sum(1 for n in ordered if n > limit)
    middle, most = ordered[len(ordered) // 2], max(counts)
    lines = [f"tokens: {ordered[0]:,} to {ordered[-1]:,}, median {middle:,}"]
    lines[0] += f"; {over:,} over {what} {limit:,}"
    for i, count in enumerate(counts):
        name = f"{i * width + 1:,}-{(i + 1) * width:,}"
        lines.append(f"{name:>{COLUMN}} {'#' * -(-BAR * count // most):{BAR}} {count:,}")
    return lines


def _escaped(text: str) -> str:
    """With control characters, but line ends and tabs, as Python writes them: some would be orders to the terminal."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def _length(example: TokenisedRow | TokenisedPair | TokenisedPrompt) -> int:
    if isinstance(example, TokenisedPair):
        return max(len(example.chosen_ids), len(example.rejected_ids))
    return len(example.input_ids if isinstance(example, TokenisedRow) else example.ids)


def _where(example: TokenisedRow | TokenisedPair | TokenisedPrompt) -> str:
    return example.row.where if isinstance(example, TokenisedPrompt) else example.where


def _pieces(example: TokenisedRow | TokenisedPair | TokenisedPrompt, tokenizer: Any) -> Iterator[list[Piece]]:
    """Of each sequence that the model reads. A pair's replies count as learnt: they are what is compared."""
    if isinstance(example, TokenisedPrompt):
        yield _runs(tokenizer, example.ids, [False] * len(example.ids))
    elif isinstance(example, TokenisedRow):
        yield _runs(tokenizer, example.input_ids, [label != IGNORE_INDEX for label in example.labels])
    else:
        for ids in (example.chosen_ids, example.rejected_ids):
            yield _runs(tokenizer, ids, [i >= example.prompt_length for i in range(len(ids))])


def _runs(tokenizer: Any, ids: Sequence[int], learnt: Sequence[bool]) -> list[Piece]:
    """Texts of runs of tokens, special tokens as they are spelled."""
    found, before = [], ""
    at = 0
    for is_learnt, run in itertools.groupby(learnt):
        at += len(list(run))
        text = str(tokenizer.decode(list(ids[:at])))
        found.append((text[len(before) :], is_learnt))
        before = text
    return found


def _painted(pieces: Sequence[Piece], colour: bool) -> str:
    start, end = (LEARNT, PLAIN) if colour else ("\u00ab", "\u00bb")
    lines = [
        [f"{start}{line}{end}" if is_learnt and line else line for line in _escaped(text).split("\n")]
        for text, is_learnt in pieces
    ]
    return "".join("\n".join(part) for part in lines)
