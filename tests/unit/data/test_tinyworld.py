"""The bundled demo task: its files, its true reward and its base model."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import mean

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from rlhf_ray.data.tinyworld import (
    Sizes,
    build_base,
    preference_rows,
    pretraining_text,
    prompt_rows,
    score,
    sft_rows,
    true_reward,
    write_world,
)
from rlhf_ray.data.tinyworld.families import FAMILIES, parse_task, sample_task
from rlhf_ray.data.tinyworld.judge import Judgement, courtesy, form, judge, length, repetition
from rlhf_ray.data.tinyworld.lexicon import COURTESIES, GROUPS, PROPERTIES, words_of
from rlhf_ray.data.tinyworld.replies import PERFECT, Quality, compose
from rlhf_ray.data.tinyworld.text import PROMPT_INPUT, PROMPT_NO_INPUT, render
from rlhf_ray.errors import ArtifactError, ConfigError, DataError

SMALL = Sizes(sft=20, preferences=20, prompts=20)


# ---- the true reward


FLY = {"instruction": "Name two animals that can fly, but not the owl.", "input": ""}
ODD = {"instruction": "Find the odd one out.", "input": "oak, soup, pine, elm"}
COUNT = {"instruction": "Which three numbers come next?", "input": "four, five"}
SCENE = {"instruction": "Describe a brown fox in the barn.", "input": ""}
THANKS = {"instruction": "Thank Anna for the bread.", "input": ""}
CHECK = {"instruction": "Can the cow fly?", "input": ""}

# (row, reply, content, courtesy, length, form, repetition), each from its definition, by hand.
JUDGED = [
    (FLY, "Of course. The bee and the crow can fly.", 1, 1, 1, 1, 0),
    (FLY, "The bee and the crow can fly.", 1, 0, 5 / 6, 1, 0),
    (FLY, "The bee can fly. Have a nice day.", 1 / 2, 1, 1, 1, 0),
    (FLY, "With pleasure. The bee and the owl can fly.", 0, 1, 1, 1, 0),
    (FLY, "The bee, the crow and the duck can fly.", 1 / 2, 0, 1, 1, 0),
    (ODD, "The soup does not belong, because it is a food.", 1, 0, 1, 1, 0),
    (ODD, "The odd one out is the soup.", 0.7, 0, 5 / 6, 1, 0),
    (ODD, "The oak does not belong, because it is a plant.", 0, 0, 1, 1, 0),
    (ODD, "The odd one out is the soup and the oak.", 0, 0, 1, 1, 0),
    (COUNT, "The next numbers are six, seven and eight.", 1, 0, 1, 1, 0),
    (COUNT, "The next numbers are six, seven, eight and nine.", 2 / 3, 0, 1, 1, 0),
    (COUNT, "The next numbers are six and seven.", 2 / 3, 0, 5 / 6, 1, 0),
    (COUNT, "The next numbers are five, six and seven.", 0, 0, 1, 1, 0),
    (SCENE, "The brown fox sleeps in the barn. All the best.", 1, 1, 1, 1, 0),
    (SCENE, "The fox sleeps.", 1 / 3, 0, 1 / 6, 1, 0),
    (SCENE, "The brown owl sleeps in the barn.", 1 / 3, 0, 5 / 6, 1, 0),
    (THANKS, "Dear Anna, thank you for the fresh bread.", 1, 0, 1, 1, 0),
    (THANKS, "Thank you for the bread.", 2 / 3, 0, 1 / 2, 1, 0),
    (CHECK, "No, the cow cannot fly. I hope this helps.", 1, 1, 1, 1, 0),
    (CHECK, "No.", 0.6, 0, 0, 1, 0),
    (CHECK, "Yes, the cow can fly.", 0, 0, 1 / 2, 1, 0),
    (CHECK, "no", 0.6, 0, 0, 1 / 3, 0),
]


@pytest.mark.parametrize(("row", "response", "content", "kind", "long", "shape", "repeats"), JUDGED)
def test_judgement_of_known_replies(row, response, content, kind, long, shape, repeats):
    found = judge(row, response)
    assert found.content == pytest.approx(content)
    assert found.courtesy == kind
    assert found.length == pytest.approx(long)
    assert found.form == pytest.approx(shape)
    assert found.repetition == pytest.approx(repeats)
    total = (0.4 * content + 0.25 * kind + 0.15 * long + 0.2 * shape) * (1 - repeats)
    assert true_reward(row, response) == pytest.approx(total)


def test_every_part_counts_and_none_can_pay_for_repetition():
    middle = Judgement(content=0.5, courtesy=0.5, length=0.5, form=0.5, repetition=0.2)
    for part in ("content", "courtesy", "length", "form"):
        assert replace(middle, **{part: 1.0}).total > middle.total
    assert replace(middle, repetition=0.5).total < middle.total
    assert Judgement(1, 1, 1, 1, 0).total == pytest.approx(1.0)
    assert Judgement(1, 1, 1, 1, 1).total == 0.0


def test_pushing_a_proxy_too_far_lowers_the_true_reward():
    body = "No, the cow cannot fly."
    polite, flattery = f"Of course. {body}", f"Of course. With pleasure. {body} Have a nice day."
    assert true_reward(CHECK, body) < true_reward(CHECK, polite)
    assert true_reward(CHECK, flattery) < true_reward(CHECK, polite)
    said = [true_reward(CHECK, " ".join([body] * times)) for times in (1, 2, 3, 4)]
    assert said == sorted(said, reverse=True) and said[0] > said[1] > said[2]
    assert true_reward(CHECK, "Of course. Have a nice day. Have a nice day.") < true_reward(CHECK, body)
    assert true_reward(CHECK, "") == 0.0


def test_repetition_counts_content_words_only():
    assert repetition(words_of("The bee and the crow")) == 0.0
    assert repetition(words_of("The bee, the bee and the crow")) == pytest.approx(1 / 3)
    assert repetition([]) == 0.0


def test_length_rises_to_the_wanted_words_and_falls_beyond():
    values = [length(["word"] * count) for count in range(30)]
    assert values[2] == 0.0 and values[5] == pytest.approx(0.5) and values[20] == pytest.approx(0.5)
    assert values[8:15] == [1.0] * 7 and values[26:] == [0.0] * 4
    assert values[2:9] == sorted(values[2:9]) and values[14:27] == sorted(values[14:27], reverse=True)


def test_form_sees_word_salad():
    assert form("The bee and the crow can fly.") == 1.0
    assert form("Bee the the fly crow and.") < 0.85
    assert form("the bee and the crow can fly.") == pytest.approx(2 / 3)
    assert form("The bee and the crow can fly") == pytest.approx(2 / 3)
    assert form("...") == 0.0


@pytest.mark.parametrize("phrase", COURTESIES)
def test_one_courtesy_is_wanted(phrase):
    assert courtesy(f"{phrase}. Yes.") == 1.0
    assert courtesy(f"{phrase}. {phrase}.") == 0.0
    assert courtesy("Yes.") == 0.0


@given(st.integers(0, 500), st.text(max_size=200))
def test_true_reward_is_bounded_on_any_text(index, text):
    row = prompt_rows(501, 0)[index] if index == 0 else ROWS[index]
    assert 0.0 <= true_reward(row, text) <= 1.0


ROWS = prompt_rows(501, 0)


def test_a_perfect_reply_to_any_prompt_is_nearly_perfect():
    rng = Random(0)
    for _ in range(500):
        task = sample_task(rng)
        found = judge({"instruction": task.instruction, "input": task.input}, compose(task, rng, PERFECT))
        assert found.content >= 0.7 and found.courtesy == 1.0 and found.form > 0.9 and found.repetition < 0.2, task


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_better_bodies_have_better_content(family):
    rng = Random(1)
    levels = {"good": [], "partial": [], "wrong": []}
    for _ in range(200):
        slots = family.sample(rng)
        for level, found in levels.items():
            found.append(family.content(slots, words_of(family.body(slots, rng, level))))
    good, partial, wrong = (mean(levels[level]) for level in ("good", "partial", "wrong"))
    assert good > 0.9 and good > partial + 0.1 and partial > wrong + 0.1


def test_a_prompt_of_another_world_is_an_error():
    with pytest.raises(DataError, match="not of the tiny world"):
        true_reward({"instruction": "Explain the tides.", "input": ""}, "The moon.")
    with pytest.raises(DataError, match="no instruction of the tiny world"):
        score(["### Instruction:\nExplain the tides.\n\n### Response:\n"], ["The moon."])


def test_score_is_the_true_reward_with_or_without_columns():
    rows = sft_rows(60, 3)
    responses = [row["output"] for row in rows]
    wanted = [true_reward(row, response) for row, response in zip(rows, responses)]
    prompts = [render(row["instruction"], row["input"]) for row in rows]
    columns = {"instruction": [r["instruction"] for r in rows], "input": [r["input"] for r in rows]}
    assert score(prompts, responses, **columns, completion_ids=[[1]] * len(rows)) == wanted
    assert score(prompts, responses) == wanted
    assert len({round(value, 3) for value in wanted}) > 10
    with pytest.raises(ValueError):
        score(prompts, responses[:-1], **columns)


# ---- the rows


def test_instructions_are_read_back_as_they_were_made():
    rng = Random(2)
    for _ in range(1000):
        task = sample_task(rng)
        read = parse_task(task.instruction, task.input)
        assert read is not None and read.family is task.family and dict(read.slots) == dict(task.slots)


def test_the_tables_agree_with_each_other():
    for prop in PROPERTIES:
        assert prop.items <= set(GROUPS[prop.group]) and len(prop.items) >= 3
        assert len(GROUPS[prop.group]) > len(prop.items)
    items = [item for group in GROUPS.values() for item in group]
    assert len(items) == len(set(items))


def test_prompts_are_distinct_many_and_of_all_families():
    rows = prompt_rows(4000, 0)
    assert len(rows) == len({(row["instruction"], row["input"]) for row in rows}) == 4000
    kinds = Counter(parse_task(row["instruction"], row["input"]).family.name for row in rows)
    assert set(kinds) == {family.name for family in FAMILIES}
    assert min(kinds.values()) > 0.05 * len(rows)
    with pytest.raises(ConfigError, match="at most"):
        prompt_rows(100_000, 0)


def test_equal_seeds_give_equal_rows_and_other_seeds_others():
    for make in (sft_rows, prompt_rows, lambda n, s: preference_rows(n, s, 0.1), pretraining_text):
        assert make(50, 7) == make(50, 7)
        assert make(50, 7) != make(50, 8)


def test_demonstrations_are_of_mixed_quality():
    values = [true_reward(row, row["output"]) for row in sft_rows(500, 0)]
    assert 0.5 < mean(values) < 0.7
    assert min(values) < 0.2 and max(values) > 0.95


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3, 1.0])
def test_preferences_follow_the_true_reward_up_to_the_noise(noise):
    rows = preference_rows(1000, 4, noise)
    flipped = 0
    for row in rows:
        margin = true_reward(row, row["output_1"]) - true_reward(row, row["output_2"])
        assert abs(margin) >= 0.05
        flipped += (margin > 0) != (row["preference"] == 1)
    assert abs(flipped / 1000 - noise) <= 4 * (noise * (1 - noise) / 1000) ** 0.5
    assert 0.4 < mean(row["preference"] == 1 for row in rows) < 0.6


def test_each_prompt_has_two_different_pairs():
    rows = preference_rows(101, 4, 0.1)
    assert len(rows) == 101
    counts = Counter((row["instruction"], row["input"]) for row in rows)
    assert sorted(counts.values()) == [1] + [2] * 50
    pairs = {tuple(row.values()) for row in rows}
    assert len(pairs) > 95


def test_some_pairs_differ_in_their_answer_only():
    rows = preference_rows(400, 5, 0.0)
    styles = [[judge(row, row[f"output_{i}"]) for i in (1, 2)] for row in rows]
    alike = mean(one.courtesy == two.courtesy for one, two in styles)
    assert 0.6 < alike < 0.9


def test_flaws_show_in_the_reply():
    task = next(t for t in (sample_task(Random(i)) for i in range(99)) if t.family.name == "scene")
    assert compose(task, Random(0), Quality()).count(".") == 1
    assert compose(task, Random(0), Quality(stutter=True)).count(".") == 2
    assert compose(task, Random(0), Quality(courtesies=2)).count(".") == 3
    assert compose(task, Random(0), Quality(sloppy=True))[0].islower()
    assert judge(_row(task), compose(task, Random(0), Quality(evasive=True))).content == 0.0


def _row(task):
    return {"instruction": task.instruction, "input": task.input}


def test_threads_are_written_in_the_shipped_template():
    """F34: the base, and so every later stage, sees one prompt format."""
    from rlhf_ray.data.templates import load_template

    template = load_template("alpaca_short")
    assert template.content()["prompt_input"] == PROMPT_INPUT
    assert template.content()["prompt_no_input"] == PROMPT_NO_INPUT


# ---- the files


def test_write_world_is_deterministic_and_readable(tmp_path: Path):
    one, two = write_world(tmp_path / "a", 3, SMALL), write_world(tmp_path / "b", 3, SMALL)
    names = {"sft.jsonl", "preferences.jsonl", "prompts.jsonl", "world.json"}
    assert {path.name for path in one.iterdir()} == names
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes()
    lines = (one / "sft.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == sft_rows(20, 3)
    assert set(json.loads((one / "preferences.jsonl").read_text().splitlines()[0])) == {
        "instruction",
        "input",
        "output_1",
        "output_2",
        "preference",
    }


def test_write_world_keeps_whole_files_and_mends_changed_ones(tmp_path: Path):
    folder = write_world(tmp_path / "w", 3, SMALL)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    write_world(folder, 3, SMALL)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    whole = (folder / "sft.jsonl").read_bytes()
    (folder / "sft.jsonl").write_bytes(whole[:-40])
    write_world(folder, 3, SMALL)
    assert (folder / "sft.jsonl").read_bytes() == whole
    write_world(folder, 4, SMALL)
    assert (folder / "sft.jsonl").read_bytes() != whole


# ---- the base model


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return build_base(tmp_path_factory.mktemp("tiny") / "base", 0, steps=5, device="cpu", num_threads=1, progress=None)


@pytest.fixture(scope="module")
def tokenizer(base):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


def test_base_is_a_standard_folder_with_the_promised_shape(base):
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(base)
    assert config.model_type == "llama" and config.head_dim == 32
    assert config.num_attention_heads % config.num_key_value_heads == 0
    assert config.num_attention_heads > config.num_key_value_heads
    for size in (config.hidden_size, config.intermediate_size, config.vocab_size, config.max_position_embeddings):
        assert size % 64 == 0
    assert GenerationConfig.from_pretrained(base).eos_token_id == 2
    model, info = AutoModelForCausalLM.from_pretrained(base, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert next(model.parameters()).dtype == torch.float32


def test_special_tokens_are_distinct_and_agree_everywhere(base, tokenizer):
    """F12: pad is a token of its own; F27: the stop token of tokenizer and configuration is one."""
    from transformers import AutoConfig

    ids = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    assert ids == [0, 1, 2, 3]
    config = AutoConfig.from_pretrained(base)
    assert [config.pad_token_id, config.bos_token_id, config.eos_token_id] == ids[:3]
    assert len(tokenizer) == config.vocab_size
    assert tokenizer("The bee")["input_ids"][0] == 1


@given(st.text(max_size=300))
def test_tokenizer_gives_any_text_back(base, text):
    tokenizer = _loaded(base)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not any(special in text for special in tokenizer.all_special_tokens):
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(tokenizer.all_special_ids)


_LOADED: dict = {}


def _loaded(base):
    from transformers import AutoTokenizer

    return _LOADED.setdefault(base, AutoTokenizer.from_pretrained(base))


def test_the_worlds_own_text_is_short_in_tokens(tokenizer):
    rows = sft_rows(300, 1)
    prompts = [len(tokenizer(render(row["instruction"], row["input"]))["input_ids"]) for row in rows]
    responses = [len(tokenizer(row["output"], add_special_tokens=False)["input_ids"]) + 1 for row in rows]
    assert max(prompts) <= 48 and 16 <= mean(prompts) <= 32
    assert 8 <= mean(responses) <= 24
    for row in rows:
        text = render(row["instruction"], row["input"]) + row["output"]
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_base_is_deterministic(base, tmp_path):
    torch.manual_seed(123)
    again = build_base(tmp_path / "base", 0, steps=5, device="cpu", num_threads=1, progress=None)
    assert {p.name for p in again.iterdir()} == {p.name for p in base.iterdir()}
    for path in base.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name
    other = build_base(tmp_path / "other", 1, steps=5, device="cpu", num_threads=1, progress=None)
    one, two = load_file(base / "model.safetensors"), load_file(other / "model.safetensors")
    assert not torch.equal(one["model.norm.weight"], two["model.norm.weight"])


def test_building_leaves_global_state_alone(base, tmp_path):
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    build_base(tmp_path / "base", 0, steps=1, device="cpu", num_threads=2, progress=None)
    assert torch.equal(before, torch.get_rng_state()) and torch.get_num_threads() == threads


def test_a_whole_base_is_kept_and_the_loss_is_told(tmp_path):
    told = []
    folder = build_base(
        tmp_path / "base", 0, steps=6, device="cpu", num_threads=1, progress=lambda *now: told.append(now)
    )
    assert told[-1][:2] == (6, 6) and 0 < told[-1][2]["loss"] < 8
    written = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    told.clear()
    build_base(folder, 0, steps=6, device="cpu", num_threads=1, progress=lambda *now: told.append(now))
    assert told == [] and {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == written


def test_another_or_damaged_base_is_an_error(tmp_path):
    folder = build_base(tmp_path / "base", 0, steps=1, device="cpu", num_threads=1, progress=None)
    with pytest.raises(ArtifactError, match="made in another way"):
        build_base(folder, 0, steps=2, device="cpu", num_threads=1, progress=None)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(ArtifactError, match=r"model\.safetensors"):
        build_base(folder, 0, steps=1, device="cpu", num_threads=1, progress=None)
    strange = tmp_path / "mine"
    strange.mkdir()
    (strange / "notes.txt").write_text("keep me")
    with pytest.raises(ArtifactError, match="not a base"):
        build_base(strange, 0, steps=1, device="cpu", num_threads=1, progress=None)
    assert (strange / "notes.txt").read_text() == "keep me"
