"""Lines of text files, bounded in memory, and the malformed row that every reader can report."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from rlhf_ray.errors import DataError

TRUNCATED = "file looks truncated"
BOM = b"\xef\xbb\xbf"
_CHUNK = 1 << 20


class BadRow(Exception):
    """A malformed row. `reason` groups rows when they are counted; `message` is what the user reads behind `file:line:`."""

    def __init__(self, reason: str, message: str = "", fix: str = "") -> None:
        super().__init__(reason, message, fix)
        self.reason, self.message, self.fix = reason, message or reason, fix


RawRow = tuple[str, dict[str, Any] | BadRow]


@dataclass(frozen=True)
class RawLine:
    """`body` has neither line ending nor byte order mark, and is None if the line is longer than allowed.

    `ended` is False for a last line without a newline.
    """

    number: int
    body: bytes | None
    size: int
    ended: bool


def lines(stream: BinaryIO, max_bytes: int) -> Iterator[RawLine]:
    """Lines of a byte stream; of a line over `max_bytes` only the length is kept, so that memory stays flat."""
    number = 0
    while chunk := stream.readline(max_bytes + len(BOM) + 2):
        number += 1
        if number == 1:
            chunk = chunk.removeprefix(BOM)
        size, ended = len(chunk), chunk.endswith(b"\n")
        if not ended and size > max_bytes:
            while rest := stream.readline(_CHUNK):
                size += len(rest)
                if rest.endswith(b"\n"):
                    ended = True
                    break
        body = chunk.rstrip(b"\r\n")
        too_long = size > len(chunk) or len(body) > max_bytes
        yield RawLine(number, None if too_long else body, size, ended)


def decode(line: RawLine) -> str:
    """The line's text. Raises BadRow naming the first byte that is not UTF-8, and where it stands."""
    body = line.body or b""
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError as error:
        cut = f"; {TRUNCATED}" if not line.ended and error.reason == "unexpected end of data" else ""
        at = f"byte 0x{body[error.start]:02x} is not UTF-8 (byte {error.start + 1:,} of the line){cut}"
        raise BadRow("not UTF-8", at) from error


def too_big(size: int, max_bytes: int) -> BadRow:
    """The fault of a row of `size` bytes.

    >>> too_big(20_000_123, 1_000_000).message
    'row 20.0 MB > max_row_bytes 1 MB'
    """
    shown, limit = (
        (f"{size / 1e6:.1f} MB", f"{max_bytes / 1e6:g} MB")
        if max_bytes >= 100_000
        else (f"{size:,} bytes", f"{max_bytes:,} bytes")
    )
    return BadRow("row over max_row_bytes", f"row {shown} > max_row_bytes {limit}")


def refuse_utf16(name: str, head: bytes) -> None:
    """Raise DataError if text starts with a UTF-16 byte order mark, or every other byte of its start is NUL."""
    marked = head.startswith((b"\xff\xfe", b"\xfe\xff"))
    sample = head[:64]
    if marked or (len(sample) >= 4 and any(not any(sample[i::2]) for i in (0, 1))):
        raise DataError.at(name, "not UTF-8 (looks like UTF-16); re-save as UTF-8")
