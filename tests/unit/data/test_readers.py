"""Files of every kind, Hub data sets, and what becomes of rows that are not used."""

from __future__ import annotations

import gzip
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.config import DataConfig
from rlhf_ray.data.jsonrows import read_jsonl
from rlhf_ray.data.load import load_rows
from rlhf_ray.data.records import RowSet, read_rows
from rlhf_ray.data.tables import read_hub
from rlhf_ray.errors import DataError

Read = Callable[..., RowSet]
ROWS = [
    {"instruction": "Name a bird.", "input": "", "output": "Wren,\n\"the\" small one."},
    {"instruction": "Écris un mot.", "input": "français", "output": "Forêt."},
    {"instruction": "Say 七.", "input": "", "output": "七"},
]  # fmt: skip


def _jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _json(rows: list[dict[str, Any]]) -> bytes:
    return json.dumps(rows, indent=1).encode()


def _csv(rows: list[dict[str, Any]]) -> bytes:
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    return "".join(",".join('"' + cell.replace('"', '""') + '"' for cell in line) + "\r\n" for line in lines).encode()


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


KINDS = {
    "jsonl": (_jsonl, ("rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:3")),
    "json": (_json, ("rows.json:row 1", "rows.json:row 2", "rows.json:row 3")),
    "csv": (_csv, ("rows.csv:2", "rows.csv:4", "rows.csv:5")),
    "parquet": (_parquet, ("rows.parquet:row 1", "rows.parquet:row 2", "rows.parquet:row 3")),
}


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_rows(read: Read, kind: str, compressed: bool) -> None:
    make, where = KINDS[kind]
    content = gzip.compress(make(ROWS)) if compressed else make(ROWS)
    suffix = ".gz" if compressed else ""
    found = read(content, "sft", f"rows.{kind}{suffix}")
    assert [(r.prompt.text, r.prompt.input, r.completion) for r in found.rows] == [tuple(row.values()) for row in ROWS]
    assert [r.where for r in found.rows] == [w.replace(kind, kind + suffix, 1) for w in where]
    (file,) = found.manifest()
    assert file == {
        "path": f"rows.{kind}{suffix}",
        "sha256": hashlib.sha256(content).hexdigest(),
        "rows": 3,
        "used": 3,
        "format": "alpaca",
    }


def test_byte_order_mark_in_json_and_csv(read: Read) -> None:
    for name, make in (("a.json", _json), ("a.csv", _csv)):
        assert len(read(b"\xef\xbb\xbf" + make(ROWS), "sft", name).rows) == 3


def test_parquet_holds_message_lists(read: Read) -> None:
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    (row,) = read(_parquet([{"messages": turns}]), "sft", "a.parquet").rows
    assert row.completion == "Hello."


FAULTS: list[tuple[str, str | bytes, str]] = [
    ("a.json", "[", "a.json:1: invalid JSON: Expecting value (col 2); file looks truncated"),
    ("a.json", '[\n{"text": "x"},\n{"text": "y"', "a.json:3: invalid JSON: Expecting ',' delimiter (col 13); file looks truncated"),
    ("a.json", '[{"text": "x"} {"text": "y"}]', "a.json:1: invalid JSON: Expecting ',' delimiter (col 16)"),
    ("a.json", '[{"text": "x"}]\n]', "a.json:2: invalid JSON: Extra data (col 1)"),
    ("a.json", '[{"text": "x"}, 3]', "a.json:row 2: expected a JSON object, got int"),
    ("a.json", '[{"text": "x"}, {"text": "x", "text": "y"}]', "a.json:row 2: duplicate key 'text'"),
    ("a.json", '[{"text": "x", "n": -Infinity}]', "a.json:row 1: 'n' is not finite"),
    ("a.json", '[{"text": "x", "n": ' + "[" * 3000 + "]" * 3000 + "}]", "a.json:row 1: nesting too deep"),
    ("a.json", '[{"text": "x", "n": ' + "[" * 300 + "]" * 300 + "}]", "a.json:row 1: nesting too deep"),
    ("a.json", '[{"text": "' + "x" * 1_000_000 + '"}]', "a.json:row 1: row 1.0 MB > max_row_bytes 1 MB"),
    ("a.json", '{"text": "x"}\n{"text": "y"}', "a.json: not a JSON file: expected a list of objects; fix: name it .jsonl"),
    ("a.json", "[]", "a.json: no rows"),
    ("a.json", " \n", "a.json: no rows"),
    ("a.json", '[{"text": "x"}]'.encode("utf-16"), "a.json: not UTF-8 (looks like UTF-16)"),
    ("a.json", b'[\n{"text": "\xe9"}]', "a.json:2: byte 0xe9 is not UTF-8"),
    ("a.csv", "text,text\nx,y\n", "a.csv:1: duplicate column 'text' in the header"),
    ("a.csv", "text,\nx,y\n", "a.csv:1: column without a name in the header"),
    ("a.csv", "q;a\nx;y, z\n", "a.csv:1: the header is one column; expected columns separated by commas; got q;a"),
    ("a.csv", "q\ta\nx\ty\n", "a.csv:1: the header is one column; expected columns separated by commas; got q\\ta"),
    ("a.csv", "text\nx,y\n", "a.csv:2: 2 cells, but the header has 1 columns"),
    ("a.csv", 'text\n"x\n\n', 'a.csv:2: invalid CSV: unexpected end of data; file looks truncated'),
    ("a.csv", 'text\n"x"y\n', "a.csv:2: invalid CSV: ',' expected after '\"'"),
    ("a.csv", b"text\nx\n\xe9\n", "a.csv:3: byte 0xe9 is not UTF-8"),
    ("a.csv", "text\n" + "x" * 1_000_001 + "\n", "a.csv:2: row 1.0 MB > max_row_bytes 1 MB"),
    ("a.csv", 'text\n"' + ("x" * 999 + "\n") * 1001 + '"\n', "a.csv:2: a cell of more than max_row_bytes 1,000,000, or a quote"),
    ("a.csv", "text\n", "a.csv: no rows"),
    ("a.parquet", "text\nx\n", "a.parquet: not a Parquet file: its content is other data"),
    ("a.parquet", b"PAR1" + bytes(60), "a.parquet: not a readable Parquet file: "),
    ("a.jsonl.gz", '{"text": "x"}\n', "a.jsonl.gz: not a JSONL file: its name ends in .gz, its content is not gzip data"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 9)[:-12], "a.jsonl.gz: file looks truncated: its compressed data ends early"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 9)[:-8] + bytes(8), "a.jsonl.gz: cannot be read: CRC check failed"),
    ("a.jsonl.gz", gzip.compress(b""), "a.jsonl.gz: no rows"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), FAULTS, ids=[f"{m[:60]}" for _, _, m in FAULTS])
def test_faults_of_other_files(read: Read, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read(content, "sft", name)
    assert caught.value.lines()[0].startswith(f"error: {message}")
    assert len(caught.value.lines()) == 1


def test_csv_reader_leaves_the_global_field_limit_alone(read: Read) -> None:
    import csv

    before = csv.field_size_limit(54_321)
    read(_csv(ROWS), "sft", "a.csv")
    assert csv.field_size_limit(before) == 54_321


def test_bad_rows_are_skipped_and_counted_by_reason(read: Read) -> None:
    lines = ['{"text": "a"}', "{", '{"text": 3}', '{"text": "b"}', '{"text": }', '{"text": "c', '{"txt": "d"}']
    found = read("\n".join(lines), "sft", on_bad_row="skip")
    assert [row.completion for row in found.rows] == ["a", "b"]
    assert found.skipped.counts() == {
        "invalid JSON": 3,
        "'text': expected string, got int": 1,
        "missing field 'text'": 1,
    }
    assert found.skipped.reasons["invalid JSON"].where == "rows.jsonl:2"
    assert (found.files[0].rows, found.files[0].used) == (7, 2)


def test_nothing_left_after_skipping_is_an_error(read: Read) -> None:
    with pytest.raises(
        DataError, match=r"rows.jsonl: no usable rows: 2 skipped: 'text' is null \(first rows.jsonl:1\)"
    ):
        read('{"text": null}\n{"text": null}\n', "sft", on_bad_row="skip")


def test_no_hidden_caps_and_max_rows_keeps_the_first(read: Read, write: Callable[..., str]) -> None:
    """Seeds F28: 1,237 rows in, 1,237 used."""
    rows = [{"text": f"story {i}"} for i in range(1237)]
    assert len(read(rows, "sft").rows) == 1237
    names = (write(rows[:400], "a.jsonl"), write(rows[400:], "b.jsonl"))
    config = DataConfig(train=names, max_rows=500, held_out_fraction=0.0)
    found = read_rows(config, "sft")
    assert [row.completion for row in found.rows] == [f"story {i}" for i in range(500)]
    assert [(f.rows, f.used) for f in found.files] == [(400, 400), (837, 100)]
    assert load_rows(config, "sft").summary == ("1,237 rows: 500 train, 0 held out, 737 beyond max_rows",)


def test_a_stage_accounts_for_every_row(write: Callable[..., str]) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"{i}?", "chosen": "a", "rejected": "b"} for i in range(200)]
    rows[7]["rejected"] = "a"
    name = write(rows)
    config = DataConfig(train=(name,), held_out_fraction=0.2, disjoint_stages=True, on_bad_row="skip")
    found = load_rows(config, "preference", "reward")
    other = load_rows(config, "preference", "ppo")
    assert found.held_out == other.held_out
    assert len(found.train) + len(other.train) + len(found.held_out) == 199
    assert found.summary == (
        f"200 rows: {len(found.train)} train, {len(found.held_out)} held out, {len(other.train)} of the other stage, "
        "1 skipped: identical completions (first rows.jsonl:8)",
    )


def test_with_separate_evaluation_files_all_of_train_trains(write: Callable[..., str]) -> None:
    train = write([{"text": f"{i}"} for i in range(100)], "a.jsonl")
    held = write([{"text": f"e{i}"} for i in range(10)], "b.jsonl")
    found = load_rows(DataConfig(train=(train,), eval=(held,)), "sft")
    assert (len(found.train), len(found.held_out)) == (100, 10)
    assert found.summary == ("100 rows: 100 train, 0 held out", "10 rows: 10 evaluation")
    assert [f["path"] for f in found.manifest] == ["a.jsonl", "b.jsonl"]


def test_hub_data_sets_are_read_through_datasets(
    folder: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[..., str]
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    (folder / "set").mkdir()
    write(_jsonl(ROWS), "set/train.jsonl")
    assert list(read_hub(str(folder / "set"), "train", 1000)) == [
        (f"{folder / 'set'}:row {i}", r) for i, r in enumerate(ROWS, 1)
    ]
    with pytest.raises(DataError, match=r"cannot be loaded: Unknown split"):
        list(read_hub(str(folder / "set"), "nope", 1000))


def test_a_configuration_of_a_hub_data_set_is_chosen_by_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[..., str]
) -> None:
    """Issue 16, inputs 11: 'Config name is missing.' and no field to give it in. The data set is a folder laid out like one."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    header = "---\nconfigs:\n"
    for name in ("main", "socratic"):
        (folder / "set" / name).mkdir(parents=True)
        write([{"prompt": f"{name}?", "completion": name}], f"set/{name}/train.jsonl")
        header += f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train.jsonl\n"
    write(header + "---\n", "set/README.md")
    rows = read_rows(DataConfig(train=("set",), name="socratic"), "sft").rows
    assert [(row.where, row.completion) for row in rows] == [("set:row 1", "socratic")]
    for name, split, said in (
        (None, "train", r"Config name is missing\. .*\['main', 'socratic'\].*; fix: data\.name: one of them"),
        ("x", "train", r"'x' not found\. Available: \['main', 'socratic'\]; fix: data\.name: one of them"),
        ("main", "test", r'Unknown split "test"\. Should be one of \[.train.\].*; fix: data\.split: one of them'),
    ):
        with pytest.raises(DataError, match=said):
            read_rows(DataConfig(train=("set",), name=name, split=split), "sft")
    (folder / "broken" / "data").mkdir(parents=True)
    write('{"a": 1}\n{"a": ', "broken/data/train-0.jsonl")  # the reason is in the cause of what datasets says
    with pytest.raises(DataError, match=r"error occurred while generating the dataset; .*JSON"):
        read_rows(DataConfig(train=("broken",)), "sft")


def _folder(folder: Path, write: Callable[..., str], files: dict[str, Any]) -> None:
    for name, content in files.items():
        (folder / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        write(content, f"set/{name}")


def _told(*answers: str) -> list[dict[str, Any]]:
    return [{"prompt": f"{answer}?", "completion": answer} for answer in answers]


def test_all_files_of_a_folder_are_read_as_if_they_were_named(folder: Path, write: Callable[..., str]) -> None:
    """`datasets` read those of the most frequent type alone, "train" alone where a file is called so, and NA in CSV as nothing."""
    _folder(folder, write, {
        "a.jsonl": _told("a1", "a2"), "b.csv": "prompt,completion\nNone?,NA\n", "c.jsonl.gz": gzip.compress(_jsonl(_told("c"))),
        "train.jsonl": _told("2020-01-01"), "more/d.parquet": _parquet(_told("d")), ".cache/e.jsonl": _told("hidden"),
        "alpaca_dev.jsonl": _told("dev"), "test/f.jsonl": _told("f"), "set.py": "raise SystemExit",
        "README.md": "---\nlicense: mit\n---\n",
    })  # fmt: skip
    config = DataConfig(train=("set",), held_out_fraction=0.0)
    rows = read_rows(config, "sft").rows
    assert [(row.where, row.completion) for row in rows] == [
        ("set/a.jsonl:1", "a1"), ("set/a.jsonl:2", "a2"), ("set/b.csv:2", "NA"), ("set/c.jsonl.gz:1", "c"),
        ("set/more/d.parquet:row 1", "d"), ("set/train.jsonl:1", "2020-01-01"),
    ]  # fmt: skip
    found = load_rows(config, "sft")
    assert (
        found.summary[1] == "nothing reads set/alpaca_dev.jsonl (of another split), set/test/f.jsonl (of another split)"
    )
    (line,) = found.manifest
    assert (line["path"], line["rows"], len(line["sha256"])) == ("set", 6, 64)
    for split, where in (("validation", "set/alpaca_dev.jsonl:1"), ("test", "set/test/f.jsonl:1")):
        assert [row.where for row in read_rows(DataConfig(train=("set",), split=split), "sft").rows] == [where]
    (folder / "set" / "a.jsonl").write_bytes(b'{"prompt": \n')
    with pytest.raises(DataError, match=r"^set/a\.jsonl:1: invalid JSON"):
        read_rows(config, "sft")


def test_folders_that_cannot_be_read_whole_say_so(folder: Path, write: Callable[..., str]) -> None:
    _folder(folder, write, {"a.jsonl": _told("a"), "a.csv": "prompt,completion\np,a\n"})
    with pytest.raises(
        DataError, match=r"set: a\.csv and a\.jsonl may hold the same rows; fix: name the files one by one"
    ):
        read_rows(DataConfig(train=("set",)), "sft")
    with pytest.raises(DataError, match=r"set: no file of split 'test'; got train; fix: data\.split"):
        read_rows(DataConfig(train=("set",), split="test"), "sft")
    with pytest.raises(DataError, match=r"set/a\.csv: cannot be read in part .* got csv"):
        (folder / "set" / "a.jsonl").unlink()
        read_rows(DataConfig(train=("set",), streaming=True, max_rows=1), "sft")


@pytest.mark.parametrize("streaming", [False, True])
def test_what_datasets_saved_is_read_without_the_caches_beside_it(folder: Path, streaming: bool) -> None:
    """A later map writes cache-*.arrow into the folder, and these were read as rows: 2 became 4. One Dataset was refused."""
    import datasets

    first, second = (datasets.Dataset.from_list(_told(*answers)) for answers in ("ab", "cde"))
    datasets.DatasetDict(train=first, test=second).save_to_disk("both")
    second.with_format("numpy").save_to_disk("one")
    for part in (*datasets.load_from_disk("both").values(), datasets.load_from_disk("one")):
        part.map(lambda row: {"prompt": row["prompt"] + "!"})
    assert len(list(folder.glob("both/train/*.arrow"))) == len(list(folder.glob("one/*.arrow"))) == 2

    def answers(folder: str, **data: Any) -> str:
        config = DataConfig(train=(folder,), streaming=streaming, max_rows=50, **data)
        return "".join(row.completion or "" for row in read_rows(config, "sft").rows)

    whole = [answers("both"), answers("both", split="test"), answers("both/test"), answers("one")]
    assert whole == ["ab", "cde", "cde", "cde"]
    assert (answers("both", split="train[1:]+test"), answers("one", split="train[:1]")) == ("bcde", "c")
    for name, split, known in (
        ("both", "dev", "'train', 'test'"),
        ("both", "validation", "'train', 'test'"),
        ("one", "test", "'train'"),
    ):
        said = rf'^{name}: cannot be loaded: Unknown split "{split}"\. Should be one of \[{known}\]\.; fix: data\.split: one'
        with pytest.raises(DataError, match=said):
            answers(name, split=split)
    with pytest.raises(DataError, match=r"^one: has no configurations: .*; got data\.name main; fix: drop data\.name$"):
        answers("one", name="main")
    (folder / "both" / "dataset_dict.json").write_text("{}")
    with pytest.raises(DataError, match=r"^both: cannot be loaded: "):
        answers("both")


def test_a_script_of_a_data_set_is_not_run_and_told(folder: Path, write: Callable[..., str]) -> None:
    _folder(folder, write, {"set.py": "raise SystemExit", "data/train-0.jsonl": _told("a")})
    with pytest.raises(DataError, match=r"set: cannot be loaded: Dataset scripts are no longer supported"):
        read_rows(DataConfig(train=("set",)), "sft")


def test_splits_and_names_of_files_are_told_to_do_nothing(folder: Path, write: Callable[..., str]) -> None:
    _folder(folder, write, {"a.jsonl": _told("a"), "test.jsonl": _told("b")})
    told = "data.name, data.split: no effect on files; only folders and Hub data sets have splits"
    assert told in load_rows(DataConfig(train=("set/a.jsonl",), name="x", split="test"), "sft").warnings
    config = DataConfig(train=("set/a.jsonl",), eval=("set",), split="test")
    assert not [w for w in load_rows(config, "sft").warnings if "no effect" in w]


def test_rows_of_nested_texts_are_held_against_max_row_bytes(read: Read) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "a" * n}, {"role": "assistant", "content": "b"}]} for n in (5, 5000)
    ]
    with pytest.raises(DataError, match=r"rows\.parquet:row 2: row 5,\d+ bytes > max_row_bytes 1,000 bytes"):
        read(_parquet(rows), "sft", "rows.parquet", max_row_bytes=1000)


@pytest.mark.parametrize("kind", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet", "set"])
def test_streaming_reads_no_further(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[..., str]
) -> None:
    """A file that is longer than memory is used as if it ended after max_rows rows: here what follows is damaged."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    rows = [{"prompt": f"{i}?", "completion": str(i)} for i in range(20_000)]
    damaged = _jsonl(rows) + b'{"prompt": \n' * 3
    (folder / "set").mkdir()
    content = {"rows.jsonl": damaged, "rows.jsonl.gz": gzip.compress(damaged)[:-100], "rows.parquet": _parquet(rows)}
    if kind == "set":
        name = write(_jsonl(rows), "set/train-00000-of-00002.jsonl")
        write(damaged, "set/train-00001-of-00002.jsonl")
    else:
        name = write(content[kind], kind)
    told = {"train": ("set" if kind == "set" else name,), "max_rows": 50, "held_out_fraction": 0.0}
    found = load_rows(DataConfig(**told, streaming=True), "sft")
    assert [row.completion for row in found.train] == [str(i) for i in range(50)]
    (line,) = found.manifest
    assert (line["rows"], line["used"]) == (50, 50)
    assert found.summary[1] == "no more than 50 rows of a file are read (data.streaming)"
    if kind == "rows.parquet":
        whole = load_rows(DataConfig(**told), "sft")
        assert whole.train == tuple(found.train) and whole.manifest[0]["rows"] == 20_000
    else:
        with pytest.raises(DataError):
            load_rows(DataConfig(**told), "sft")


def test_streaming_knows_what_it_was_trained_on(folder: Path, write: Callable[..., str]) -> None:
    """The hash is of what was read: a file that grows at its end is the same data, one that changes before is not."""

    def sha256(rows: list[dict[str, Any]]) -> str:
        found = read_rows(DataConfig(train=(write(rows, "a.jsonl"),), max_rows=2, streaming=True), "sft")
        return found.files[0].sha256

    assert sha256(ROWS[:2]) == sha256(ROWS) != sha256(ROWS[1:])


@pytest.mark.parametrize("name", ["rows.csv", "rows.json"])
def test_what_cannot_be_streamed_says_so(name: str, folder: Path, write: Callable[..., str]) -> None:
    write(KINDS[name.split(".")[1]][0](ROWS), name)
    with pytest.raises(DataError, match=r"cannot be read in part .*expected jsonl, parquet, hub.*; fix: convert it"):
        read_rows(DataConfig(train=(name,), max_rows=2, streaming=True), "sft")


def test_a_hub_id_offline_is_one_line(folder: Path) -> None:
    """The suite runs with HF_HUB_OFFLINE=1; no retries, no traceback."""
    import datasets  # noqa: F401 - its import is not part of the time

    start = time.monotonic()
    with pytest.raises(DataError) as caught:
        read_rows(DataConfig(train=("nobody/nothing",)), "sft")
    assert time.monotonic() - start < 2
    (line,) = caught.value.lines()
    assert line.startswith("error: nobody/nothing: no such file, and the Hub cannot be reached: offline mode; fix: ")


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"))


@given(st.lists(st.dictionaries(TEXTS, TEXTS | st.integers() | st.booleans() | st.none()), min_size=1), st.booleans())
def test_jsonl_reader_agrees_with_json(rows: list[dict[str, Any]], ascii_only: bool) -> None:
    import io

    text = "\r\n\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    found = list(read_jsonl("x", io.BytesIO(text.encode()), 1_000_000))
    assert [row for _, row in found] == rows
    assert [where for where, _ in found] == [f"x:{2 * i + 1}" for i in range(len(rows))]
