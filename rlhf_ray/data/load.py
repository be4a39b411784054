"""The rows of a stage: read, cut into training and held-out rows, and accounted for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlhf_ray.config import DataConfig
from rlhf_ray.data.counts import describe_rows
from rlhf_ray.data.formats import RowKind
from rlhf_ray.data.records import Row, RowSet, read_rows
from rlhf_ray.data.splits import Half, overlap, split


@dataclass(frozen=True)
class StageRows:
    """`train` and `held_out` rows of a stage, with what the log and the manifest say about them.

    summary: one line per set of files, which accounts for every row.  warnings: lines that the user should see.
    manifest: [{path, sha256, rows, used, format}] of all files.
    """

    train: tuple[Row, ...]
    held_out: tuple[Row, ...]
    summary: tuple[str, ...]
    warnings: tuple[str, ...]
    manifest: tuple[dict[str, Any], ...]


def load_rows(config: DataConfig, kind: RowKind, disjoint_stage: Half | None = None) -> StageRows:
    """Rows of one kind for one stage.

    The held-out rows are those whose prompt hash falls into data.held_out_fraction; with data.eval they are the rows of those
    files, data.train trains in full, and rows of data.eval that ask what training rows ask are warned about. With
    data.disjoint_stages, `disjoint_stage` says whose half of the prompts trains. Raises DataError, ConfigError.
    """
    read = read_rows(config, kind)
    separate = read_rows(config, kind, "eval") if config.eval else None
    fraction = 0.0 if separate else config.held_out_fraction
    parts = split(read.rows, fraction, disjoint_stage if config.disjoint_stages else None)
    warnings = [*read.warnings]
    summary = [_account(read, {"train": len(parts.train), "held out": len(parts.held_out)}, parts.other_half)]
    manifest = read.manifest()
    held_out = parts.held_out
    if separate:
        held_out = separate.rows
        warnings += [*separate.warnings, overlap(held_out, parts.train).warning()]
        summary.append(_account(separate, {"evaluation": len(held_out)}, 0))
        manifest += separate.manifest()
    return StageRows(
        parts.train, held_out, tuple(summary), tuple(w for w in warnings if w), tuple(dict(item) for item in manifest)
    )


def _account(rows: RowSet, parts: dict[str, int], other_half: int) -> str:
    unused = rows.total - len(rows.rows) - rows.dropped.total - rows.skipped.total
    extra = {"of the other stage": other_half, "beyond max_rows": unused}
    return describe_rows(rows.total, parts | {name: n for name, n in extra.items() if n}, rows.dropped, rows.skipped)
