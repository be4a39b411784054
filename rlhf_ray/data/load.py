"""The rows of a stage: read, cut into training and held-out rows, and accounted for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf_ray.config import DataConfig
from rlhf_ray.data.counts import describe_rows
from rlhf_ray.data.formats import RowKind
from rlhf_ray.data.mixture import mixture
from rlhf_ray.data.records import Row, RowSet, read_rows
from rlhf_ray.data.splits import Half, Questions, overlap, split
from rlhf_ray.data.streamed import StreamedRows, picked


@dataclass(frozen=True)
class StageRows:
    """`train` and `held_out` rows of a stage, with what the log and the manifest say about them.

    summary: one line per set of files, which accounts for every row.  warnings: lines that the user should see.
    manifest: [{path, sha256, rows, used, format}] of all files.  rule: how rows were held out, for the manifest.
    skipped: malformed rows that were left out (data.on_bad_row).
    """

    train: Sequence[Row]
    held_out: Sequence[Row]
    summary: tuple[str, ...]
    warnings: tuple[str, ...]
    manifest: tuple[dict[str, Any], ...]
    rule: HeldOutRule
    skipped: int = 0


@dataclass(frozen=True)
class HeldOutRule:
    """How a stage held out rows: a share of prompts by their hash, or separate files, beside which data.train trains in full."""

    fraction: float
    files: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: DataConfig) -> HeldOutRule:
        return cls(0.0, tuple(config.eval)) if config.eval else cls(config.held_out_fraction)

    def __str__(self) -> str:
        return f"data.eval {', '.join(self.files)}" if self.files else f"data.held_out_fraction {self.fraction:g}"

    def manifest(self) -> dict[str, Any]:
        return {"fraction": self.fraction, "files": list(self.files), "by": "hash of the last question"}


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
    train, manifest = parts.train, read.manifest()
    if config.held_out_prompts:
        others = read_rows(DataConfig(train=config.held_out_prompts), "prompt")
        held_elsewhere = Questions(split(others.rows, config.held_out_fraction).held_out)
        train = picked(train, (row not in held_elsewhere for row in train))
        manifest += others.manifest()
    counts = {"train": len(train), "held out": len(parts.held_out)}
    if len(train) < len(parts.train):
        counts["held out elsewhere"] = len(parts.train) - len(train)
    warnings, mixed = [*read.warnings], list[str]()
    if config.weights is not None:
        of_all = len(train)
        train, line = mixture(_by_file(read, train), config.weights, config.mix_seed, config.max_rows)
        mixed, counts = [line], {"train": len(train), **{k: n for k, n in counts.items() if k != "train"}}
        counts["beyond the mixture"] = of_all - len(train)
    summary = [_account(read, counts, parts.other_half), *mixed]
    if config.streaming and config.max_rows:
        summary.append(f"no more than {config.max_rows:,} rows of a file are read (data.streaming)")
    if read.unread:
        summary.append(f"nothing reads {', '.join(read.unread)}")
    given = [f"data.{n}" for n in ("name", "split") if getattr(config, n) != DataConfig.model_fields[n].default]
    if given and not read.has_splits and not (separate and separate.has_splits):
        warnings.append(f"{', '.join(given)}: no effect on files; only folders and Hub data sets have splits")
    held_out = tuple(parts.held_out) if kind == "prompt" else parts.held_out  # replies to them are kept beside them
    if separate:
        held_out = separate.rows
        warnings += [*separate.warnings, overlap(held_out, train).warning()]
        summary.append(_account(separate, {"evaluation": len(held_out)}, 0))
        manifest += separate.manifest()
    return StageRows(
        train,
        held_out,
        tuple(summary),
        tuple(w for w in warnings if w),
        tuple(dict(item) for item in manifest),
        HeldOutRule.of(config),
        read.skipped.total + (separate.skipped.total if separate else 0),
    )


def _by_file(read: RowSet, train: Sequence[Row]) -> Sequence[tuple[str, Sequence[Row]]]:
    """The training rows of each file."""
    if isinstance(train, StreamedRows):
        return [(file.path, rows) for file, rows in zip(read.files, train.by_part(), strict=True)]
    files: list[tuple[str, list[Row]]] = [(file.path, []) for file in read.files]
    numbers = [i for i, file in enumerate(read.files) for _ in range(file.used)]
    of = {id(row): number for row, number in zip(read.rows, numbers, strict=True)}
    for row in train:
        files[of[id(row)]][1].append(row)
    return files


def load_ptx_rows(config: DataConfig, held_out: Sequence[Row]) -> StageRows:
    """The rows of the supervised loss that PPO mixes in (ptx_data): as SFT's, without those that ask, or begin with, a prompt of
    `held_out`, on which the run is evaluated. Raises as `load_rows`."""
    rows, held = load_rows(config, "sft"), Questions(held_out)
    train = tuple(row for row in rows.train if row not in held)
    left_out = len(rows.train) - len(train)
    lines = [*rows.summary, *([f"{left_out:,} of them ask what data holds out, and are left out"] if left_out else [])]
    return replace(rows, train=train, summary=tuple(lines))


def _account(rows: RowSet, parts: dict[str, int], other_half: int) -> str:
    unused = rows.total - len(rows.rows) - rows.dropped.total - rows.skipped.total
    extra = {"of the other stage": other_half, "beyond max_rows": unused}
    return describe_rows(rows.total, parts | {name: n for name, n in extra.items() if n}, rows.dropped, rows.skipped)
