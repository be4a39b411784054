"""`rlhf-ray data check`: what it says of a file is what the stage would do with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.cli.app import main
from rlhf_ray.config import SFTConfig
from rlhf_ray.errors import DataError
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
    """check(rows, stage, **options of the job) -> the lines."""

    def made(
        rows: list[dict[str, Any]], stage: Any = "sft", shown: int = 1, colour: bool = False, **job: Any
    ) -> list[str]:
        data = {"train": write_jsonl(rows), "held_out_fraction": 0.0, **job.pop("data", {})}
        fixed = {"output_dir": ".", "model_name_or_path": str(tiny_llama()), "template": "none", "max_length": 20}
        return check_data(SFTConfig(**{**fixed, **job}, data=data), stage, shown, colour)

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


def test_prompts_of_ppo_have_no_limit_of_sft(
    tiny_llama: Callable[..., Path], write_jsonl: Callable[..., str], check: Callable[..., list[str]]
) -> None:
    rows = [{"prompt": "a" * 600}]
    job = {"output_dir": ".", "model_name_or_path": str(tiny_llama()), "template": "none"}
    lines = check_data(SFTConfig(**job, data={"train": write_jsonl(rows), "held_out_fraction": 0.0}), "ppo")
    assert "tokens: 601 to 601, median 601" in lines and lines[-1] == "<s>" + "a" * 600
    assert any(line.startswith("1 dropped: over 20-0") for line in check(rows, "ppo"))


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
    assert said in "\n".join(check_data(SFTConfig(**job), "sft"))
    for settled in ({"template": "alpaca"}, {"template": "chat"}):
        assert said not in "\n".join(check_data(SFTConfig(**job, **settled), "sft"))


def test_the_command(
    tiny_llama: Callable[..., Path], write_jsonl: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl([{"prompt": "ab", "completion": "cd"}] * 3)
    assert main(["data", "check", path, "--model", str(tiny_llama()), "--rows", "1", "data.held_out_fraction=0"]) == 0
    out = capfd.readouterr().out.splitlines()
    assert out[0] == f"{path}: 3 rows of format prompt_completion, read for sft with template alpaca"
    assert "### Instruction:\nab" in "\n".join(out) and out[-2:] == ["### Response:", "\u00abcd</s>\u00bb"]
    assert main(["data", "check", path, "--model", str(tiny_llama()), "max_lenght=3"]) == 2
