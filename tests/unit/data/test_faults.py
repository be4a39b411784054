"""Every line of the fault table that concerns data: the message a user sees, the exit code, and that nothing hangs."""

from __future__ import annotations

import gzip
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config import DataConfig
from rlhf_ray.data.collate import require_batch, tokenise_prompts, tokenise_sft
from rlhf_ray.data.load import load_rows
from rlhf_ray.data.records import RowSet, check_same_data, read_rows
from rlhf_ray.data.templates import load_template
from rlhf_ray.errors import DataError
from tests.unit.data.conftest import CHAT

GOOD = '{"prompt": "Name a bird.", "chosen": "Wren.", "rejected": "Oak."}\n'
Read = Callable[..., RowSet]


def _rows_with(third: str, end: str = "\n") -> str:
    return GOOD + GOOD + third + end


def _nested(levels: int) -> str:
    return '{"prompt": "p", "chosen": "a", "rejected": "b", "x": ' + "[" * levels + "]" * levels + "}"


# number in the fault table, content of pairs.jsonl, what the first line of the error must start with
CONTENT: list[tuple[str, str | bytes, str]] = [
    ("1", _rows_with('{"prompt": }'), "pairs.jsonl:3: invalid JSON: Expecting value (col 12)"),
    ("2", _rows_with('{"prompt": "Name a b', ""), "pairs.jsonl:3: invalid JSON: Unterminated string starting at (col 12); file"
     " looks truncated"),
    ("2 inside a letter", _rows_with("").encode() + b'{"prompt": "caf\xc3', "pairs.jsonl:4: byte 0xc3 is not UTF-8"
     " (byte 16 of the line); file looks truncated"),
    ("3", GOOD + '{"prompt": "p", "chosen": "a"}\n', "pairs.jsonl:2: missing field 'rejected'"),
    ("3 first row", '{"prompt": "p", "chosen": "a"}\n' + GOOD, "pairs.jsonl:1: missing field 'rejected'"),
    ("4", _rows_with('{"prompt": null, "chosen": "a", "rejected": "b"}'), "pairs.jsonl:3: 'prompt' is null"),
    ("5", _rows_with('{"prompt": 7, "chosen": "a", "rejected": "b"}'), "pairs.jsonl:3: 'prompt': expected string, got int"),
    ("6", "", "pairs.jsonl: file is empty"),
    ("7", "\n  \n\r\n", "pairs.jsonl: no rows"),
    ("8", GOOD.encode("utf-16"), "pairs.jsonl: not UTF-8 (looks like UTF-16); re-save as UTF-8"),
    ("8 without mark", GOOD.encode("utf-16-le"), "pairs.jsonl: not UTF-8 (looks like UTF-16); re-save as UTF-8"),
    ("9", GOOD.encode() + '{"prompt": "café"}\n'.encode("latin-1"), "pairs.jsonl:2: byte 0xe9 is not UTF-8 (byte 16"),
    ("11", "[" + GOOD.strip() + "]", "pairs.jsonl: not a JSONL file: it holds a JSON array"),
    ("11 on a later line", _rows_with("[1]"), "pairs.jsonl:3: expected a JSON object, got array"),
    ("11 indented", json.dumps({"prompt": "p"}, indent=2), "pairs.jsonl: not a JSONL file: it holds indented JSON"),
    ("12", _rows_with('{"prompt": "p", "chosen": "a", "rejected": "b", "reward": NaN}'), "pairs.jsonl:3: 'reward' is not finite"),
    ("12 overflow", _rows_with('{"prompt": "p", "scores": [1, 1e999]}'), "pairs.jsonl:3: 'scores' is not finite"),
    ("13", _rows_with('{"prompt": "' + "x" * 19_999_980 + '"}'), "pairs.jsonl:3: row 20.0 MB > max_row_bytes 1 MB"),
    ("14", _rows_with(_nested(3000)), "pairs.jsonl:3: nesting too deep"),
    ("14 just over", _rows_with(_nested(100)), "pairs.jsonl:3: nesting too deep"),
    ("15", _rows_with('{"prompt": "p", "prompt": "q"}'), "pairs.jsonl:3: duplicate key 'prompt'"),
    ("16 surrogate", _rows_with('{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}'),
     "pairs.jsonl:3: 'prompt' holds a lone surrogate (U+D800)"),
    ("16 NUL", _rows_with('{"prompt": "p", "chosen": "a\\u0000", "rejected": "b"}'),
     "pairs.jsonl:3: 'chosen' holds a NUL character"),
    ("17", _rows_with('{"prompt": "p", "chosen": "same", "rejected": "same "}'), "pairs.jsonl:3: identical completions"),
    ("19", _rows_with('{"prompt": "", "chosen": "a", "rejected": "b"}'), "pairs.jsonl:3: empty prompt"),
    ("19 blank", _rows_with('{"prompt": " \\n", "chosen": "a", "rejected": "b"}'), "pairs.jsonl:3: empty prompt"),
    ("25 gzip", gzip.compress(GOOD.encode()), "pairs.jsonl: not a JSONL file: its content is gzip data; fix: name it pairs.jsonl"),
    ("25 csv", "prompt,chosen,rejected\np,a,b\n", "pairs.jsonl: not a JSONL file"),
    ("25 parquet", b"PAR1" + bytes(40), "pairs.jsonl: not a JSONL file: its content is Parquet data"),
]  # fmt: skip


@pytest.mark.parametrize(("number", "content", "message"), CONTENT, ids=[f"row {c[0]}" for c in CONTENT])
def test_content(read: Read, number: str, content: str | bytes, message: str) -> None:
    start = time.monotonic()
    with pytest.raises(DataError) as caught:
        read(content, "preference", "pairs.jsonl")
    assert time.monotonic() - start < 2
    lines = caught.value.lines()
    assert lines[0].startswith(f"error: {message}")
    assert caught.value.exit_code == 4
    assert len(lines) == 1
    assert "\n" not in lines[0]


def test_row_10_byte_order_mark_and_crlf_are_fine(read: Read) -> None:
    found = read(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode() * 2, "preference")
    assert [row.chosen for row in found.rows] == ["Wren.", "Wren."]


def test_row_14_a_hundred_levels_are_fine(read: Read) -> None:
    assert (
        len(read(_nested(99) + "\n" + _nested(3).replace('"p"', json.dumps("[" * 5000)) + "\n", "preference").rows) == 2
    )


def test_damaged_gzip_data_is_one_line(read: Read) -> None:
    damaged = bytearray(gzip.compress(GOOD.encode() * 50))
    damaged[20:30] = b"\xff" * 10
    with pytest.raises(DataError) as caught:
        read(bytes(damaged), "preference", "pairs.jsonl.gz")
    assert caught.value.lines()[0].startswith(
        "error: pairs.jsonl.gz: cannot be read: Error -3 while decompressing data"
    )
    with pytest.raises(ValueError, match=r"train\[0\]: empty; expected text"):
        DataConfig(train=("",))


def test_row_17_identical_completions_can_be_skipped_and_are_counted(read: Read) -> None:
    same = '{"prompt": "p", "chosen": "same", "rejected": "same"}\n'
    found = read(GOOD + same + GOOD + same, "preference", on_bad_row="skip")
    assert len(found.rows) == 2
    assert str(found.skipped) == "2 skipped: identical completions (first rows.jsonl:2)"


def test_all_problems_of_all_files_come_at_once(write: Callable[..., str]) -> None:
    """Rows of a file with one and the same fault are one line."""
    bad = '{"prompt": "p", "chosen": 1, "rejected": null}\n'
    names = (write(GOOD + bad, "a.jsonl"), "missing.jsonl", write(bad * 30, "b.jsonl"))
    with pytest.raises(DataError) as caught:
        read_rows(DataConfig(train=names), "preference")
    assert len(caught.value.problems) == 32
    lines = caught.value.lines()
    assert lines[0] == "error: a.jsonl:2: 'chosen': expected string, got int; 'rejected' is null"
    assert lines[1].startswith("error: missing.jsonl: no such file")
    assert lines[2].startswith("error: b.jsonl:1: 'chosen': expected string")
    assert lines[2].endswith("; the same at 2, 3, 4, 5 and 25 more")


# number, how the path is made, path, message
def _directory(folder: Path) -> None:
    (folder / "pairs.jsonl").mkdir()


def _fifo(folder: Path) -> None:
    os.mkfifo(folder / "pairs.jsonl")


def _loop(folder: Path) -> None:
    (folder / "pairs.jsonl").symlink_to("other.jsonl")
    (folder / "other.jsonl").symlink_to("pairs.jsonl")


def _typo(folder: Path) -> None:
    (folder / "pair.jsonl").write_text(GOOD)


def _dangling(folder: Path) -> None:
    (folder / "pairs.jsonl").symlink_to("nothing.jsonl")


PATHS: list[tuple[str, Callable[[Path], None], str, str]] = [
    ("25 directory", _directory, "pairs.jsonl", "pairs.jsonl: not a JSONL file: it is a directory"),
    ("25 FIFO", _fifo, "pairs.jsonl", "pairs.jsonl: not a JSONL file: it is not a regular file"),
    ("25 symlink loop", _loop, "pairs.jsonl", "pairs.jsonl: not a JSONL file: Too many levels of symbolic links"),
    ("25 device", lambda _: None, "/dev/zero", "/dev/zero: not a data file: it is not a regular file"),
    ("26", _typo, "pairs.jsonl", "pairs.jsonl: no such file; fix: did you mean 'pair.jsonl'?"),
    ("26 link to nothing", _dangling, "pairs.jsonl", "pairs.jsonl: no such file"),
    ("26 no folder", lambda _: None, "nowhere/pairs.jsonl", "nowhere/pairs.jsonl: no such file; fix: there is no folder nowhere"),
    ("26 uri", lambda _: None, "ftp://b/x.jsonl", "ftp://b/x.jsonl: cannot be read: "),
    ("26 no suffix", lambda f: (f / "in").mkdir(), "in/pairs", "in/pairs: no such file"),
    ("26 unknown type", lambda f: (f / "a.txt").write_text("x") and None, "a.txt", "a.txt: unknown file type; expected .jsonl"),
    ("26 NUL in the name", lambda _: None, "a\0.jsonl", "'a\\x00.jsonl': not a file name"),
]  # fmt: skip


@pytest.mark.parametrize(("number", "make", "path", "message"), PATHS, ids=[f"row {p[0]}" for p in PATHS])
def test_paths(folder: Path, number: str, make: Callable[[Path], None], path: str, message: str) -> None:
    make(folder)
    start = time.monotonic()
    with pytest.raises(DataError) as caught:
        read_rows(DataConfig(train=(path,)), "preference")
    assert time.monotonic() - start < 2
    assert caught.value.lines()[0].startswith(f"error: {message}")
    assert caught.value.exit_code == 4


@pytest.fixture
def as_nobody() -> Iterator[None]:
    """Root may read every file, so the test is run as somebody else."""
    me = os.geteuid()
    if me == 0:
        os.seteuid(65534)
    yield
    os.seteuid(me)


def test_row_26_unreadable(write: Callable[..., str], folder: Path, request: pytest.FixtureRequest) -> None:
    name = write(GOOD)
    (folder / name).chmod(0)
    request.getfixturevalue("as_nobody")
    with pytest.raises(DataError, match=r"rows.jsonl: cannot be read: Permission denied"):
        read_rows(DataConfig(train=(name,)), "preference")


def test_row_18_prompts_in_both_files_are_counted_with_the_first(write: Callable[..., str]) -> None:
    train = write([{"prompt": p, "completion": "x"} for p in ("A?", "B?", "C?")], "train.jsonl")
    held = write([{"prompt": p, "completion": "y"} for p in ("D?", "B? ", "C?", "B?")], "eval.jsonl")
    found = load_rows(DataConfig(train=(train,), eval=(held,)), "sft")
    assert [
        w
        for w in found.warnings
        if w.startswith("3 of 4 evaluation prompts are also training prompts (first eval.jsonl:2)")
    ]
    assert not load_rows(
        DataConfig(train=(train,), eval=(write([{"prompt": "E?", "completion": "y"}], "e.jsonl"),)), "sft"
    ).warnings


def test_row_20_prompt_over_the_context_stops_or_is_counted(read: Read, tokenizer: Any) -> None:
    rows = read([{"prompt": "x" * 5119}, {"prompt": "y" * 1791}], "prompt").rows  # and <s> before each
    options = {"max_length": 2048, "response_length": 256}
    with pytest.raises(DataError) as caught:
        tokenise_prompts(rows, load_template("none"), tokenizer, too_long="stop", **options)
    assert caught.value.lines()[0].startswith("error: rows.jsonl:1: 5,120 tokens > 2,048-256")
    assert len(caught.value.problems) == 1
    dropped = tokenise_prompts(rows, load_template("none"), tokenizer, too_long="drop", **options)
    assert str(dropped.dropped) == "1 dropped: over 2,048-256 (first rows.jsonl:1, 5,120 tokens)"
    assert [len(e.ids) for e in dropped.examples] == [1792]
    cut = tokenise_prompts(rows, load_template("none"), tokenizer, too_long="truncate", **options)
    assert [len(e.ids) for e in cut.examples] == [1792, 1792]
    assert str(cut.truncated) == "1 truncated: over 2,048-256 (first rows.jsonl:1, 5,120 tokens)"


def test_row_21_completion_empty_after_truncation_is_counted(read: Read, tokenizer: Any) -> None:
    rows = read([{"prompt": "x" * 40, "completion": "y"}, {"prompt": "x", "completion": "y"}], "sft").rows
    for train_on_inputs in (False, True):
        found = tokenise_sft(
            rows, load_template("none"), tokenizer,
            max_length=41, too_long="truncate", train_on_inputs=train_on_inputs, train_on_turns="all", add_eos_token=True,
        )  # fmt: skip
        assert str(found.dropped) == "1 dropped: reply empty after truncation (first rows.jsonl:1, 41 prompt tokens)"
        assert [e.where for e in found.examples] == ["rows.jsonl:2"]


def test_row_23_fewer_rows_than_one_batch() -> None:
    with pytest.raises(DataError) as caught:
        require_batch(12, 64, "rows.jsonl", "lower train_batch_size")
    assert caught.value.lines() == ["error: rows.jsonl: 12 rows < global batch 64; fix: lower train_batch_size"]
    require_batch(64, 64, "rows.jsonl", "")


def test_rows_that_the_template_refuses_are_skipped_and_counted(read: Read, load_byte_tokenizer: Any) -> None:
    """System role refused; several turns under an instruction template: row faults like any other (issue 16, inputs 18)."""
    tokenizer = load_byte_tokenizer()
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    tokenizer.chat_template = refuses + CHAT
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    system = [{"role": "system", "content": "Be brief."}, *said]
    rows = read([{"messages": said}, {"messages": system}, {"messages": said + said}], "sft").rows
    options = {
        "max_length": 512,
        "too_long": "stop",
        "add_eos_token": True,
        "train_on_turns": "all",
        "train_on_inputs": False,
    }
    for template, kept, skipped in (
        ("chat", [1, 3], "1 skipped: the chat template refuses this conversation: System role not supported (first rows.jsonl:2)"),
        ("alpaca_short", [1], "2 skipped: template 'alpaca_short' takes one user message (first rows.jsonl:2, got system, user)"),
    ):  # fmt: skip
        loaded = load_template(template, tokenizer)
        found = tokenise_sft(rows, loaded, tokenizer, on_bad_row="skip", **options)
        assert [e.where for e in found.examples] == [f"rows.jsonl:{n}" for n in kept]
        assert str(found.skipped) == skipped
        with pytest.raises(DataError):
            tokenise_sft(rows, loaded, tokenizer, **options)
        room = {"max_length": 512, "response_length": 1, "too_long": "stop"}
        asked = tokenise_prompts(rows, loaded, tokenizer, on_bad_row="skip", **room)
        assert (str(asked.skipped), len(asked.examples)) == (skipped, len(kept))


def test_no_rows_left_says_what_became_of_them() -> None:
    with pytest.raises(DataError) as caught:
        require_batch(
            0, 8, "a.jsonl", "lower max_length", ["16 rows: 16 train", "train: 16 dropped: over max_length 8"]
        )
    assert "got 16 rows: 16 train; train: 16 dropped: over max_length 8; fix" in caught.value.lines()[0]


def test_row_24_data_changed_since_the_checkpoint(read: Read) -> None:
    recorded = read(GOOD, "preference").manifest()
    check_same_data(recorded, read(GOOD, "preference").files)
    with pytest.raises(DataError) as caught:
        check_same_data(recorded, read(GOOD + GOOD, "preference").files)
    line = caught.value.lines()[0]
    assert line.startswith("error: rows.jsonl: data sha256 differs")
    assert line.endswith("fix: put it back, or accept the data as it is now: rlhf-ray resume RUN --reset-data")
    check_same_data([], read(GOOD + GOOD, "preference").files)
    with pytest.raises(DataError, match="not among the data files"):
        check_same_data(recorded, read(GOOD, "preference", "other.jsonl").files)


USER, WREN = {"role": "user", "content": "Name a bird."}, {"role": "assistant", "content": "Wren."}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "\ud800"}}}
INNER: list[tuple[dict[str, Any], str]] = [
    ({"messages": [USER, WREN], "tools": [{"type": "function", "function": "look"}]}, "'tools'[0]: expected {type, function: "),
    ({"messages": [USER, WREN], "tools": [USER, "look"]}, "'tools'[1]: expected {type, function: "),
    ({"messages": [USER, WREN], "tools": [{"name": "\ud800"}]}, "'tools' holds a lone surrogate (U+D800)"),
    ({"messages": [USER, WREN], "chat_template_kwargs": {"a": "\ud800"}}, "'chat_template_kwargs' holds a lone surrogate"),
    ({"messages": [USER, {**WREN, "tool_calls": [CALL]}]}, "'messages'[1]: 'tool_calls' holds a lone surrogate (U+D800)"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "message"), INNER, ids=[m for _, m in INNER])
def test_what_is_wrong_inside_tools_is_one_line(read: Read, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        read([row], "sft")
    assert caught.value.lines()[0].startswith(f"error: rows.jsonl:1: {message}")


def test_templates_that_break_and_tools_without_a_function(read: Read, load_byte_tokenizer: Any) -> None:
    """A tool of another kind (a column that Parquet fills with nulls) is none that the template has to name."""
    tokenizer, options = load_byte_tokenizer(), {"max_length": 512, "response_length": 1, "too_long": "stop"}
    rows = read([{"messages": [USER, WREN], "tools": [{"type": "web_search", "function": None}]}], "prompt").rows
    tokenizer.chat_template = "{{ tools | tojson }}" + CHAT
    assert tokenise_prompts(rows, load_template("chat", tokenizer), tokenizer, **options).examples
    for broken, why in (("{{ 1 / 0 }}", "division by zero"), ("{{ '%(a)s' % {} }}", "'a'")):
        tokenizer.chat_template = broken
        with pytest.raises(DataError, match=f"the chat template refuses this conversation: {why}"):
            tokenise_prompts(rows, load_template("chat", tokenizer), tokenizer, **options)


def test_row_27_one_sided_preferences_are_warned_about(read: Read) -> None:
    rows = [{"instruction": f"{i}?", "output_1": "a", "output_2": "b", "preference": 1} for i in range(12)]
    assert read(rows, "preference").warnings == ("rows.jsonl: 'preference' is 1 in all 12 rows: are the labels real?",)
    rows[3]["preference"] = 2
    assert not read(rows, "preference").warnings
