"""Names of columns: data.columns, and what to say of rows whose names fit no format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from rlhf_ray.data.formats import FORMATS, RowKind
from rlhf_ray.data.lines import BadRow, RawRow
from rlhf_ray.errors import DataError, Problem

PLAIN: dict[RowKind, tuple[str, ...]] = {
    "sft": ("instruction", "output"),
    "preference": ("prompt", "chosen", "rejected"),
    "prompt": ("prompt",),
}
"""Fields of the plainest format of each kind."""
REPLIES = frozenset("answer completion label labels output reply response solution summary target targets".split())
"""What columns of replies are called by those who have no format in mind; a url or a source beside a text is none."""


@dataclass(frozen=True)
class Renamed:
    """Rows after data.columns."""

    raw: Iterable[RawRow]
    columns: Mapping[str, str]

    def __iter__(self) -> Iterator[RawRow]:
        for where, row in self.raw:
            if not isinstance(row, BadRow):
                row = {self.columns.get(key, key): value for key, value in row.items()}
            yield where, row


def columns_in(name: str, raw: Iterable[RawRow], columns: Mapping[str, str]) -> Mapping[str, str]:
    """data.columns, its keys as the rows spell them. Raises DataError if no row has a column of it, or a new name is taken."""
    if not columns:
        return {}
    names = dict.fromkeys(key for _, row in raw if not isinstance(row, BadRow) for key in row)
    columns = {old if old in names else old.strip(): new for old, new in columns.items()}  # as headers of CSV files are
    if turned := _turned(columns, names):
        what = "data.columns is written the other way round"
        got = as_job(columns).removeprefix("data.columns=")
        raise DataError.at(name, what, "{name in the file: name in the format}", got, as_job(turned))
    problems = []
    for old, new in columns.items() if names else ():
        if list(columns.values()).count(new) > 1:
            problems.append(Problem(name, f"two columns cannot both be called '{new}' (data.columns)"))
        if old not in names:
            problems.append(Problem(name, f"no column '{old}' (data.columns)", got=", ".join(names)))
        if new in names and new not in columns:
            problems.append(
                Problem(name, f"column '{new}' is there already; '{old}' cannot take its name (data.columns)")
            )
    DataError.raise_all(problems)
    return columns


def _turned(columns: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """data.columns as it was meant, if entries of it were written as format: file; else nothing.

    A key that the file lacks may also be misspelt, where it would take the name of a column that a format reads."""
    known = {field for f in FORMATS.values() for field in (*f.fields, *f.pair_fields, *f.optional)}
    other = {
        old for old, new in columns.items() if old not in names and new in names and (old in known or new not in known)
    }
    turned = {new if old in other else old: old if old in other else new for old, new in columns.items()}
    return turned if other and len(turned) == len(columns) else {}


def as_job(columns: Mapping[str, str]) -> str:
    """data.columns as it is written in a job, or behind it."""
    shown = yaml.safe_dump(dict(columns), default_flow_style=True, sort_keys=False, allow_unicode=True, width=2**20)
    return f"data.columns={shown.strip()}"


def text_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Columns that hold texts alone, in one of the rows at least; a number is none, as which a CSV file has it."""
    names = dict.fromkeys(name for row in rows for name in row)
    values = {name: [row[name] for row in rows if row.get(name) not in (None, "")] for name in names}
    return [name for name, found in values.items() if found and all(map(_is_text, found))]


def _is_text(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        float(value)
    except ValueError:
        return True
    return False


def no_format(name: str, rows: Sequence[Mapping[str, Any]], kind: RowKind) -> DataError:
    """The error for rows that have no format of a kind: the format that they have some fields of, else those that there are."""
    able = [f for f in FORMATS.values() if f.gives(kind)]
    have = list(rows[0])
    what = f"fields {', '.join(have)} fit no {kind} format"
    fix = "data.columns renames fields, data.format names a format"
    begun = [f for f in able if any(field in have for field in f.fields_of(kind))]
    if begun:
        closest = max(begun, key=lambda f: sum(1 if field in have else -1 for field in f.fields_of(kind)))
        missing = [field for field in closest.fields_of(kind) if field not in have]
        missing = missing or [field for field in closest.optional if field == "prompt" and field not in have]
        near = f"the closest format is {closest.name}, missing {', '.join(missing)}; " if missing else ""
        return DataError.at(name, what, fix=near + fix)
    own = [f for f in able if (f.pair if kind == "preference" else f.completion if kind == "sft" else f.asks)]
    fields = dict.fromkeys(", ".join(f.asks if kind == "prompt" else f.fields_of(kind)) for f in own)
    found = text_columns(rows)
    if len(found) == len(PLAIN[kind]):
        fix = f"{as_job(dict(zip(found, PLAIN[kind])))}, if that is what they are"
    return DataError.at(name, what, expected=f"one of ({'), ('.join(fields)})", fix=fix)
