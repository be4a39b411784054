"""The real files, read as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config import DataConfig
from rlhf_ray.data.collate import tokenise_pairs, tokenise_prompts, tokenise_sft
from rlhf_ray.data.load import load_rows
from rlhf_ray.data.records import RowSet, read_rows
from rlhf_ray.data.splits import overlap
from rlhf_ray.data.templates import load_template

pytestmark = pytest.mark.data

# file, kind, format, rows, usable rows, distinct prompts
FILES = [
    ("sft_alpaca_2000", "sft", "alpaca", 2000, 2000, 2000),
    ("text_tinystories_v1_head", "sft", "text", 2316, 2316, 2316),
    ("pref_comparison_gpt4_1095", "preference", "comparison", 1095, 1095, 1095),
    ("pref_hh_helpful_base_test", "preference", "comparison", 2348, 2348, 2348),
    ("pref_pandalm_human", "preference", "comparison", 836, 836, 153),
    ("pref_stories_sentiment", "preference", "comparison", 990, 990, 990),
    ("prompts_tinystories", "prompt", "prompt", 3215, 3215, 3215),
    ("sft_alpaca_2000", "prompt", "alpaca", 2000, 2000, 2000),
    ("pref_pandalm_human", "prompt", "comparison", 836, 153, 153),
    ("pref_comparison_gpt4_1095", "sft", "comparison", 1095, 1095, 1095),
]  # fmt: skip


def _read(data_dir: Path, name: str, kind: Any) -> RowSet:
    return read_rows(DataConfig(train=(str(data_dir / f"{name}.jsonl.gz"),)), kind)


@pytest.mark.parametrize(("name", "kind", "data_format", "total", "used", "distinct"), FILES)
def test_counts(data_dir: Path, name: str, kind: str, data_format: str, total: int, used: int, distinct: int) -> None:
    found = _read(data_dir, name, kind)
    assert (found.files[0].format, found.total, len(found.rows)) == (data_format, total, used)
    assert not found.skipped.total
    assert len({row.key.canonical() for row in found.rows}) == distinct
    assert found.dropped.total == total - used


def test_the_first_rows(data_dir: Path) -> None:
    row = _read(data_dir, "sft_alpaca_2000", "sft").rows[0]
    assert row.prompt.text == "Are the two sentences below grammatically correct? Output yes or no."
    assert (row.prompt.input[:11], row.completion) == ("Sentence 1:", "No")
    pair = _read(data_dir, "pref_comparison_gpt4_1095", "preference").rows[0]
    assert (pair.prompt.text, pair.rejected) == ("What are the three primary colors?", "Red, Yellow, and Green.")
    assert pair.chosen is not None
    assert pair.chosen.startswith("The three primary colors are red")


def test_questions_that_two_files_share_are_found_across_formats(data_dir: Path) -> None:
    """32 of the 1,095 comparison questions are Alpaca instructions, some of them with the input joined by a blank line."""
    sft = load_rows(DataConfig(train=(str(data_dir / "sft_alpaca_2000.jsonl.gz"),)), "sft")
    pairs = load_rows(DataConfig(train=(str(data_dir / "pref_comparison_gpt4_1095.jsonl.gz"),)), "preference")
    assert overlap(pairs.train + pairs.held_out, sft.train + sft.held_out).count == 32
    assert overlap(pairs.held_out, sft.train).count == overlap(sft.held_out, pairs.train).count == 0


@pytest.mark.parametrize("model", ["stories260K", "babyllama105"])
def test_real_tokenizers_round_trip(data_dir: Path, model: str) -> None:
    """What is encoded decodes to the text, and only <s>, <unk> and the final </s> are control tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(data_dir / "models" / model)
    rows = _read(data_dir, "pref_stories_sentiment", "preference").rows[:200]
    pairs = tokenise_pairs(rows, load_template("none"), tokenizer, max_length=512, too_long="stop", add_eos_token=True)
    assert len(pairs.examples) == 200
    for row, pair in zip(rows, pairs.examples, strict=True):
        assert pair.chosen_ids[0] == tokenizer.bos_token_id
        assert pair.chosen_ids[-1] == tokenizer.eos_token_id
        assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(pair.chosen_ids[1:-1])
        if tokenizer.unk_token_id not in pair.chosen_ids:
            assert tokenizer.decode(pair.chosen_ids[1 : pair.prompt_length]) == row.prompt.text
            assert tokenizer.decode(pair.chosen_ids[pair.prompt_length : -1]) == row.chosen
    prompts = tokenise_prompts(
        rows, load_template("none"), tokenizer, max_length=256, response_length=64, too_long="stop"
    ).examples
    assert all(one.ids == two.chosen_ids[: two.prompt_length] for one, two in zip(prompts, pairs.examples, strict=True))


def test_alpaca_rows_fit_or_are_counted(data_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(data_dir / "models" / "stories260K")
    rows = _read(data_dir, "sft_alpaca_2000", "sft").rows[:400]
    found = tokenise_sft(
        rows, load_template("alpaca_short"), tokenizer,
        max_length=256, too_long="drop", train_on_inputs=False, train_on_turns="all", add_eos_token=True,
    )  # fmt: skip
    assert len(found.examples) + found.dropped.total == 400
    assert len(found.examples) > 150
    assert all(len(e.input_ids) <= 256 and e.labels[-1] == tokenizer.eos_token_id for e in found.examples)
