"""Readers of tables: CSV, Parquet, and data sets of the Hugging Face Hub."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from rlhf_ray.data.lines import TRUNCATED, BadRow, RawRow, decode, lines, refuse_utf16, too_big
from rlhf_ray.data.sources import is_saved, nearest
from rlhf_ray.errors import DataError


def read_csv(name: str, stream: BinaryIO, max_row_bytes: int) -> Iterator[RawRow]:
    """(file:line, row) of a CSV file with a header; the line is the row's first one, and every value is text."""
    reader = csv.reader(_csv_lines(name, stream, max_row_bytes), strict=True)
    rows: list[RawRow] = []
    header: list[str] = []
    start = 1
    try:
        with _field_limit(max_row_bytes):
            for cells in reader:
                if cells and header:
                    rows.append((f"{name}:{start}", _csv_row(header, cells)))
                elif cells:
                    header = _csv_header(f"{name}:{start}", cells)
                start = reader.line_num + 1
    except csv.Error as error:
        what = f"invalid CSV: {error}" + (f"; {TRUNCATED}" if "unexpected end" in str(error) else "")
        if "field larger" in str(error):
            what = f"a cell of more than max_row_bytes {max_row_bytes:,}, or a quote that is not closed"
        raise DataError.at(f"{name}:{start}", what) from error
    yield from rows


@contextmanager
def _field_limit(limit: int) -> Iterator[None]:
    """The csv module's limit is global, so it is put back; that is also why rows are read in one go."""
    before = csv.field_size_limit(limit)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _csv_lines(name: str, stream: BinaryIO, max_row_bytes: int) -> Iterator[str]:
    for line in lines(stream, max_row_bytes):
        try:
            if line.body is None:
                raise too_big(line.size, max_row_bytes)
            if line.number == 1:
                refuse_utf16(name, line.body)
            yield decode(line) + "\n"
        except BadRow as bad:
            raise DataError.at(f"{name}:{line.number}", bad.message) from bad


def _csv_header(where: str, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    if len(names) == 1 and any(delimiter in names[0] for delimiter in ";\t"):
        raise DataError.at(
            where, "the header is one column", "columns separated by commas", names[0].replace("\t", "\\t")
        )
    for name in names:
        if not name or names.count(name) > 1:
            what = f"duplicate column '{name}'" if name else "column without a name"
            raise DataError.at(where, f"{what} in the header")
    return names


def _csv_row(header: list[str], cells: list[str]) -> dict[str, Any] | BadRow:
    if len(cells) != len(header):
        return BadRow("wrong number of cells", f"{len(cells)} cells, but the header has {len(header)} columns")
    return dict(zip(header, cells))


def read_parquet(name: str, stream: BinaryIO, max_row_bytes: int) -> Iterator[RawRow]:
    """(file:row n, row) of a Parquet file, n from 1. Raises DataError where the file is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        for batch in pq.ParquetFile(stream).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{name}:row {number}", _unless_too_big(row, max_row_bytes)
    except (pa.ArrowException, OSError) as error:
        raise DataError.at(name, f"not a readable Parquet file: {_first_line(error)}") from error


def _unless_too_big(row: dict[str, Any], max_row_bytes: int) -> dict[str, Any] | BadRow:
    size = _size(row)
    return too_big(size, max_row_bytes) if size > max_row_bytes else row


def _size(value: Any) -> int:
    """Characters of all texts in a value."""
    if isinstance(value, str):
        return len(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return sum(map(_size, parts))


def read_hub(
    name: str, split: str, max_row_bytes: int, config: str | None = None, streaming: bool = False
) -> Iterator[RawRow]:
    """(id:row n, row) of one split of a Hub data set, or of a folder laid out like one or saved, through the `datasets` library.

    config: which of several configurations (subsets) of the data set.   streaming: fetch rows as they are asked for.

    HF_HUB_OFFLINE, HF_HOME and HF_TOKEN are honoured by that library. Raises DataError where the data set cannot be had.
    """
    import datasets
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    failures = (DatasetsError, HfHubHTTPError, OSError, ValueError, RuntimeError, KeyError)
    folder = Path(os.path.expanduser(name))
    saved = is_saved(folder)
    if saved and config is not None:
        raise DataError.at(
            name, "has no configurations: save_to_disk wrote it", got=f"data.name {config}", fix="drop data.name"
        )
    try:
        if saved:
            rows = _saved(folder, split, streaming)
        else:
            rows = datasets.load_dataset(name, config, split=split, streaming=streaming)
    except DatasetNotFoundError as error:
        fix = "hf auth login, once access is granted on its page" if "gated" in str(error) else nearest(name)
        raise DataError.at(name, "no such file, and no such data set on the Hub", fix=fix) from error
    except failures as error:
        if isinstance(error, ConnectionError):
            offline = "offline mode" if datasets.config.HF_HUB_OFFLINE else "no connection"
            raise DataError.at(
                name, f"no such file, and the Hub cannot be reached: {offline}", fix=nearest(name)
            ) from error
        whole = _whole(error)
        fixes = {"Config name is missing": "data.name", "BuilderConfig": "data.name", "Unknown split": "data.split"}
        fix = next((f"{field}: one of them" for text, field in fixes.items() if text in whole), "")
        raise DataError.at(name, f"cannot be loaded: {whole}", fix=fix) from error
    number = 0
    try:
        for number, row in enumerate(rows, start=1):
            yield f"{name}:row {number}", _unless_too_big(dict(row), max_row_bytes)
    except failures as error:  # while streaming, or a damaged cache
        raise DataError.at(f"{name}:row {number + 1}", f"cannot be read: {_whole(error)}") from error


def _saved(folder: Path, split: str, streaming: bool) -> Any:
    """One split, or slices of splits, of what save_to_disk wrote: `load_dataset` would read the caches of a later map or filter
    that lie beside the rows as rows. One Dataset has no splits, so it is `train`, the default, or what it was a split of."""
    import datasets

    found = datasets.load_from_disk(str(folder))
    is_one = isinstance(found, datasets.Dataset)
    named = {"train": found, str(found.split or "train"): found} if is_one else dict(found)
    wanted = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in named.items()})
    parts = [named[part.splitname].select(range(part.from_, part.to)) for part in wanted]
    rows = datasets.concatenate_datasets(parts).with_format(None)  # tensors, if it was saved with a format of them
    return rows.to_iterable_dataset() if streaming else rows


def sha256_rows(rows: Iterable[dict[str, Any]]) -> str:
    """Hash of rows as JSON lines with sorted keys, for a data set that is not one file."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode("ascii") + b"\n")
    return digest.hexdigest()


def _whole(error: BaseException) -> str:
    """What an error and its causes say, in one line: that of `datasets` often says nothing that its cause does not."""
    said, at = dict[str, None](), error
    while at is not None:
        said.setdefault(" ".join(str(at).split()) or type(at).__name__)
        at = at.__cause__  # type: ignore[assignment]
    return "; ".join(said)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
