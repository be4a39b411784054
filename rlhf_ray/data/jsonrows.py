"""Readers of JSON Lines and JSON lists.

Rules: UTF-8, with or without a byte order mark; LF or CRLF. A .jsonl file holds one object per line and may hold blank lines; a
JSON array in it is refused. A .json file holds one list of objects. Duplicate keys, NaN and infinity are refused in both.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, NoReturn

from rlhf_ray.data.lines import BOM, TRUNCATED, BadRow, RawRow, decode, lines, refuse_utf16, too_big
from rlhf_ray.errors import DataError

MAX_DEPTH = 100
_SPACE = re.compile(r"[ \t\r\n]*")
_NOT_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"?|[^\[\]{}"]+', re.DOTALL)


class _DuplicateKey(Exception):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _DuplicateKey(next(name for i, name in enumerate(names) if name in names[:i]))
    return found


_STRICT = json.JSONDecoder(object_pairs_hook=_object)
_LENIENT = json.JSONDecoder()


def _too_deep(text: str) -> bool:
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return False
    depth = 0
    for bracket in _NOT_BRACKETS.sub("", text):
        depth += 1 if bracket in "[{" else -1
        if depth > MAX_DEPTH:
            return True
    return False


def _is_finite(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    return all(map(_is_finite, value)) if isinstance(value, list) else True


def _checked(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        kind = {list: "array", str: "string", type(None): "null"}.get(type(value), type(value).__name__)
        raise BadRow("not an object", f"expected a JSON object, got {kind}")
    for name, item in value.items():
        if not isinstance(item, str) and not _is_finite(item):
            raise BadRow(f"'{name}' is not finite")
    return value


def _duplicate(error: _DuplicateKey) -> BadRow:
    return BadRow(f"duplicate key '{error.args[0]}'")


def _is_cut(text: str, error: json.JSONDecodeError) -> bool:
    """Whether JSON broke because the text ends too early."""
    return error.pos >= len(text.rstrip()) or not text.rstrip().endswith(("}", "]"))


def _parse(text: str, ended: bool) -> dict[str, Any]:
    if _too_deep(text):
        raise BadRow("nesting too deep")
    try:
        return _checked(_STRICT.decode(text))
    except json.JSONDecodeError as error:
        cut = "" if ended or not _is_cut(text, error) else f"; {TRUNCATED}"
        raise BadRow("invalid JSON", f"invalid JSON: {error.msg} (col {error.colno}){cut}") from error
    except _DuplicateKey as error:
        raise _duplicate(error) from error
    except ValueError as error:  # an integer of thousands of digits
        raise BadRow("invalid JSON", f"invalid JSON: {error}") from error


def read_jsonl(name: str, stream: BinaryIO, max_row_bytes: int) -> Iterator[RawRow]:
    """(file:line, row) for every line that is not blank.

    Raises DataError where the file as a whole is not JSONL; a line that is not a valid object is a BadRow.
    """
    seen = False
    for line in lines(stream, max_row_bytes):
        where = f"{name}:{line.number}"
        if line.body is None:
            seen = True
            yield where, too_big(line.size, max_row_bytes)
            continue
        if line.number == 1:
            refuse_utf16(name, line.body)
        if not line.body.strip():
            continue
        if not seen:
            _check_first(name, line.body.strip())
        seen = True
        try:
            yield where, _parse(decode(line), line.ended)
        except BadRow as bad:
            yield where, bad


def _check_first(name: str, line: bytes) -> None:
    """A first row that cannot begin an object tells that the file is of another kind: say so once, not on every line."""
    if line.startswith(b"["):
        fix = "name it .json, or write one object per line"
        raise DataError.at(name, "not a JSONL file: it holds a JSON array", fix=fix)
    if line == b"{":
        raise DataError.at(name, "not a JSONL file: it holds indented JSON", fix="write one object per line")
    if not line.startswith(b"{"):
        raise DataError.at(name, "not a JSONL file: its first row does not start with '{'")


def read_json(name: str, stream: BinaryIO, max_row_bytes: int) -> Iterator[RawRow]:
    """(file:row n, row) for every item of a JSON list, n from 1. Broken syntax raises DataError with line and column."""
    body = stream.read().removeprefix(BOM)
    refuse_utf16(name, body[:64])
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        line = body.count(b"\n", 0, error.start) + 1
        raise DataError.at(f"{name}:{line}", f"byte 0x{body[error.start]:02x} is not UTF-8") from error
    start = _skip(text, 0)
    if start == len(text):
        return
    if text[start] != "[":
        fix = "name it .jsonl if it holds one object per line" if text[start] == "{" else ""
        raise DataError.at(name, "not a JSON file: expected a list of objects", fix=fix)
    yield from _items(name, text, _skip(text, start + 1), max_row_bytes)


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _items(name: str, text: str, at: int, max_row_bytes: int) -> Iterator[RawRow]:
    """Items of the list whose first item starts at `at`, decoded one by one, so that a bad one has a number."""
    number = 0
    while text[at : at + 1] != "]":
        number += 1
        where = f"{name}:row {number}"
        row, end = _item(name, where, text, at)
        if end - at > max_row_bytes:
            row = too_big(end - at, max_row_bytes)
        elif _too_deep(text[at:end]):
            row = BadRow("nesting too deep")
        yield where, row
        at = _skip(text, end)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif text[at : at + 1] != "]":
            _stop(name, text, json.JSONDecodeError("Expecting ',' delimiter", text, at))
    end = _skip(text, at + 1)
    if end < len(text):
        _stop(name, text, json.JSONDecodeError("Extra data", text, end))


def _item(name: str, where: str, text: str, at: int) -> tuple[dict[str, Any] | BadRow, int]:
    try:
        try:
            value, end = _STRICT.raw_decode(text, at)
        except _DuplicateKey as error:
            return _duplicate(error), _LENIENT.raw_decode(text, at)[1]
        try:
            return _checked(value), end
        except BadRow as bad:
            return bad, end
    except RecursionError as error:
        raise DataError.at(where, "nesting too deep") from error
    except json.JSONDecodeError as error:
        _stop(name, text, error)
    except ValueError as error:
        raise DataError.at(where, f"invalid JSON: {error}") from error


def _stop(name: str, text: str, error: json.JSONDecodeError) -> NoReturn:
    cut = f"; {TRUNCATED}" if _is_cut(text, error) else ""
    raise DataError.at(f"{name}:{error.lineno}", f"invalid JSON: {error.msg} (col {error.colno}){cut}") from error
