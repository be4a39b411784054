"""Rows to token ids, with the length rule applied and every row that it changes counted.

A reply is encoded apart from its prompt and ends in the end of turn (see encode.py) if `add_eos_token`; one that was cut does not.
`too_long`: stop (all rows over the limit in one DataError), drop, or truncate. Truncating cuts replies on the right, and bare
prompts on the left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from rlhf_ray.data.continuation import texts_after_prompts
from rlhf_ray.data.counts import Tally
from rlhf_ray.data.encode import (
    bos_ids,
    encode_prompts,
    encode_replies,
    end_of_turn,
    speakable_tokens,
    spelled_tokens,
)
from rlhf_ray.data.prompts import Prompt
from rlhf_ray.data.records import Row
from rlhf_ray.data.replies import Reply, ReplyWriter, reasoning_of
from rlhf_ray.data.templates import ChatTemplate, PromptMismatch, Template
from rlhf_ray.data.turns import Span, assistant_spans, earlier_turns
from rlhf_ray.errors import ConfigError, DataError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
TooLong = Literal["stop", "drop", "truncate"]
OnBadRow = Literal["stop", "skip"]
SpecialTokens = Literal["text", "parse"]
T = TypeVar("T")
Found = TypeVar("Found")
_NOTHING_LEFT = "reply empty after truncation"
_OVER = "over "


@dataclass(frozen=True, slots=True)
class TokenisedRow:
    """As stored.py keeps it: two lists of numbers, and what JSON can say.

    `labels` are `input_ids` where a loss is taken, else IGNORE_INDEX; not yet shifted, as transformers expects them."""

    input_ids: list[int]
    labels: list[int]
    where: str


@dataclass(frozen=True, slots=True)
class TokenisedPair:
    """As stored.py keeps it: two lists of numbers, and what JSON can say.

    Both sequences start with the same `prompt_length` prompt tokens.   margin: by how much chosen is better, 0 if not known.
    group: what the row's column of that name says, "" where there is none."""

    chosen_ids: list[int]
    rejected_ids: list[int]
    prompt_length: int
    where: str
    margin: float = 0.0
    group: str = ""


@dataclass(frozen=True, slots=True)
class TokenisedPrompt:
    """A prompt ready to be answered, and the row it is from."""

    ids: list[int]
    row: Row


@dataclass
class Tokenised(Generic[T]):
    """Examples in row order, and the rows that were skipped, dropped or truncated on the way, or not learnt in full."""

    examples: list[T] = field(default_factory=list)
    skipped: Tally = field(default_factory=lambda: Tally("skipped"))
    dropped: Tally = field(default_factory=lambda: Tally("dropped"))
    truncated: Tally = field(default_factory=lambda: Tally("truncated"))
    unlearnt: Tally = field(default_factory=lambda: Tally("not learnt in full"))
    spelled: Tally = field(default_factory=lambda: Tally("spell special tokens"))
    noted: Tally = field(default_factory=lambda: Tally("replies"))
    unread: Tally = field(default_factory=lambda: Tally("rows"))
    differing: Tally = field(default_factory=lambda: Tally("differ from the conversation rendered whole"))

    def count(self, other: Tokenised[T]) -> None:
        """Take over the rows that another one counts, which come after these; not its examples."""
        for item in fields(self):
            if isinstance(tally := getattr(self, item.name), Tally):
                tally.update(getattr(other, item.name))

    @property
    def tallies(self) -> list[Tally]:
        """Those that have rows."""
        return [t for t in (self.skipped, self.dropped, self.truncated, self.unlearnt) if t.total]

    @property
    def over(self) -> int:
        """Rows that were dropped for their length."""
        return sum(entry.count for reason, entry in self.dropped.reasons.items() if reason.startswith(_OVER))

    @property
    def warnings(self) -> list[str]:
        """What looks wrong with the rows."""
        return [str(tally) for tally in (self.unread, self.spelled, self.noted, self.differing) if tally.total]


def tokenise_sft(
    rows: Sequence[Row],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    too_long: TooLong,
    train_on_inputs: bool,
    train_on_turns: Literal["all", "last"],
    add_eos_token: bool,
    on_bad_row: OnBadRow = "stop",
    special_tokens: SpecialTokens = "text",
) -> Tokenised[TokenisedRow]:
    """Prompt and completion as one sequence of at most `max_length` tokens; the loss is on the completion and its end.

    train_on_turns: all also learns what the assistant said earlier in a conversation, each turn with the template's own end of it;
    last counts those turns as not learnt.

    special_tokens: parse reads what spells a control token as that token; text reads it as text, and counts the rows.

    Rows without a token to learn are dropped and counted (F30). Raises DataError, and ConfigError if no token ends a reply.
    """
    end = _end(tokenizer, template) if add_eos_token else []
    out, rule = Tokenised[TokenisedRow](), _LengthRule(max_length, too_long)
    parse = special_tokens == "parse"

    writer = ReplyWriter(tokenizer, template)

    def encode(rows: Sequence[Row]) -> tuple[list[list[int]], list[Reply], Mapping[int, list[Span]]]:
        prompts = _encode(tokenizer, template, parse, rows)
        turns = "none" if train_on_inputs else train_on_turns
        replies = _written(writer, rows, "completion")
        return prompts, replies, _earlier_turns(tokenizer, template, rows, prompts, bool(end), turns, parse)

    rows, (prompts, replies, earlier) = _accepted(rows, encode, on_bad_row, out)
    for i, row in enumerate(rows) if not train_on_inputs else ():
        if train_on_turns == "last" and row.is_conversation and earlier_turns(row.prompt):
            out.unlearnt.add("earlier turns of the assistant, train_on_turns: last", row.where)
        if i in earlier and len(earlier[i]) < len(earlier_turns(row.prompt)):
            out.unlearnt.add("turns that the chat template does not mark ({% generation %})", row.where)
        if row.is_conversation and not all(message.is_learnt for message in row.prompt.messages):
            out.unlearnt.add("messages with weight: 0", row.where)
    responses = _reply_ids(tokenizer, template, rows, replies, "completion", parse)
    _note_replies(rows, replies, out)
    _note_prompts(tokenizer, template, rows, parse, out)
    for i, (row, prompt, response) in enumerate(zip(rows, prompts, responses)):
        full = prompt + response + (end if response[-1:] != end else [])
        ids = rule.apply(row.where, full, out)
        if ids is None:
            continue
        said = [*earlier.get(i, ()), (len(prompt), len(full))]
        learnt = {at for start, stop in said for at in range(start, stop)}
        labels = [token if train_on_inputs or at in learnt else IGNORE_INDEX for at, token in enumerate(ids)]
        if len(ids) <= said[0][0] < len(full):
            out.dropped.add(_NOTHING_LEFT, row.where, f"{len(prompt):,} prompt tokens")
        elif all(label == IGNORE_INDEX for label in labels[1:]):  # the first token is never predicted
            out.dropped.add("no token to learn", row.where)
        else:
            out.examples.append(TokenisedRow(ids, labels, row.where))
            rule.count_cut(row.where, full, out)
    DataError.raise_all(rule.problems)
    return out


def _earlier_turns(
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    rows: Sequence[Row],
    prompts: Sequence[list[int]],
    with_end: bool,
    train_on_turns: Literal["all", "last", "none"],
    parse: bool,
) -> dict[int, list[Span]]:
    """Row -> its earlier turns that are learnt."""
    if train_on_turns != "all":
        return {}
    talks = [i for i, row in enumerate(rows) if row.is_conversation and earlier_turns(row.prompt)]
    asked, ids, labels = [rows[i].prompt for i in talks], [prompts[i] for i in talks], [rows[i].where for i in talks]
    return dict(zip(talks, assistant_spans(tokenizer, template, asked, ids, labels, with_end=with_end, parse=parse)))


def tokenise_pairs(
    rows: Sequence[Row],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    too_long: TooLong,
    add_eos_token: bool,
    on_bad_row: OnBadRow = "stop",
    special_tokens: SpecialTokens = "text",
) -> Tokenised[TokenisedPair]:
    """Chosen and rejected reply behind the same prompt tokens, each sequence at most `max_length` tokens.

    Pairs that truncation leaves without a reply, or without a difference, are dropped and counted. Raises DataError, and
    ConfigError if no token ends a reply.
    """
    end = _end(tokenizer, template) if add_eos_token else []
    out, rule, parse = Tokenised[TokenisedPair](), _LengthRule(max_length, too_long), special_tokens == "parse"
    writer = ReplyWriter(tokenizer, template)

    def encode(rows: Sequence[Row]) -> tuple[list[list[int]], list[Reply], list[Reply]]:
        prompts = _encode(tokenizer, template, parse, rows)
        return prompts, _written(writer, rows, "chosen"), _written(writer, rows, "rejected")

    rows, (prompts, *pair) = _accepted(rows, encode, on_bad_row, out)
    _note_prompts(tokenizer, template, rows, parse, out)
    chosen, rejected = (
        _reply_ids(tokenizer, template, rows, replies, name, parse)
        for replies, name in zip(pair, ("chosen", "rejected"))
    )
    for replies in pair:
        _note_replies(rows, replies, out)
    for row, prompt, better, worse in zip(rows, prompts, chosen, rejected):
        first, second = (prompt + reply + (end if reply[-1:] != end else []) for reply in (better, worse))
        longer = max(first, second, key=len)
        if rule.apply(row.where, longer, out) is None:
            continue
        first, second = first[:max_length], second[:max_length]
        if min(len(first), len(second)) <= len(prompt):
            reason = _NOTHING_LEFT if len(longer) > max_length else "reply without a token"
            out.dropped.add(reason, row.where, f"{len(prompt):,} prompt tokens")
        elif first == second:
            reason = "identical after truncation" if len(longer) > max_length else "identical token ids"
            out.dropped.add(reason, row.where)
        else:
            group = row.columns.get("group")
            named = "" if group is None else str(group)
            out.examples.append(TokenisedPair(first, second, len(prompt), row.where, row.margin or 0.0, named))
            rule.count_cut(row.where, longer, out)
    DataError.raise_all(rule.problems)
    return out


def tokenise_prompts(
    rows: Sequence[Row],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    response_length: int,
    too_long: TooLong,
    on_bad_row: OnBadRow = "stop",
    special_tokens: SpecialTokens = "text",
    max_prompt_length: int | None = None,
) -> Tokenised[TokenisedPrompt]:
    """Prompts of at most `max_prompt_length` tokens that leave room for `response_length` tokens within `max_length`. Truncation
    keeps a leading bos."""
    out, parse = Tokenised[TokenisedPrompt](), special_tokens == "parse"
    rows, prompts = _accepted(rows, partial(_encode, tokenizer, template, parse), on_bad_row, out)
    _note_prompts(tokenizer, template, rows, parse, out)
    head = bos_ids(tokenizer)
    rule = _LengthRule(max_length - response_length, too_long, f"{max_length:,}-{response_length:,}")
    if max_prompt_length is not None and max_prompt_length < rule.limit:
        rule = _LengthRule(max_prompt_length, too_long, f"max_prompt_length {max_prompt_length:,}", "max_prompt_length")
    for row, prompt in zip(rows, prompts):
        if rule.apply(row.where, prompt, out) is None:
            continue
        if not prompt:
            out.dropped.add("prompt without a token", row.where)
            continue
        kept = prompt
        if len(prompt) > rule.limit:
            start = head if prompt[: len(head)] == head and rule.limit > len(head) else []
            kept = start + prompt[len(prompt) - rule.limit + len(start) :]
        out.examples.append(TokenisedPrompt(kept, row))
        rule.count_cut(row.where, prompt, out)
    DataError.raise_all(rule.problems)
    return out


def _encode(
    tokenizer: PreTrainedTokenizerBase, template: Template, parse: bool, rows: Sequence[Row]
) -> list[list[int]]:
    return encode_prompts(tokenizer, template, [row.prompt for row in rows], [row.where for row in rows], parse)


def _written(
    writer: ReplyWriter, rows: Sequence[Row], name: Literal["completion", "chosen", "rejected"]
) -> list[Reply]:
    """The rows' answers as they stand behind their prompts. Raises DataError telling every row whose answer cannot be written."""
    found: list[Reply] = []
    problems: list[Problem] = []
    for row in rows:
        try:
            found.append(writer.write(row.prompt, getattr(row, name) or "", row.replies.get(name)))
        except PromptMismatch as error:
            problems.append(Problem(row.where, str(error), fix=error.fix))
    DataError.raise_all(problems)
    return found


def _reply_ids(
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    rows: Sequence[Row],
    replies: Sequence[Reply],
    name: str,
    parse: bool,
) -> list[list[int]]:
    """Ids of answers. Markers that the template wrote into them are tokens, unless the data spell some as well."""
    plain = texts_after_prompts(tokenizer, [reply.text for reply in replies])
    whole = [reply.is_rendered or row.prompt.is_blank for row, reply in zip(rows, replies)]
    texts = [reply.text if as_it_is else text for reply, as_it_is, text in zip(replies, whole, plain)]
    said = speakable_tokens(tokenizer, template)
    given = [getattr(row, name) + (row.replies[name].extra if name in row.replies else "") for row in rows]
    spelled = spelled_tokens(tokenizer, given)
    rendered = [r.text for r, tokens in zip(replies, spelled) if r.is_rendered and said.issuperset(tokens)]
    return encode_replies(tokenizer, template, texts, parse, rendered)


def _note_replies(rows: Sequence[Row], replies: Sequence[Reply], out: Tokenised[T]) -> None:
    for row, reply in zip(rows, replies):
        if reply.note:
            out.noted.add(reply.note, row.where)
        if reply.differs:
            out.differing.add("chat_template_kwargs may change that", row.where, reply.differs)


def _note_prompts(
    tokenizer: PreTrainedTokenizerBase, template: Template, rows: Sequence[Row], parse: bool, out: Tokenised[T]
) -> None:
    """Count rows whose variables of a chat template nothing reads, those whose prompts are read without the reasoning in them, and
    those whose texts spell control tokens and are read as text: rows that were rendered already, perhaps."""
    for row in rows if not isinstance(template, ChatTemplate) else ():
        if row.prompt.template_kwargs:
            out.unread.add(f"template '{template.name}' does not read chat_template_kwargs", row.where)
    for row in rows:
        if _loses_reasoning(template, row.prompt):
            out.unread.add(
                f"earlier turns without their reasoning_content, which {_named(template)} leaves out", row.where
            )
    if parse:
        return
    texts = ["\0".join((r.prompt.plain(), r.completion or "", r.chosen or "", r.rejected or "")) for r in rows]
    said = speakable_tokens(tokenizer, template)
    for row, spelled in zip(rows, spelled_tokens(tokenizer, texts)):
        if tokens := [token for token in spelled if token not in said]:
            shown = ", ".join(map(repr, tokens[:3]))
            out.spelled.add("read as text; data.special_tokens: parse reads them as the tokens", row.where, shown)


def _loses_reasoning(template: Template, prompt: Prompt) -> bool:
    """Whether a turn of a prompt has reasoning that the rendered prompt lacks: many templates drop that of earlier turns."""
    thoughts = [said for message in prompt.messages if (said := reasoning_of(message).strip())]
    if not thoughts:
        return False
    text = template.render(prompt)
    return any(said not in text for said in thoughts)


def _named(template: Template) -> str:
    return "the chat template" if isinstance(template, ChatTemplate) else f"template '{template.name}'"


def _accepted(
    rows: Sequence[Row], encode: Callable[[Sequence[Row]], Found], on_bad_row: OnBadRow, out: Tokenised[T]
) -> tuple[Sequence[Row], Found]:
    """`encode` of the rows. on_bad_row: skip leaves out and counts those that it refuses, which the rest is then encoded without.

    Raises DataError for refused rows under `stop`, and for what is wrong with no row."""
    while True:
        try:
            return rows, encode(rows)
        except DataError as error:
            refused = {problem.where: problem for problem in error.problems}
            if on_bad_row == "stop" or not refused.keys() <= {row.where for row in rows}:
                raise
            for where, problem in refused.items():
                reason, _, detail = problem.what.partition(", got ")
                out.skipped.add(reason, where, f"got {detail}" if detail else "")
            rows = [row for row in rows if row.where not in refused]


def _end(tokenizer: PreTrainedTokenizerBase, template: Template) -> list[int]:
    end = end_of_turn(tokenizer, template)
    if end is None:
        raise ConfigError.at(
            "add_eos_token", "the tokenizer has no eos token", fix="another tokenizer, or add_eos_token: false"
        )
    return [end]


class _LengthRule:
    """What happens to sequences of more than `limit` tokens; `shown` is the limit as messages write it, `field` what sets it."""

    def __init__(self, limit: int, too_long: TooLong, shown: str = "", field: str = "max_length") -> None:
        if limit < 1:
            raise ConfigError.at("max_length", f"no room for a prompt: {shown or limit}", expected="at least 1 token")
        self.limit, self.too_long, self.shown = limit, too_long, shown or f"max_length {limit:,}"
        self.field, self.problems = field, list[Problem]()

    def apply(self, where: str, ids: list[int], out: Tokenised[T]) -> list[int] | None:
        """The ids, cut on the right if too long and `truncate`; None if the row is not to be used."""
        if len(ids) <= self.limit:
            return ids
        if self.too_long == "truncate":
            return ids[: self.limit]
        if self.too_long == "drop":
            out.dropped.add(_OVER + self.shown, where, f"{len(ids):,} tokens")
        else:
            fix = f"data.too_long: drop or truncate, or a longer {self.field}"
            self.problems.append(Problem(where, f"{len(ids):,} tokens > {self.shown}", fix=fix))
        return None

    def count_cut(self, where: str, ids: list[int], out: Tokenised[T]) -> None:
        """Count a row that is used, if it had to be cut."""
        if len(ids) > self.limit:
            out.truncated.add(_OVER + self.shown, where, f"{len(ids):,} tokens")


def require_batch(rows: int, batch: int, where: str, fix: str, account: Sequence[str] = ()) -> None:
    """Raise DataError if there are fewer rows than one optimizer step takes: such a run would end after 0 steps.

    account: lines that say what became of the others."""
    if rows < batch:
        raise DataError.at(where, f"{rows:,} rows < global batch {batch:,}", got="; ".join(account), fix=fix)
