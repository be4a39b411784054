"""The traps of YAML, and files that are none (rows 30 and 31, and the faults of data files that a job file shares)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlhf_ray.config.yaml_reader import MAX_BYTES, parse, parse_override, read_text
from rlhf_ray.errors import ConfigError

JOB = "output_dir: runs/ppo\nmodel_name_or_path: base\ndata: {train: prompts.jsonl}\nrewards: [{run: runs/reward}]\n"


def value(text: str) -> object:
    return parse(text, "job.yaml").values


def error(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(text, "job.yaml")
    return caught.value.lines()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-1.5e+3", -1500.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("+3", 3),
        ("010", 10),  # eight in YAML 1.1
        ("0o10", 8),
        ("0x1F", 31),
        (".inf", float("inf")),
        ("-.INF", float("-inf")),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
    ],
)
def test_values_of_the_core_schema(text: str, expected: object) -> None:
    got = value(f"a: {text}")
    assert got == {"a": expected} and type(got["a"]) is type(expected)  # type: ignore[index]


@pytest.mark.parametrize(
    "text",
    ["no", "No", "NO", "yes", "on", "off", "y", "n", "1:30", "1_000", "2024-01-01", "nan", "inf", "0b1", "=", "1e", "e5",
     "tRue", "0x", "--1", "1.2.3"],
)  # fmt: skip
def test_what_yaml_1_1_or_a_guess_would_turn_into_something_else_stays_text(text: str) -> None:
    assert value(f"a: {text}") == {"a": text}


def test_quotes_keep_text() -> None:
    assert value("a: '1e-4'\nb: \"true\"\nc: 'null'") == {"a": "1e-4", "b": "true", "c": "null"}


def test_not_a_number_is_a_number() -> None:
    got = value("a: .nan")
    assert isinstance(got, dict) and got["a"] != got["a"]


def test_keys_are_text_whatever_they_look_like() -> None:
    assert value("no: 1\n1: 2\ntrue: 3\nnull: 4") == {"no": 1, "1": 2, "true": 3, "null": 4}


def test_duplicate_keys_are_refused_wherever_they_stand() -> None:
    text = "a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\na: 2\ne: {x: 1, x: 2}\n"
    assert error(text) == [
        "error: job.yaml:5: c: duplicate key; it stands on line 3 already; fix: keep one",
        "error: job.yaml:6: a: duplicate key; it stands on line 1 already; fix: keep one",
        "error: job.yaml:7: x: duplicate key; it stands on line 7 already; fix: keep one",
    ]


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system [touch owned]",
        "!!python/name:os.system ''",
        "!!str 5",
        "!mine x",
        "! 5",
        "!!binary aGk=",
    ],
)
def test_tags_are_refused_and_run_nothing(tag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (line,) = error(f"a: 1\nb: {tag}\n")
    name = tag.split(" ")[0]
    assert (
        line == f"error: job.yaml:2: the tag {name} is not allowed; fix: remove the tag; quote text that starts with !"
    )
    assert os.listdir() == []


def test_aliases_work_and_lines_are_those_of_the_use(complaints: Callable[..., list[str]]) -> None:
    assert value("a: &x {r: 8}\nb: *x") == {"a": {"r": 8}, "b": {"r": 8}}
    told = complaints("ppo", JOB + "lora: &l {r: 0}\nvalue:\n  lora: *l\n")
    assert [line.split(": ")[2] for line in told] == ["lora.r", "value.lora.r"]


def test_an_override_of_one_use_of_an_alias_leaves_the_other(loaded: Callable[..., object]) -> None:
    config = loaded("ppo", JOB + "lora: &l {r: 8}\nvalue: {lora: *l}\n", "lora.r=4")
    assert (config.lora.r, config.value.lora.r) == (4, 8)  # type: ignore[attr-defined]


def test_merge_keys_are_refused() -> None:
    assert error("a: &x {r: 8}\nb:\n  <<: *x\n") == [
        "error: job.yaml:3: merge keys (<<) are not supported; fix: write the fields out"
    ]


def test_an_alias_inside_itself() -> None:
    assert error("a: &x [1, *x]\n") == ["error: job.yaml:1: an alias inside the value that it names"]


def test_an_alias_bomb_is_small() -> None:
    names = "abcdefghi"
    lines = ["a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]" for old, new in pairwise(names)]
    start = time.perf_counter()
    assert "aliases stand for more than 100,000 values" in error("\n".join(lines))[0]
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "a: 1\n\tb: 2\n",
            "error: job.yaml:2: not valid YAML: while scanning for the next token, found character '\\t' that cannot "
            "start any token (column 1); fix: indent with spaces",
        ),
        ("a: [1, 2\nb: 3\n", "error: job.yaml:2: not valid YAML: "),
        ("a: @x\n", "error: job.yaml:1: not valid YAML: "),
        ("a: b: c\n", "error: job.yaml:1: not valid YAML: mapping values are not allowed here (column 5)"),
        ("a: *nowhere\n", "error: job.yaml:1: not valid YAML: found undefined alias 'nowhere' (column 4)"),
        ("a: 1\nb: x\0y\n", "error: job.yaml:2: not valid YAML: character U+0000 is not allowed"),
        ("a: 1\n---\nb: 2\n", "error: job.yaml:2: not valid YAML: expected a single document in the stream, but found"),
        ("a: " + "[" * 3000, "error: job.yaml: nested too deeply"),
        ("? [a, b]\n: 1\n", "error: job.yaml:1: a field name must be a single word"),
        ("a: 0" + "1" * 5000, "error: job.yaml:1: a number of 5001 digits"),
    ],
)
def test_broken_yaml_is_one_line_with_its_place(text: str, line: str) -> None:
    (told,) = error(text)
    assert told.startswith(line)
    assert "\n" not in told


@given(st.text(max_size=60))
@example("a: !!python/object/apply:os.system [x]")
@example("&a : *a")
@example("{a: 1, a: 2}")
@example("%YAML 1.1\n---\na: no")
@settings(max_examples=400, deadline=None)
def test_any_text_is_read_or_refused_by_our_error(text: str) -> None:
    try:
        parse(text, "job.yaml")
    except ConfigError as refused:
        assert all(line.startswith("error: job.yaml") and "\n" not in line for line in refused.lines())


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_override_is_read_or_refused_by_our_error(text: str) -> None:
    try:
        parse_override(text)
    except ConfigError as refused:
        assert all(line.startswith("error: override ") for line in refused.lines())


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        (b"", "error: job.yaml: empty file; expected fields of a job (name: value)"),
        (b"# nothing but a comment\n\n", "error: job.yaml: empty file; expected fields of a job (name: value)"),
        (b"- a\n- b\n", "error: job.yaml: not a job file; expected fields of a job (name: value); got a list"),
        (b"hello\n", "error: job.yaml: not a job file; expected fields of a job (name: value); got a single value"),
        ("a: 1\n".encode("utf-16"), "error: job.yaml: not UTF-8 (looks like UTF-16); fix: re-save as UTF-8"),
        (b"a: 1\nb: caf\xe9\n", "error: job.yaml:2: byte 0xe9 is not UTF-8; fix: re-save as UTF-8"),
        (
            b"#" * (MAX_BYTES + 1),
            "error: job.yaml: is too large for a job file; expected at most 100,000 bytes; got 100,001",
        ),
    ],
)
def test_files_that_are_no_job(raw: bytes, line: str, complaints: Callable[..., list[str]]) -> None:
    assert complaints("ppo", raw) == [line]


def test_byte_order_mark_and_windows_lines_are_fine(loaded: Callable[..., object]) -> None:
    config = loaded("ppo", b"\xef\xbb\xbf" + (JOB + "lam: 0.9\n").replace("\n", "\r\n").encode())
    assert config.lam == 0.9  # type: ignore[attr-defined]


def refusal(path: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_text(path)
    return caught.value.lines()


def test_missing_files_name_the_nearest(workdir: Path) -> None:
    Path("jobs").mkdir()
    Path("jobs/ppo.yaml").write_text(JOB)
    assert refusal("jobs/pppo.yaml") == ["error: jobs/pppo.yaml: no such file; fix: did you mean jobs/ppo.yaml?"]
    assert refusal("job/ppo.yaml") == ["error: job/ppo.yaml: no such file; fix: did you mean jobs?"]
    assert refusal("zzz") == ["error: zzz: no such file"]
    expected = "is an override, and stands where a job file is expected; expected a job file before it"
    assert refusal("output_dir=jobs") == [f"error: output_dir=jobs: {expected}"]


def test_folders_and_pipes_are_no_files_and_nothing_hangs(workdir: Path) -> None:
    assert refusal("base") == ["error: base: is a folder; expected a job file"]
    Path("runs/sft/config.yaml").write_text(JOB)
    assert refusal("runs/sft") == [
        "error: runs/sft: is a folder; expected a job file; fix: to repeat that run's job use runs/sft/config.yaml"
    ]
    os.mkfifo("pipe")
    assert refusal("pipe") == ["error: pipe: is not a regular file; expected a job file"]
    os.symlink("loop", "loop")
    assert refusal("loop")[0].startswith("error: loop: ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file(workdir: Path) -> None:
    Path("job.yaml").write_text(JOB)
    Path("job.yaml").chmod(0)
    assert refusal("job.yaml") == ["error: job.yaml: cannot be read: Permission denied"]
