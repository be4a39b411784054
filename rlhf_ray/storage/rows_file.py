"""Rows as JSON: one object per line, or one list, as the ancestors' files are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_ray.storage.run_folder import atomic_write_text


def write_rows(path: Path | str, rows: Sequence[Mapping[str, Any]]) -> None:
    """A JSON list with a row per line if the name ends in .json, else JSON lines. NaN and infinity raise ValueError."""
    lines = [_json(row) for row in rows]
    is_list = Path(path).suffix == ".json"
    atomic_write_text(path, "[\n" + ",\n".join(lines) + "\n]\n" if is_list else "".join(f"{line}\n" for line in lines))


def _json(row: Mapping[str, Any]) -> str:
    text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    # A lone surrogate cannot be UTF-8; inside a JSON string its escape reads back as the same character.
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")
