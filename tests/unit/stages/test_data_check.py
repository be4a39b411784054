"""`rlhf-ray data check`: what it says of a file is what the stage would do with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.cli.app import main
from rlhf_ray.config import STAGES, SFTConfig
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.stages.data_check import check_data, histogram


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., str]:
    """write_jsonl(rows) -> path of a new data file."""

    def write(rows: list[dict[str, Any]]) -> str:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / "rows.jsonl")

    return write


@pytest.fixture
def check(tiny_llama: Callable[..., Path], write_jsonl: Callable[..., str]) -> Callable[..., list[str]]:
    """check(rows, stage, **options of the job) -> the lines; with_stops: and behind them where the job stops."""

    def made(
        rows: list[dict[str, Any]],
        stage: Any = "sft",
        shown: int = 1,
        colour: bool = False,
        with_stops: bool = False,
        **job: Any,
    ) -> list[str]:
        data = {"train": write_jsonl(rows), "held_out_fraction": 0.0, **job.pop("data", {})}
        fixed = {"output_dir": ".", "model_name_or_path": str(tiny_llama()), "template": "none", "max_length": 20}
        fixed |= {"rewards": [{"function": "none:none"}], "response_length": 4} if stage == "ppo" else {}
        found = check_data(STAGES[stage](**{**fixed, **job}, data=data), shown, colour)
        return [*found.lines, *map(str, found.stops)] if with_stops else list(found.lines)

    return made


def test_it_says_what_is_there_what_is_dropped_and_what_is_learnt(check: Callable[..., list[str]]) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "ab", "completion": "cd", "id": 1}]
    rows += [{"prompt": "ab"}, {"prompt": "a" * 30, "completion": "b"}]
    lines = check(rows)
    path = lines[0].partition(": ")[0]
    assert lines[0] == f"{path}: 3 rows of format prompt_completion, read for sft with template none"
    assert lines[1].startswith(f"3 rows: 2 train, 0 held out, 1 skipped: missing field 'completion' (first {path}:2)")
    assert lines[2] == "nothing reads id (1 rows)"
    assert lines[3] == f"1 dropped: over max_length 20 (first {path}:3, 33 tokens)"
    assert lines[5] == "tokens: 6 to 33, median 33; 1 over max_length 20"
    assert lines[-2:] == [f"{path}:1, 6 tokens, as the model reads it", "<s>ab\u00abcd</s>\u00bb"]
    assert check(rows, colour=True)[-1] == "<s>ab\033[30;42mcd</s>\033[0m"


def test_pairs_and_prompts_are_shown_as_their_stages_read_them(check: Callable[..., list[str]]) -> None:
    pair = [{"prompt": "p", "chosen": "a", "rejected": "b"}]
    assert check(pair, "reward")[-2:] == ["<s>p\u00aba</s>\u00bb", "<s>p\u00abb</s>\u00bb"]
    assert check(pair, "ppo")[-1] == "<s>p"
    with pytest.raises(DataError, match="no usable rows: 1 skipped: empty completion"):
        check([{"prompt": "a", "completion": " "}])


def test_rows_are_shown_as_the_run_reads_them(check: Callable[..., list[str]]) -> None:
    """Cut where it cuts, and not at all where it drops; a run that stops at them has an account as well."""
    rows = [{"prompt": "a" * 10, "completion": "b" * 30}, {"prompt": "ab", "completion": "cd"}]
    cut = check(rows, data={"too_long": "truncate"})
    assert cut[-2].endswith(":1, 20 tokens, as the model reads it")
    assert cut[-1] == "<s>aaaaaaaaaa\u00abbbbbbbbbb\u00bb"
    for too_long in ("drop", "stop"):
        lines = check(rows, data={"too_long": too_long})
        assert lines[-2].endswith(":2, 6 tokens, as the model reads it")
        assert any(line.startswith("1 dropped: over max_length 20") for line in lines)


def test_prompts_of_ppo_have_the_room_that_its_replies_leave(check: Callable[..., list[str]]) -> None:
    """Within max_length, else the model's context (256 here), and max_prompt_length."""
    rows = [{"prompt": "a" * n} for n in (10, 17, 110, 130)]
    lines = check(rows, "ppo", shown=4)
    assert "tokens: 11 to 131, median 111; 3 over max_length less response_length 16" in lines
    assert any(line.startswith("3 dropped: over 20-4 (first") for line in lines) and lines[-1] == "<s>" + "a" * 10
    lines = check(rows, "ppo", max_length=None, response_length=128, shown=4)
    assert "tokens: 11 to 131, median 111; 1 over the model's context less response_length 128" in lines
    lines = check(rows, "ppo", max_length=None, max_prompt_length=100)
    assert "tokens: 11 to 131, median 111; 2 over max_prompt_length 100" in lines
    with pytest.raises(ConfigError, match=r"response_length: leaves no room for a prompt; expected below 256"):
        check(rows, "ppo", max_length=None, response_length=256)


def test_a_model_that_reads_less_than_the_job_asks_for(check: Callable[..., list[str]]) -> None:
    lines = check([{"prompt": "a" * 300, "completion": "b"}, {"prompt": "a", "completion": "b"}], max_length=512)
    assert "warning: max_length 512 is over the model's context; 256 is used" in lines
    assert "tokens: 4 to 303, median 303; 1 over the model's context 256" in lines


def test_a_job_that_would_stop_is_told(check: Callable[..., list[str]]) -> None:
    """Rows that cannot be used, on either side, and rows that are too long; not where the job leaves them out."""
    rows: list[dict[str, Any]] = [{"prompt": f"p{i}", "completion": "c"} for i in range(40)]
    bad = [*rows, {"prompt": "ab"}, {"prompt": "a" * 30, "completion": "b"}]
    stops = "data.on_bad_row: stop: the job stops at rows that it cannot use; expected none; got 1; fix: correct them"
    long = "data.too_long: stop: the job stops at rows that are too long; expected none; got "

    def told(rows: list[dict[str, Any]], **data: Any) -> list[str]:
        return [line for line in check(rows, data=data, with_stops=True) if "the job stops" in line]

    first, second = told(bad, too_long="stop")
    assert first.startswith(stops) and second.startswith(long + "1; fix: data.too_long=drop leaves them out")
    assert told(bad, on_bad_row="skip") == []
    assert len(told(bad)) == 1 and told(rows, too_long="stop") == []
    too_long = [{"prompt": "a" * (30 + i), "completion": "b"} for i in range(40)]
    assert told([*rows, *too_long], held_out_fraction=0.5, too_long="stop")[0].startswith(long + "40; ")


ROW = [{"prompt": "ab", "completion": "cd"}]


def test_control_characters_of_data_are_no_orders_to_the_terminal(check: Callable[..., list[str]]) -> None:
    lines = check([{"prompt": "a\x1b[2J\tb\nc", "completion": "\x9bd\r", "k\x1b": 1}], colour=True)
    assert lines[-1] == "<s>a\\x1b[2J\tb\nc\033[30;42m\\x9bd\\r</s>\033[0m"
    assert "nothing reads k\\x1b" in lines


def test_histogram_counts_every_length_once() -> None:
    lengths = [1, 8, 9, 16, 63, 64, 64]
    lines = histogram(lengths, 63)
    assert lines[0] == "tokens: 1 to 64, median 16; 2 over max_length 63"
    assert [int(line.split()[-1]) for line in lines[1:]] == [2, 2, 0, 0, 0, 0, 0, 3]
    assert histogram([], 5) == ["no row has a token"]


def test_a_chat_template_that_the_job_would_not_use_is_told(
    chat_llama: Callable[..., Path], write_jsonl: Callable[..., str]
) -> None:
    job = {"output_dir": ".", "model_name_or_path": str(chat_llama()), "data": {"train": write_jsonl(ROW * 3)}}
    said = (
        "warning: template: the model has a chat template, the default is alpaca: set template=chat, or template=alpaca"
    )
    assert said in "\n".join(check_data(SFTConfig(**job)).lines)
    for settled in ({"template": "alpaca"}, {"template": "chat"}):
        assert said not in "\n".join(check_data(SFTConfig(**job, **settled)).lines)


def test_the_command(
    tiny_llama: Callable[..., Path], write_jsonl: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl([{"prompt": "ab", "completion": "cd"}] * 3)
    assert main(["data", "check", path, "--model", str(tiny_llama()), "--rows", "1", "data.held_out_fraction=0"]) == 0
    out = capfd.readouterr().out.splitlines()
    assert out[0] == f"{path}: 3 rows of format prompt_completion, read for sft with template alpaca"
    assert "### Instruction:\nab" in "\n".join(out) and out[-2:] == ["### Response:", "\u00abcd</s>\u00bb"]
    assert main(["data", "check", path, "--model", str(tiny_llama()), "max_lenght=3"]) == 2
    capfd.readouterr()
    room = ["response_length=64", "max_length=100", "max_prompt_length=36", "data.held_out_fraction=0"]
    assert (
        main(["data", "check", path, "--model", str(tiny_llama()), "--stage", "ppo", "--template", "none", *room]) == 0
    )
    assert "tokens: 3 to 3, median 3; 0 over max_length less response_length 36" in capfd.readouterr().out
    path = write_jsonl([{"prompt": "ab", "completion": "cd"}, {"prompt": "ab"}])
    words = ["data", "check", path, "--model", str(tiny_llama()), "data.held_out_fraction=0"]
    assert main(words) == DataError.exit_code
    said = capfd.readouterr()
    assert "1 skipped: missing field 'completion'" in said.out and said.err.startswith(
        "error: data.on_bad_row: stop: the job stops"
    )
    assert main([*words, "data.on_bad_row=skip"]) == 0
