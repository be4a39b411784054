"""Files of rows: what is written reads back, in both forms, or nothing is written."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from rlhf_ray.storage.rows_file import write_rows

ROWS = [
    {"instruction": "Say hé", "output": "line\nbreak"},
    {"instruction": "\ud800 alone", "output": None, "reward": 0.1},
]


def test_json_lines_read_back(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS)
    lines = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == ROWS


def test_a_json_list_reads_back(tmp_path: Path) -> None:
    write_rows(str(tmp_path / "rows.json"), ROWS)
    assert json.loads((tmp_path / "rows.json").read_text(encoding="utf-8")) == ROWS
    write_rows(tmp_path / "none.json", [])
    assert json.loads((tmp_path / "none.json").read_text(encoding="utf-8")) == []


def test_a_number_that_json_does_not_know_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_rows(tmp_path / "rows.json", [{"reward": math.nan}])
    assert list(tmp_path.iterdir()) == []
