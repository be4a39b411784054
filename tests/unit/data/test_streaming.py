"""Files that are larger than memory: the rows and the account of rows that are kept, in a memory that does not grow."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config import DataConfig
from rlhf_ray.data import splits
from rlhf_ray.data import stored as stored_module
from rlhf_ray.data.load import load_rows
from rlhf_ray.data.prompts import Prompt
from rlhf_ray.data.records import Row
from rlhf_ray.data.stored import StoredRows, stored, tokenised
from rlhf_ray.data.streamed import StreamedRows
from rlhf_ray.data.templates import load_template
from rlhf_ray.data.tokenise import TokenisedPair, TokenisedRow, tokenise_pairs, tokenise_sft
from rlhf_ray.errors import DataError

NONE = load_template("none")
SFT: dict[str, Any] = {"train_on_inputs": False, "train_on_turns": "all", "add_eos_token": True}


def _told(count: int, word: str = "a") -> list[dict[str, Any]]:
    return [{"prompt": f"{word} {i}?", "completion": word * (i % 7 + 1), "source": "x"} for i in range(count)]


def _farm(count: int) -> list[dict[str, Any]]:
    said = {"output_1": "a", "output_2": "b"}
    return [{"instruction": f"{i}?", "input": "", **said, "preference": 1 if i % 9 else 0} for i in range(count)]


@pytest.mark.parametrize(
    ("rows", "kind", "settings"),
    [
        (_told(300), "sft", {}),
        (_told(300), "sft", {"weights": (0.7, 0.3), "mix_seed": 3}),
        (_told(300), "sft", {"weights": (0.7, 0.3), "held_out_prompts": ("asked.jsonl",)}),
        (_told(300), "sft", {"eval": ("asked.jsonl",), "columns": {"completion": "answer", "prompt": "instruction"}}),
        ([{"text": f"a {i}? and more"} for i in range(300)], "sft", {"held_out_prompts": ("asked.jsonl",)}),
        (_farm(300), "preference", {"disjoint_stages": True, "held_out_fraction": 0.3}),
        ([*_farm(5), {"prompt": None}, *_farm(300)], "preference", {"on_bad_row": "skip"}),
        (_told(200) * 2, "prompt", {}),
    ],
)
def test_streamed_rows_are_those_that_are_kept(
    rows: list[dict[str, Any]],
    kind: Any,
    settings: dict[str, Any],
    write: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(splits, "_AT_ONCE", 17)
    if "columns" in settings:
        rows = [{"completion": row["prompt"], "prompt": row["completion"]} for row in rows]
        settings = {**settings, "columns": {"completion": "prompt", "prompt": "completion"}}
    write([{"prompt": f"a {i}?", "completion": "b"} for i in range(0, 300, 5)], "asked.jsonl")
    given = {"train": (write(rows, "one.jsonl"), write(rows[::-1][:150], "two.jsonl")), **settings}
    kept = load_rows(DataConfig(**given), kind, "reward")
    streamed = load_rows(DataConfig(**given, streaming=True), kind, "reward")
    assert isinstance(streamed.train, StreamedRows) and not isinstance(kept.train, StreamedRows)
    assert len(streamed.train) > 50 and list(streamed.train) == list(kept.train) == list(streamed.train)
    assert list(streamed.held_out) == list(kept.held_out)
    assert (len(streamed.train), len(streamed.held_out)) == (len(kept.train), len(kept.held_out))
    assert (streamed.train[3], streamed.train[-1]) == (kept.train[3], kept.train[-1])
    assert tuple(streamed.train[5:9]) == tuple(kept.train[5:9])
    assert (streamed.warnings, streamed.rule) == (kept.warnings, kept.rule)
    assert (streamed.summary, streamed.manifest) == (kept.summary, kept.manifest)


def test_all_faults_of_a_file_are_told_with_their_lines(write: Callable[..., str]) -> None:
    rows = _told(6000)
    rows[4320]["completion"] = None
    broken = write("".join(json.dumps(row) + "\n" for row in rows) + '{"prompt": ')
    said = []
    for streaming in (False, True):
        with pytest.raises(DataError, match=r"rows\.jsonl:4321: 'completion' is null") as caught:
            load_rows(DataConfig(train=(broken,), streaming=streaming), "sft")
        said.append(caught.value.lines())
    assert said[0] == said[1] and "rows.jsonl:6001: invalid JSON" in said[1][-1]
    for columns in ({"nowhere": "here"}, {"prompt": "answer", "completion": "answer"}, {"prompt": "source"}):
        told = []
        for streaming in (False, True):
            with pytest.raises(DataError) as caught:
                load_rows(DataConfig(train=(broken,), streaming=streaming, columns=columns), "sft")
            told.append(caught.value.lines())
        assert told[0] == told[1] and "rows.jsonl:6001: invalid JSON" in told[1][0] and len(told[1]) > 1
    for empty in ("\n\n", '{"other": 1}\n{"prompt": '):
        told = []
        for streaming in (False, True):
            with pytest.raises(DataError) as caught:
                load_rows(DataConfig(train=(write(empty),), streaming=streaming), "sft")
            told.append(caught.value.lines())
        assert told[0] == told[1]


def test_a_file_that_changes_while_it_is_used_is_no_other_data(write: Callable[..., str]) -> None:
    name = write(_told(50))
    rows = load_rows(DataConfig(train=(name,), streaming=True, held_out_fraction=0.0), "sft").train
    write(_told(51))
    with pytest.raises(DataError, match=r"rows\.jsonl: has changed since it was checked; expected 50 rows; got 51"):
        list(rows)
    write([*_told(49), {"prompt": "another", "completion": "row"}])
    with pytest.raises(DataError, match=r"rows\.jsonl: was written again since it was checked"):
        list(rows)
    write([*_told(7), {"prompt": "a", "completion": ""}, *_told(42)])
    with pytest.raises(DataError, match=r"rows\.jsonl:8: has changed since it was checked: empty completion"):
        list(rows)


ROWS = [TokenisedRow([1, 7, 2**31 - 1], [-100, 7, 2**31 - 1], "a:1"), TokenisedRow([1], [-100], "b:row 2\ud800")]
PAIRS = [
    TokenisedPair([1, 2, 3, 4], [1, 2], 1, "a:1", 0.1, "group \u00e9"),
    TokenisedPair([1, 2], [1, 2, 3], 2, "a:2"),
    TokenisedPair([1, 2, 9], [1, 2, 3], 2, "a:3", -1e-300),
]


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("rows", [ROWS, PAIRS, []])
def test_stored_rows_are_what_they_were(rows: list[Any], on_disk: bool, tmp_path: Path) -> None:
    found = stored(iter(rows), tmp_path if on_disk else None)
    assert list(found) == rows and len(found) == len(rows) and list(reversed(found)) == rows[::-1]
    assert list(found[1:][:1]) == rows[1:][:1] and list(found[:None]) == rows and list(found[::-1]) == rows[::-1]
    longest = [max(len(r.input_ids) if rows is ROWS else max(len(r.chosen_ids), len(r.rejected_ids)), 0) for r in rows]
    assert found.lengths.tolist() == longest
    assert list(pickle.loads(pickle.dumps(found))) == rows  # noqa: S301 - as a worker of a DataLoader that is not forked gets them
    assert os.listdir(tmp_path) == []  # nothing there that could stay, or be found by another start


def test_slices_give_the_tokens_and_the_account_of_the_whole(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(stored_module, "SLICE", 7)
    rows = [
        Row(f"x:{i}", Prompt("ab" * (i % 5)), completion="c" * (i % 11 + 1) + "</s>" * (i % 13 == 0), margin=i / 7)
        for i in range(100)
    ]
    pairs = [Row(r.where, r.prompt, chosen=r.completion, rejected="d" * (i % 12)) for i, r in enumerate(rows)]
    for too_long in ("drop", "truncate"):
        shared: dict[str, Any] = {"max_length": 12, "too_long": too_long}
        for given, tokenise in (
            (rows, partial(tokenise_sft, template=NONE, tokenizer=tokenizer, **shared, **SFT)),
            (pairs, partial(tokenise_pairs, template=NONE, tokenizer=tokenizer, **shared, add_eos_token=True)),
        ):
            whole = tokenise(given)
            examples, done = tokenised(given, tokenise, tmp_path)
            assert isinstance(examples, StoredRows) and list(examples) == whole.examples and len(examples) > 20
            assert (done.tallies, done.warnings, done.examples) == (whole.tallies, whole.warnings, [])

    def stops(part: Any) -> Any:
        return tokenise_sft(part, NONE, tokenizer, max_length=12, too_long="stop", **SFT)

    with pytest.raises(DataError) as whole_error:
        stops(rows)
    with pytest.raises(DataError) as in_slices:
        tokenised(rows, stops)
    assert in_slices.value.problems == whole_error.value.problems and len(in_slices.value.problems) > 7


def test_a_large_file_takes_no_memory_of_its_size(write: Callable[..., str], tiny_llama: Callable[..., Path]) -> None:
    """In MiB, a file of 32. Rows were kept and tokens were lists: of 23 MiB of short rows that made 633, now 32."""
    said = ({"prompt": f"Say {i}.", "completion": f"As far as I know {i * 7919}."} for i in range(20_000))
    name = write([{**row, "source": f"{row['prompt']} {'x' * 1500}"} for row in said])
    code = f"""
from rlhf_ray.config import DataConfig
from rlhf_ray.data.load import load_rows
from rlhf_ray.data.stored import tokenised
from rlhf_ray.data.templates import load_template
from rlhf_ray.data.tokenise import tokenise_sft
from transformers import AutoTokenizer
from pathlib import Path

tokenizer, template = AutoTokenizer.from_pretrained({str(tiny_llama())!r}), load_template("none")

def tokenise(part):
    return tokenise_sft(part, template, tokenizer, max_length=128, too_long="drop", **{SFT!r})

def tokens(**settings):
    rows = load_rows(DataConfig(train=({name!r},), **settings), "sft")
    return [len(tokenised(side, tokenise, Path())[0]) for side in (rows.train, rows.held_out)]

def grown(**settings):
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew (ru_maxrss would begin with that of the parent)
    before = peak()
    assert sum(tokens(**settings)) == 20_000
    return peak() - before

def peak():
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024

tokens(streaming=True, max_rows=4096)
print(grown(streaming=True), grown())
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True)
    streamed, kept = map(float, done.stdout.split())
    assert streamed < 16 and kept > 30, done.stdout
