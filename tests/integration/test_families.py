"""A sample of `make families`; the whole table stands in rlhf_ray/models/README.md."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.integration
TESTS = Path(__file__).parents[1]


@pytest.fixture
def families(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TESTS))
    import families

    return families


@pytest.mark.parametrize("model_type", ["gemma4", "qwen3_5_text"])
def test_a_family_passes_whole(model_type: str, families: Any, tmp_path: Path) -> None:
    found = families.try_family(model_type, tmp_path)
    assert {column: found.get(column) for column in families.COLUMNS} == dict.fromkeys(families.COLUMNS, "yes")


def test_a_family_that_fails_is_a_row_that_says_so(families: Any, tmp_path: Path) -> None:
    found = families.try_family("rwkv", tmp_path)
    assert "models of type rwkv cannot be used here" in found["refused"]
    rows = [
        {"family": "rwkv", **found},
        {"family": "good", **dict.fromkeys(families.COLUMNS, "yes")},
        {"family": "half", **dict.fromkeys(families.COLUMNS, "yes"), "merge": "a | b"},
        {"family": "bart", "tiny model": "an encoder and a decoder"},
    ]
    text = families.table(rows)
    assert "**Pass whole (1):** good." in text and "**Refused before anything is loaded:** rwkv." in text
    assert "| half | yes | yes | yes | yes | yes | no (1) | yes |" in text and "1. half, merge: a / b" in text
    assert "- an encoder and a decoder: bart" in text


def test_a_missing_package_is_named_and_no_more(families: Any) -> None:
    said = "\nTimmWrapperModel requires the timm library but it was not found in your environment. You can install it with pip:"
    assert families.told(ImportError(said)) == "needs timm"


def test_the_table_is_that_of_the_rows(families: Any) -> None:
    """Nothing is in it that was not tried, and nothing that was tried is left out."""
    import readme_tables

    rows = sorted(map(json.loads, families.ROWS.read_text().splitlines()), key=lambda row: str(row["family"]))
    assert {row["family"] for row in rows} <= set(families.families())
    written = readme_tables.table_of(families.README.read_text(), "families")
    assert written == families.table(rows).strip().splitlines()
