"""From the files of a job to checked rows: every fault of every file is found before anything is trained, and told at once."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, BinaryIO, Literal

from rlhf_ray.config import DataConfig
from rlhf_ray.data.columns import REPLIES, Renamed, as_job, columns_in, no_format, text_columns
from rlhf_ray.data.counts import Tally
from rlhf_ray.data.formats import (
    FORMATS,
    Dropped,
    Format,
    RowKind,
    detect,
    may_say_what_is_learnt,
    says_what_is_learnt,
)
from rlhf_ray.data.jsonrows import read_json, read_jsonl
from rlhf_ray.data.lines import BadRow, RawRow
from rlhf_ray.data.prompts import Message, Prompt
from rlhf_ray.data.sources import DataSource, files_of, find
from rlhf_ray.data.streamed import Part, StreamedRows, joined, picked
from rlhf_ray.data.tables import read_csv, read_hub, read_parquet, sha256_rows
from rlhf_ray.errors import ConfigError, DataError, Problem

_READERS: dict[str, Callable[[str, BinaryIO, int], Iterator[RawRow]]] = {
    "jsonl": read_jsonl,
    "json": read_json,
    "csv": read_csv,
    "parquet": read_parquet,
}
STREAMED = ("jsonl", "parquet", "hub")
"""Kinds of sources whose rows can be had one after the other."""
_LOOKED_AT = 100
_ONE_SIDED = 10


@dataclass(frozen=True)
class Row:
    """One checked row. `where` is `file:line`; `columns` are all its fields under the names of the format.

    completion is set for SFT, chosen and rejected for preferences. A bare text (format `text`) has an empty prompt.
    is_conversation: the assistant's turns in the prompt are answers as well, for SFT to learn.
    margin: by how much chosen is better, if the data say so.
    replies: completion, chosen or rejected as messages, where they are more than a text (reasoning, tool calls).
    """

    where: str
    prompt: Prompt
    chosen: str | None = None
    rejected: str | None = None
    completion: str | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    is_conversation: bool = False
    margin: float | None = None
    replies: Mapping[str, Message] = field(default_factory=dict)

    @property
    def key(self) -> Prompt:
        """What the held-out rule hashes: the prompt, or the text itself where there is none."""
        return Prompt(self.completion or "") if self.prompt.is_blank else self.prompt


@dataclass(frozen=True)
class DataFile:
    """What a manifest keeps of a file: rows it holds, and rows used of them."""

    path: str
    sha256: str
    rows: int
    used: int
    format: str


@dataclass(frozen=True)
class RowSet:
    """The usable rows of some files, in file order, and an account of all others."""

    rows: Sequence[Row]
    """Read anew each time they are gone through under data.streaming."""
    files: tuple[DataFile, ...]
    dropped: Tally
    skipped: Tally
    warnings: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    """Fields that nothing reads, most frequent first, with how many rows have them where that is not all; and files of a folder
    that are of another split."""
    has_splits: bool = False
    """Whether one of the files is a data set, here or on the Hub, of which data.split is read."""

    @property
    def total(self) -> int:
        """Rows in the files, usable or not."""
        return sum(file.rows for file in self.files)

    def manifest(self) -> list[dict[str, Any]]:
        return [asdict(file) for file in self.files]


def read_rows(config: DataConfig, kind: RowKind, part: Literal["train", "eval"] = "train") -> RowSet:
    """Read data.train (or data.eval) as rows of one kind: sft, preference or prompt.

    A malformed row stops everything, with all problems of all files in one DataError, or is skipped and counted
    (data.on_bad_row). Draws, pairs without a difference and repeated prompts are dropped and counted. data.max_rows keeps the
    first usable rows of data.train. Under data.streaming the rows of data.train are not kept, but read again.

    Raises ConfigError if data.format cannot give the kind.
    """
    _check_format(config.format, kind)
    problems: list[Problem] = []
    files: list[_FileRows] = []
    for name in (config.train if part == "train" else config.eval) or ():
        try:
            files.append(_read_file(name, config, kind, config.streaming and part == "train"))
            problems += files[-1].problems
        except DataError as error:
            problems += error.problems
    DataError.raise_all(problems)
    rows = _joined(files, kind, config)
    if not rows.rows:
        counted = "; ".join(str(tally) for tally in (rows.skipped, rows.dropped) if tally.total)
        raise DataError.at(", ".join(file.path for file in rows.files), f"no usable rows: {counted}")
    is_cut = part == "train" and config.max_rows and config.weights is None  # a mixture is cut as a whole
    return _first_rows(rows, config.max_rows) if is_cut and config.max_rows else rows


def _check_format(name: str, kind: RowKind) -> None:
    if name != "auto" and not FORMATS[name].gives(kind):
        able = ", ".join(f.name for f in FORMATS.values() if f.gives(kind))
        lacks = "pairs to compare" if kind == "preference" else "replies to learn from"
        raise ConfigError.at("data.format", f"'{name}' has no {lacks}", expected=f"one of {able}")


@dataclass
class _FileRows:
    source: DataSource
    format: Format
    rows: Sequence[Row] = ()
    total: int = 0
    sha256: str = ""
    problems: list[Problem] = field(default_factory=list)
    dropped: Tally = field(default_factory=lambda: Tally("dropped"))
    skipped: Tally = field(default_factory=lambda: Tally("skipped"))
    unread: Counter[str] = field(default_factory=Counter)
    of_other_splits: list[str] = field(default_factory=list)


def _read_file(name: str, config: DataConfig, kind: RowKind, streamed: bool) -> _FileRows:
    """streamed: rows are not kept, and none is read beyond max_rows."""
    source, first = find(name), config.max_rows if streamed else None
    files, others = files_of(source, config.split, config.name)
    end: list[Problem] = []
    states = [file.state() for file in files]
    raw: Iterable[RawRow] = _RawRows(files, config, streamed, first)
    if not streamed or (source.kind == "hub" and first is not None):  # what was fetched is not fetched again
        raw = list(_up_to_its_end(raw, end))
    try:
        columns = columns_in(name, _up_to_its_end(raw, end), config.columns)
        raw = Renamed(raw, columns) if columns else raw
        chosen = _choose_format(name, _up_to_its_end(raw, end), config.format, kind)
    except DataError as error:
        faults = _faults(_up_to_its_end(raw, end))
        raise DataError([*end, *faults, *error.problems]) from error
    file, rows, usable = _FileRows(source, chosen, of_other_splits=others), list[Row](), bytearray()
    for where, fields in _up_to_its_end(raw, end):
        usable.append(0)
        try:
            row = _row(where, fields, chosen, kind)
            file.unread.update(chosen.unread(row.columns, kind, row.prompt))
            usable[-1] = 1
            if not streamed:
                rows.append(row)
        except Dropped as drop:
            file.dropped.add(drop.reason, where)
        except BadRow as bad:
            if config.on_bad_row == "skip":
                file.skipped.add(bad.reason, where)
            else:
                file.problems.append(Problem(where, bad.message, fix=bad.fix))
    file.total, file.problems = len(usable), [*end, *file.problems]
    if not file.problems:
        if not file.total:
            raise DataError.at(name, "no rows")
        file.sha256 = source.sha256() if first is None and source.kind != "hub" else _sha256(raw)
    reader = partial(_read_again, name, raw, chosen, kind, files, states)
    file.rows = StreamedRows([Part(bytes(usable), reader)]) if streamed else rows
    return file


def _row(where: str, fields: dict[str, Any] | BadRow, chosen: Format, kind: RowKind) -> Row:
    """Raises BadRow, Dropped."""
    if isinstance(fields, BadRow):
        raise fields
    parsed = chosen.parse(fields, kind)
    answers = parsed.chosen, parsed.rejected, parsed.completion
    return Row(where, parsed.prompt, *answers, fields, parsed.is_conversation, parsed.margin, parsed.replies)


def _read_again(
    name: str,
    raw: Iterable[RawRow],
    chosen: Format,
    kind: RowKind,
    files: Sequence[DataSource],
    states: Sequence[Any],
    wanted: bytes,
) -> Iterator[Row]:
    """The rows whose byte in `wanted` is 1. Raises DataError if they are not those that were checked.   states: of files then."""
    number = 0
    for number, (where, fields) in enumerate(raw, start=1):
        if number <= len(wanted) and wanted[number - 1]:
            try:
                yield _row(where, fields, chosen, kind)
            except (BadRow, Dropped) as error:
                raise DataError.at(where, f"has changed since it was checked: {error.args[0]}") from error
    if number != len(wanted):
        raise DataError.at(name, "has changed since it was checked", f"{len(wanted):,} rows", f"{number:,}")
    for file, state in zip(files, states, strict=True):
        if file.state() != state:  # its rows are as many as before, but not those that were hashed and held out
            raise DataError.at(file.name, "was written again since it was checked")


def _faults(raw: Iterable[RawRow]) -> list[Problem]:
    return [Problem(where, row.message, fix=row.fix) for where, row in raw if isinstance(row, BadRow)]


def _sha256(raw: Iterable[RawRow]) -> str:
    return sha256_rows(row for _, row in raw if not isinstance(row, BadRow))


@dataclass(frozen=True)
class _RawRows:
    """The rows of files, read each time that they are gone through.   first: how many, if not all. Raises DataError."""

    files: Sequence[DataSource]
    config: DataConfig
    streamed: bool
    first: int | None

    def __iter__(self) -> Iterator[RawRow]:
        return islice(_read(self.files, self.config, self.streamed), self.first)


def _up_to_its_end(raw: Iterable[RawRow], problems: list[Problem]) -> Iterator[RawRow]:
    """The rows; `problems` becomes what ended reading before the end of its source, if anything did."""
    try:
        yield from raw
    except DataError as error:
        problems[:] = error.problems


def _read(files: Sequence[DataSource], config: DataConfig, streamed: bool) -> Iterator[RawRow]:
    """The rows of one file after the other. Raises DataError."""
    for file in files:
        if streamed and file.kind not in STREAMED:
            fix = "convert it to JSONL or Parquet, or drop data.streaming"
            what = "cannot be read in part (data.streaming)"
            raise DataError.at(file.name, what, ", ".join(STREAMED), file.kind, fix)
    for file in files:
        try:
            if file.kind == "hub":
                fetched = streamed and config.max_rows is not None  # all of them are better had from a copy here
                yield from read_hub(file.name, config.split, config.max_row_bytes, config.name, fetched)
            else:
                with file.open() as stream:
                    yield from _READERS[file.kind](file.name, stream, config.max_row_bytes)
        except DataError:
            raise
        except EOFError as error:
            raise DataError.at(file.name, "file looks truncated: its compressed data ends early") from error
        except (OSError, ValueError, zlib.error) as error:
            raise DataError.at(file.name, f"cannot be read: {error}") from error


def _choose_format(name: str, raw: Iterable[RawRow], wanted: str, kind: RowKind) -> Format:
    """The named format, or the one that most of the first rows have."""
    if wanted != "auto":
        return FORMATS[wanted]
    rows = list(islice((row for _, row in raw if not isinstance(row, BadRow)), _LOOKED_AT))
    found = Counter(f.name for row in rows if (f := detect(row, kind)) is not None)
    if found:
        return FORMATS[found.most_common(1)[0][0]]
    if not rows:  # every row is malformed, and told as such
        return next(f for f in FORMATS.values() if f.gives(kind))
    raise no_format(name, rows, kind)


def _joined(files: Sequence[_FileRows], kind: RowKind, config: DataConfig) -> RowSet:
    dropped, skipped = Tally("dropped"), Tally("skipped")
    rows: list[Sequence[Row]] = []
    records: list[DataFile] = []
    warnings: list[str] = []
    seen: set[str] = set()
    for file in files:
        dropped.update(file.dropped)
        skipped.update(file.skipped)
        kept = picked(file.rows, _are_new(file, seen, dropped)) if kind == "prompt" else file.rows
        if kind == "preference" and (warning := _one_sided(file)):
            warnings.append(warning)
        if kind == "sft" and (warning := _numbered_labels(file)):
            warnings.append(warning)
        if kind == "sft" and config.format == "auto" and (warning := _plain_text(file, config.columns)):
            warnings.append(warning)
        rows.append(kept)
        records.append(DataFile(file.source.name, file.sha256, file.total, len(kept), file.format.name))
    unread = sum((file.unread for file in files), Counter[str]())
    used = sum(map(len, rows))
    told = [name if n == used else f"{name} ({n:,} rows)" for name, n in unread.most_common()]
    told += [f"{name} (of another split)" for file in files for name in file.of_other_splits]
    has_splits = any(file.source.kind == "hub" for file in files)
    return RowSet(joined(rows), tuple(records), dropped, skipped, tuple(warnings), tuple(told), has_splits)


def _are_new(file: _FileRows, seen: set[str], dropped: Tally) -> Iterator[bool]:
    """Whether each row's prompt, or a field that a reward function may want, differs from all before; answers do not count."""
    for row in file.rows:
        extra = file.format.extra(row.columns)
        key = row.key.exact() + ("\0" + repr(sorted(extra.items())) if extra else "")
        is_new = key not in seen
        seen.add(key)
        if not is_new:
            dropped.add("repeated prompts", row.where)
        yield is_new


def _one_sided(file: _FileRows) -> str:
    """A warning if an annotator seems to have always chosen the same side: position bias, or a lost label."""
    if file.format.name != "alpaca_farm" or len(file.rows) < _ONE_SIDED:
        return ""
    sides = {str(row.columns["preference"]) for row in file.rows}
    if len(sides) != 1:
        return ""
    return f"{file.source.name}: 'preference' is {sides.pop()} in all {len(file.rows):,} rows: are the labels real?"


def _numbered_labels(file: _FileRows) -> str:
    """A warning if the labels of a file could be verdicts on its replies, written as numbers: they are not taken for such."""
    if not file.unread["label"]:  # rows that are streamed would be read once more
        return ""
    zeros, ones, first = 0, 0, ""
    for row in file.rows:
        label = row.columns.get("label")
        if says_what_is_learnt(label):
            continue
        if not may_say_what_is_learnt(label):
            return ""
        is_zero = str(label).strip() in ("0", "0.0")
        zeros, ones, first = zeros + is_zero, ones + (not is_zero), first or row.where
    if not first:
        return ""
    counted = f"0 in {zeros:,} rows and 1 in {ones:,} (first {first})"
    rule = "all of them are learnt; only true and false say whether a reply is"
    return f"{file.source.name}: 'label' is {counted}: {rule}"


def _plain_text(file: _FileRows, renamed: Mapping[str, str]) -> str:
    """A warning if a column that sounds like replies lies unread beside the text that alone is learnt."""
    if file.format.name != "text":
        return ""
    old = {new: old for old, new in renamed.items()}
    texts = text_columns([row.columns for row in islice(file.rows, _LOOKED_AT)])
    beside = [old.get(name, name) for name in texts if file.unread[name] and name.lower() in REPLIES]
    if not beside:
        return ""
    meant = as_job({old.get("text", "text"): "instruction", beside[0]: "output"})
    rule = f"rows are read as plain text, all of which is learnt; nothing reads {', '.join(beside)}"
    return f"{file.source.name}: {rule}; fix: {meant} for prompts with replies, data.format=text if this is meant"


def _first_rows(rows: RowSet, max_rows: int) -> RowSet:
    left, files = max_rows, []
    for file in rows.files:
        used = min(left, file.used)
        left -= used
        files.append(DataFile(file.path, file.sha256, file.rows, used, file.format))
    kept = picked(rows.rows, (number < max_rows for number in range(len(rows.rows))))
    return replace(rows, rows=kept, files=tuple(files))


def check_same_data(recorded: Iterable[Mapping[str, Any]], current: Iterable[DataFile]) -> None:
    """Raise DataError if data files are not those that a checkpoint was trained on; `recorded` is from its run's manifest.

    Nothing recorded, as after `resume --reset-data`, means that whatever is there now is accepted."""
    if not (recorded := list(recorded)):
        return
    fix = "put it back, or accept the data as it is now: rlhf-ray resume RUN --reset-data"
    before = {item["path"]: item["sha256"] for item in recorded}
    now = {file.path: file.sha256 for file in current}
    problems = [
        Problem(path, "data sha256 differs from the checkpoint's", before[path], sha256, fix)
        for path, sha256 in now.items()
        if path in before and before[path] != sha256
    ]
    for path in sorted(before.keys() ^ now.keys()):
        what = "not among the data files of this run" if path in before else "was not among the data files of this run"
        problems.append(Problem(path, what, fix=fix))
    DataError.raise_all(problems)
