"""What a stage would make of a data file, before anything is trained: format, counts, lengths, what is left out and why, and rows
as the model will read them, with what is learnt of them. Needs a tokenizer, no weights.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from rlhf_ray.config import SFTConfig
from rlhf_ray.data.formats import RowKind
from rlhf_ray.data.load import load_rows
from rlhf_ray.data.records import Row
from rlhf_ray.data.templates import Template, load_template, unused_chat_template
from rlhf_ray.data.tokenise import (
    IGNORE_INDEX,
    TokenisedPair,
    TokenisedPrompt,
    TokenisedRow,
    TooLong,
    tokenise_pairs,
    tokenise_prompts,
    tokenise_sft,
)
from rlhf_ray.models.tokenizer import load_tokenizer

Stage = Literal["sft", "dpo", "reward", "ppo"]
Piece = tuple[str, bool]
"""A text, and whether it is learnt."""
KINDS: dict[Stage, RowKind] = {"sft": "sft", "dpo": "preference", "reward": "preference", "ppo": "prompt"}
UNLIMITED = 2**30
BAR, COLUMN = 40, 12
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
LEARNT, PLAIN = "\033[30;42m", "\033[0m"


def check_data(config: SFTConfig, stage: Stage, shown_rows: int = 3, colour: bool = False) -> list[str]:
    """Lines for a person. config: data, model, template and lengths; of the reward and PPO stages, what they share with SFT.

    Rows that cannot be used are counted, whatever data.on_bad_row says; so are rows that are too long.   colour: ANSI colours on
    what is learnt, else it stands between \u00ab and \u00bb; control characters of the data are escaped.   PPO's limits (context,
    response_length, max_prompt_length) are its own: its prompts are held against a max_length only where the job sets one.

    Raises DataError if no row can be used; ConfigError, ArtifactError."""
    rows = load_rows(config.data.model_copy(update={"on_bad_row": "skip"}), KINDS[stage])
    tokenizer = load_tokenizer(config.model_name_or_path, config.revision)
    template = load_template(config.template, tokenizer, config.template_date, config.chat_template_kwargs)
    limit = UNLIMITED if stage == "ppo" and "max_length" not in config.model_fields_set else config.max_length
    too_long: TooLong = "truncate" if config.data.too_long == "truncate" else "drop"
    whole = _tokenise(config, stage, rows.train, template, tokenizer, UNLIMITED, "stop")
    done = _tokenise(config, stage, rows.train, template, tokenizer, limit, too_long)
    lines = [
        f"{item['path']}: {item['rows']:,} rows of format {item['format']}, read for {stage} with template {config.template}"
        for item in rows.manifest
    ]
    lines += [
        *rows.summary,
        *map(str, done.tallies),
        *(f"warning: {text}" for text in (*unused_chat_template(config, tokenizer), *rows.warnings, *done.warnings)),
    ]
    lines = [_escaped(line) for line in lines]
    lines += ["", *histogram([_length(example) for example in whole.examples], limit)]
    for example in done.examples[:shown_rows]:
        lines += ["", f"{_escaped(_where(example))}, {_length(example):,} tokens, as the model reads it"]
        lines += [_painted(pieces, colour) for pieces in _pieces(example, tokenizer)]
    return lines


def _tokenise(
    config: SFTConfig,
    stage: Stage,
    rows: Sequence[Row],
    template: Template,
    tokenizer: Any,
    max_length: int,
    too_long: TooLong,
) -> Any:
    shared: dict[str, Any] = {"on_bad_row": "skip", "special_tokens": config.data.special_tokens, "too_long": too_long}
    if stage == "ppo":
        return tokenise_prompts(rows, template, tokenizer, max_length=max_length, response_length=0, **shared)
    shared |= {"max_length": max_length, "add_eos_token": config.add_eos_token}
    if stage in ("dpo", "reward"):
        return tokenise_pairs(rows, template, tokenizer, **shared)
    turns: dict[str, Any] = {"train_on_inputs": config.train_on_inputs, "train_on_turns": config.train_on_turns}
    return tokenise_sft(rows, template, tokenizer, **shared, **turns)


def histogram(lengths: Sequence[int], limit: int) -> list[str]:
    """How many rows have which length, in bins of equal width up to the longest, and how many are over the limit."""
    if not lengths:
        return ["no row has a token"]
    ordered, bins = sorted(lengths), 8
    width = max(-(-ordered[-1] // bins), 1)
    counts = [sum(1 for n in ordered if i * width < n <= (i + 1) * width) for i in range(bins)]
    over = sum(1 for n in ordered if n > limit)
    middle, most = ordered[len(ordered) // 2], max(counts)
    lines = [f"tokens: {ordered[0]:,} to {ordered[-1]:,}, median {middle:,}"]
    lines[0] += f"; {over:,} over max_length {limit:,}" if limit < UNLIMITED else ""
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
