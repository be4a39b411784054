"""Three of `make inputs`; the whole table stands in tests/README.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import shared_inputs
from tests.readme_tables import table_of

pytestmark = [pytest.mark.integration, pytest.mark.data]


@pytest.fixture(scope="module")
def folder(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the inputs; models that have seen a single step, since these cases ask nothing of their replies."""
    if not (data_dir.parent / "inputs").is_dir():
        pytest.skip(f"no inputs beside {data_dir}")
    made = tmp_path_factory.mktemp("shared") / "inputs"
    shared_inputs.prepare(data_dir.parent / "inputs", made, steps=1)
    return made


@pytest.mark.parametrize("name", ["03-multi-turn", "11-hub-config", "17-sharegpt", "18-system-role"])
def test_a_case_is_answered_right(name: str, folder: Path) -> None:
    assert not shared_inputs.attempt(name, folder)["got"].startswith("**no:**")


def test_a_case_that_goes_wrong_is_a_row_that_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong() -> str:
        """all is well"""
        raise ValueError("a | b\nc")

    monkeypatch.setitem(shared_inputs.CASES, "03-multi-turn", wrong)
    row = shared_inputs.attempt("03-multi-turn", folder)
    assert row == {"folder": "03-multi-turn", "right": "all is well", "got": "**no:** ValueError: a &#124; b c"}
    assert "0 of 1 cases are answered right." in shared_inputs.table({"03-multi-turn": row})


def test_every_folder_has_a_row(data_dir: Path) -> None:
    inputs = data_dir.parent / "inputs"
    folders = {path.name for path in inputs.iterdir() if path.is_dir()} if inputs.is_dir() else set(shared_inputs.CASES)
    assert {*shared_inputs.CASES, *shared_inputs.NOT_RUN} == folders
    lines = table_of(shared_inputs.README.read_text(), "inputs")
    assert {line.split("|")[1].strip() for line in lines if line.startswith("| ")} - {"folder"} == folders
