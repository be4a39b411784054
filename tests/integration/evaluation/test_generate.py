"""`generate`: policies side by side on one instruction or a file, with what their runs recorded filled in."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_ray.cli import main
from rlhf_ray.config import DataConfig, SamplingConfig
from rlhf_ray.console import NullConsole
from rlhf_ray.data.records import read_rows
from rlhf_ray.errors import ArtifactError, ConfigError, DataError
from rlhf_ray.stages.generate import generate

pytestmark = pytest.mark.integration

QUIET = NullConsole()
ASK = "Name the oak."


def ask(policies: list[str], console: Any = QUIET, **options: Any) -> list[dict[str, Any]]:
    options = {"max_new_tokens": 10, **options}
    return generate(policies=policies, num_threads=1, console=console, **options)


def test_policies_need_nothing_but_their_folders(chain: Any, console: Any) -> None:
    """Base and template from the manifest; reward and reference (KL) from the PPO run. The demo's next command."""
    rows = ask([chain.ppo, chain.sft, "base"], console, instruction=ASK, input="shortly")
    assert [row["policy"] for row in rows] == [chain.ppo, chain.sft, "base"]
    prompt = "### Instruction:\nName the oak.\n\n### Input:\nshortly\n\n### Response:\n"
    assert {row["prompt"] for row in rows} == {prompt}
    assert rows[1]["kl"] == 0.0 and rows[0]["kl"] != 0.0 and rows[2]["kl"] > 1.0
    assert len({row["completion"] for row in rows}) == 3
    assert all(isinstance(row["reward"], float) and 1 <= row["length"] <= 10 for row in rows)
    assert console.warnings == []
    lines = next(e for e in console.events if e["kind"] == "header")["lines"]
    assert "template   alpaca_short" in lines and f"bases      1 loaded: {chain.base}" in lines


def test_a_comparison_sheet_shows_policies_side_by_side_and_takes_a_vote(chain: Any, tmp_path: Path) -> None:
    """Of a file, by the command; names are short where they tell policies apart; votes are on the prompt without its template."""
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps({"instruction": f"Name {what}.", "input": ""}) + "\n" for what in ("a", "b")))
    words = ["generate", *(w for p in ("base", chain.sft, chain.ppo) for w in ("--policy", p)), "--file", str(asked)]
    assert main([*words, "--max-new-tokens", "8", "--out", str(tmp_path / "sheet.html")]) == 0
    page = (tmp_path / "sheet.html").read_text()
    told = re.findall(r'data-ballot="([^"]*)"', page)
    first, second = (json.loads(html.unescape(ballot)) for ballot in told)
    assert (first["prompt"], second["prompt"]) == ("Name a.", "Name b.")
    assert [reply["model"] for reply in first["replies"]] == ["base", "sft", "ppo"]
    rows = ask(["base", chain.sft, chain.ppo], file=str(asked), max_new_tokens=8)
    assert [reply["text"] for reply in first["replies"]] == [rows[0][f"output_{i}"] for i in (1, 2, 3)]
    assert "2 prompts" in page and "reward <b>" in page and "http" not in page.replace("http-equiv", "")


def test_the_same_seed_gives_the_same_reply(chain: Any) -> None:
    once, twice, other = (ask([chain.sft], instruction=ASK, seed=seed) for seed in (3, 3, 4))
    assert once == twice
    assert once[0]["completion"] != other[0]["completion"]
    assert once[0]["reward"] is None and once[0]["kl"] is None  # no PPO run says what to score with


def test_one_policy_twice_says_the_same_twice(chain: Any) -> None:
    rows = ask([chain.sft, f"{chain.sft}/adapter"], instruction=ASK)
    assert rows[0]["completion"] == rows[1]["completion"]


def test_greedy_takes_no_random_numbers(chain: Any) -> None:
    greedy = SamplingConfig(do_sample=False)
    rows = [ask([chain.sft], instruction=ASK, seed=seed, sampling=greedy) for seed in (0, 1)]
    assert rows[0] == rows[1]


def test_temperature_without_sampling_is_an_error(chain: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """F20: an ancestor sets a temperature, forgets to sample, and reports greedy results as sampled ones."""
    command = ["generate", "--policy", chain.sft, "--instruction", ASK]
    assert main([*command, "--greedy", "--temperature", "0.7"]) == 2
    assert "no effect with do_sample: false" in capsys.readouterr().err


def test_the_decoding_options_arrive(chain: Any) -> None:
    """top_k 1 is greedy decoding, whatever the seed; a budget of 2 tokens is two tokens."""
    greedy = ask([chain.sft], instruction=ASK, sampling=SamplingConfig(do_sample=False))
    narrow = ask([chain.sft], instruction=ASK, seed=9, sampling=SamplingConfig(top_k=1))
    assert narrow[0]["completion"] == greedy[0]["completion"]
    assert ask([chain.sft], instruction=ASK, max_new_tokens=2)[0]["length"] <= 2


@pytest.fixture
def questions(tmp_path: Path) -> str:
    rows = [
        {"instruction": "Name the oak.", "input": "", "output": "unused"},
        {"instruction": "Draw the carp.", "input": "shortly", "output": "unused"},
        {"instruction": "Praise \u00e9.", "input": "", "output": "unused"},
    ]
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


def test_a_file_gives_the_pairwise_form(chain: Any, questions: str, tmp_path: Path) -> None:
    """Parity P18: {instruction, input, output_1, output_2} from two policies, as a JSON list, in the order of the file."""
    out = tmp_path / "pairs.json"
    rows = ask(["base", chain.sft], file=questions, out=str(out))
    assert json.loads(out.read_text(encoding="utf-8")) == rows
    assert [list(row) for row in rows] == [["instruction", "input", "output_1", "output_2"]] * 3
    assert [row["instruction"] for row in rows] == ["Name the oak.", "Draw the carp.", "Praise \u00e9."]
    assert [row["input"] for row in rows] == ["", "shortly", ""]
    alone = ask([chain.sft], file=questions)
    assert [list(row) for row in alone] == [["instruction", "input", "output"]] * 3
    assert [row["output"] for row in alone] == [row["output_2"] for row in rows]
    single = ask([chain.sft], instruction="Name the oak.")
    assert single[0]["completion"] == alone[0]["output"]


def test_a_file_of_answers_is_data_again(chain: Any, questions: str, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    rows = ask([chain.sft], file=questions, out=str(out))
    read = read_rows(DataConfig(train=(str(out),)), "sft")
    assert read.files[0].format == "alpaca"
    assert [row.completion for row in read.rows] == [row["output"] for row in rows]


def test_rewards_are_named_or_found(chain: Any, questions: str) -> None:
    found = ask([chain.ppo, "base"], instruction=ASK)
    named = ask([chain.ppo, "base"], instruction=ASK, rewards=[chain.reward])
    assert [row["reward"] for row in named] == [row["reward"] for row in found]
    rows = ask([chain.sft, "base"], file=questions, rewards=[chain.reward])
    assert all(isinstance(row["reward_1"], float) and row["reward_1"] != row["reward_2"] for row in rows)


def test_a_merged_checkpoint_brings_its_own_base(chain: Any, tmp_path: Path) -> None:
    from rlhf_ray.models.merge import merge_run

    merged = str(merge_run(chain.sft, tmp_path / "merged"))
    greedy = SamplingConfig(do_sample=False)
    both = ask([merged, chain.sft], instruction=ASK, sampling=greedy)
    assert both[0]["completion"] == both[1]["completion"]
    alone = ask([merged], instruction=ASK, sampling=greedy)  # it is the base then, and its template is recorded in it
    assert alone[0]["completion"] == both[0]["completion"] and alone[0]["prompt"] == both[0]["prompt"]


def test_the_base_alone_has_to_be_named(tiny_llama: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="--model"):
        ask(["base"], instruction=ASK)
    (row,) = ask(["base"], instruction=ASK, model=str(tiny_llama()))
    assert row["prompt"].startswith("Below is an instruction")  # no run says which template: that of every job


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "an instruction or a file"),
        ({"instruction": ASK, "file": "rows.jsonl"}, "an instruction or a file"),
        ({"instruction": " "}, "is empty"),
        ({"instruction": ASK, "max_new_tokens": 500}, "leaves no room for a prompt"),
    ],
)
def test_what_is_asked_wrongly(chain: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ask([chain.sft], **options)


def test_what_is_not_there_or_does_not_fit(chain: Any, tiny_llama: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        ask(["./nowhere"], instruction=ASK)
    with pytest.raises(ArtifactError, match="another base"):
        ask([chain.sft], instruction=ASK, model=str(tiny_llama(context=128, seed=7)))
    with pytest.raises(ArtifactError, match="another prompt template"):
        ask([chain.sft], instruction=ASK, template="alpaca")
    with pytest.raises(ArtifactError, match="is a reward model"):
        ask([chain.reward], instruction=ASK)


def test_a_prompt_that_is_too_long_stops_and_says_where(chain: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"instruction": "Hi."}\n{"instruction": "' + "long " * 40 + '"}\n')
    with pytest.raises(
        DataError, match=r"rows\.jsonl:2: leaves no room for a reply of 10 tokens; expected a prompt of 1 to 118"
    ):
        ask([chain.sft], file=str(file))


def test_repeated_rows_are_answered_once_and_told(chain: Any, tmp_path: Path, console: Any) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"instruction": "Hi."}\n' * 3)
    assert len(ask([chain.sft], console, file=str(file))) == 1
    assert "2 dropped: repeated prompts" in str(console.warnings)


@pytest.fixture
def moved(chain: Any, tmp_path: Path) -> Iterator[Path]:
    """A copy of the PPO run whose configuration can be edited; its manifest then no longer covers config.yaml."""
    copy = tmp_path / "ppo"
    shutil.copytree(chain.ppo, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"].pop("config.yaml")
    (copy / "manifest.json").write_text(json.dumps(manifest))
    yield copy


def rewrite(run: Path, **fields: Any) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, **fields}))


def test_a_ppo_run_whose_parents_are_gone_still_answers(moved: Path, console: Any) -> None:
    rewrite(moved, sft="./gone", rewards=[{"name": "reward", "run": "./gone"}])
    (row,) = ask([str(moved)], console, instruction=ASK)
    assert row["completion"] and row["reward"] is None and row["kl"] is None
    assert "no KL" in str(console.warnings) and "not scored by reward" in str(console.warnings)


def test_parents_that_are_others_now_are_told(moved: Path, chain: Any, console: Any) -> None:
    rewrite(moved, sft=f"{chain.ppo}@1")
    ask([str(moved)], console, instruction=ASK)
    assert "reference" in str(console.warnings) and "no longer the adapter" in str(console.warnings)


def test_no_code_runs_because_a_folder_names_it(moved: Path, tmp_path: Path) -> None:
    flag = tmp_path / "ran"
    rule = tmp_path / "rule.py"
    rule.write_text(f"open({str(flag)!r}, 'w')\ndef score(completions, **k):\n    return [0.0] * len(completions)\n")
    rewrite(moved, rewards=[{"name": "rule", "function": f"{rule}:score"}])
    (row,) = ask([str(moved)], instruction=ASK)
    assert row["reward"] is None and not flag.exists()


def test_the_command_prints_and_writes(
    chain: Any, questions: str, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf_ray.runtime.session.usable_cores", lambda: 1)
    command = ["generate", "--policy", chain.sft, "--max-new-tokens", "5"]
    assert main([*command, "--instruction", ASK, "--json", "--show-prompt"]) == 0
    row = json.loads(capfd.readouterr().out)
    assert row["policy"] == chain.sft and row["prompt"].startswith("### Instruction:")
    out = tmp_path / "out.json"
    assert main([*command, "--file", questions, "--out", str(out)]) == 0
    assert capfd.readouterr().out == "" and len(json.loads(out.read_text())) == 3
