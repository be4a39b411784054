"""One held-out rule for all stages, files and formats."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.config import DataConfig
from rlhf_ray.data.load import load_rows
from rlhf_ray.data.prompts import Message, Prompt, parse_transcript, transcript
from rlhf_ray.data.records import Row
from rlhf_ray.data.splits import Questions, confirms, half_of, is_held_out, overlap, prompt_hash, split

TALK = (Message("user", "Hi."), Message("assistant", "Hello."), Message("user", "A bird?"))

# The hex digits are from coreutils: printf '%s' "Name a bird." | b2sum -l 64
GOLDEN = [
    (Prompt("Name a bird."), "f8adb791af0917b7"),
    (Prompt("Which is odd?", "oak, pine, salmon"), "08130813e324ea4d"),
    (Prompt(messages=TALK), "cef4ce6742641023"),  # of its last question
    (Prompt("Écris un mot."), "61bff1a29ed917bb"),
]


@pytest.mark.parametrize(("prompt", "digest"), GOLDEN)
def test_golden_hashes(prompt: Prompt, digest: str) -> None:
    """These must not change: what was held out from an old run would be trained on by a new one. (Conversations were hashed as
    whole transcripts once, so that a system text moved a question to the other side.)"""
    assert f"{prompt_hash(prompt):016x}" == digest


SAME = [
    (Prompt("Which?", "a b"), Prompt("Which?\n\na b")),
    (Prompt("Which?", "a b"), Prompt(messages=(Message("user", "Which?\n\na b"),))),
    (Prompt("Name a bird."), Prompt(" Name  a\tbird.\r\n")),
    (Prompt("caf\u00e9"), Prompt("cafe\u0301")),
    (Prompt(messages=TALK), Prompt("Human: Hi.\n\nAssistant: Hello.\n\nHuman: A bird?\n\nAssistant:")),
    (Prompt(messages=TALK), Prompt("\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: A bird?\n\nAssistant: ")),
    (Prompt("Name a bird."), Prompt("Human: Name a bird.\n\nAssistant:")),
    (Prompt(messages=TALK), Prompt("A bird?")),
    (Prompt("Name a bird."), Prompt(messages=(Message("system", "Be brief."), Message("user", "Name a bird.")))),
]
DIFFERENT = [
    (Prompt("Name a bird."), Prompt("name a bird.")),
    (Prompt("Which?", "a"), Prompt("Which?")),
    (Prompt(messages=TALK), Prompt(messages=TALK[:1])),
    (Prompt(messages=(Message("system", "x"), TALK[0])), Prompt(messages=(Message("system", "x"), TALK[2]))),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_one_request_in_two_formats_is_one_prompt(one: Prompt, other: Prompt) -> None:
    assert prompt_hash(one) == prompt_hash(other)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different_requests_differ(one: Prompt, other: Prompt) -> None:
    assert prompt_hash(one) != prompt_hash(other)


WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(str.strip)


@given(WORDS, WORDS)
def test_formats_agree_on_any_instruction_and_input(instruction: str, given_input: str) -> None:
    assert prompt_hash(Prompt(instruction, given_input)) == prompt_hash(Prompt(f"{instruction}\n\n{given_input}"))


def test_transcripts_round_trip_and_other_texts_are_none() -> None:
    assert transcript(TALK) == "Human: Hi.\n\nAssistant: Hello.\n\nHuman: A bird?\n\nAssistant:"
    assert parse_transcript(transcript(TALK)) == TALK
    for text in ("", "Human: Hi.", "Hi.\n\nAssistant:", "Say\n\nHuman: Hi.\n\nAssistant:"):
        assert parse_transcript(text) == ()


def test_the_boundaries_of_the_rule() -> None:
    assert not is_held_out(0, 0.0)
    assert is_held_out(0, 0.1)
    assert is_held_out(2**63 - 1, 0.5)
    assert not is_held_out(2**63, 0.5)
    assert (half_of(4), half_of(5)) == ("reward", "ppo")


def _rows(prompts: list[str]) -> list[Row]:
    return [Row(f"x:{i}", Prompt(p), completion="c") for i, p in enumerate(prompts, 1)]


def test_shares_are_as_asked_and_halves_are_independent_of_the_held_out_share() -> None:
    rows = _rows([f"Question {i}?" for i in range(10_000)])
    parts = split(rows, 0.1)
    assert abs(len(parts.held_out) - 1000) < 4 * 30  # sd of Binomial(10000, .1) is 30
    reward, ppo = split(rows, 0.1, "reward"), split(rows, 0.1, "ppo")
    assert abs(len(reward.train) - 4500) < 4 * 50
    assert reward.held_out == ppo.held_out == parts.held_out
    assert reward.other_half == len(ppo.train)


def test_prompts_that_confirm_are_half_of_every_other_part() -> None:
    """Of those held out and of each stage's half, so no part is bent towards what confirms."""
    hashes = [prompt_hash(Prompt(f"Question {i}?")) for i in range(10_000)]
    for part in (
        [h for h in hashes if is_held_out(h, 0.1)],
        [h for h in hashes if half_of(h) == "ppo"],
        [h for h in hashes if half_of(h) == "reward"],
    ):
        assert abs(sum(map(confirms, part)) - len(part) / 2) < 4 * (len(part) / 4) ** 0.5
    assert [confirms(h) for h in (0, 1, 2, 3, 2**63)] == [False, False, True, True, False]


def test_file_order_and_repetition_change_nothing() -> None:
    rows = _rows([f"Question {i % 300}?" for i in range(900)])
    shuffled = rows[:]
    random.Random(5).shuffle(shuffled)
    one, other = split(rows, 0.3), split(shuffled, 0.3)
    assert {r.where for r in one.held_out} == {r.where for r in other.held_out}
    assert not {r.prompt.text for r in one.train} & {r.prompt.text for r in one.held_out}
    assert [r.where for r in one.train] == sorted((r.where for r in one.train), key=lambda w: int(w[2:]))


def test_no_stage_trains_on_what_another_holds_out(write: Callable[..., str]) -> None:
    """Seeds F29: SFT, reward and PPO files in three formats with the same questions; the overlaps are 0."""
    asked = [(f"Question {i}?", "x y" if i % 3 else "") for i in range(400)]
    sft = [{"instruction": q, "input": x, "output": "a"} for q, x in asked]
    pairs = [
        {"user_input": f"{q}\n\n{x}" if x else q, "completion_a": "a", "completion_b": "b"} for q, x in reversed(asked)
    ]
    prompts = [{"messages": [{"role": "user", "content": f"{q}\n\n{x}" if x else q}]} for q, x in asked]
    stages = [
        load_rows(
            DataConfig(train=(write(rows, f"{kind}.jsonl"),), held_out_fraction=0.25, disjoint_stages=True), kind, half
        )  # type: ignore[arg-type]
        for rows, kind, half in ((sft, "sft", None), (pairs, "preference", "reward"), (prompts, "prompt", "ppo"))
    ]
    for one in stages:
        assert len(one.held_out) > 60
        for other in stages:
            assert overlap(one.held_out, other.train).count == 0
            assert overlap(one.held_out, other.held_out).count == len(one.held_out)
    assert overlap(stages[1].train, stages[2].train).count == 0
    assert overlap(stages[1].train, stages[0].train).count == len(stages[1].train)


def test_a_text_that_begins_with_a_prompt_overlaps_with_it() -> None:
    """A bare text asks nothing: by hash alone no story was ever found to hold a prompt that opens it."""
    stories = [
        Row(f"s:{i}", Prompt(), completion=text) for i, text in enumerate(("Tom ran. He fell.", "A cat  sat. It ate."))
    ]
    prompts = _rows(["A cat sat.", "Tom ran", "He fell.", "Tom ran. He fell. Twice."])
    assert [row in Questions(stories) for row in prompts] == [True, True, False, False]
    assert [row in Questions(prompts[:1]) for row in stories] == [False, True]
    found = overlap(prompts, stories)
    assert (found.count, found.first, found.total) == (2, prompts[0].where, 4)


def test_held_out_prompts_keep_texts_that_open_with_them_out_of_training(write: Callable[..., str]) -> None:
    asked = [f"Story {i} begins." for i in range(200)]
    prompts = write([{"prompt": text} for text in asked], "prompts.jsonl")
    texts = write([{"text": f"{text} And ends."} for text in asked], "texts.jsonl")
    held = load_rows(DataConfig(train=(prompts,), held_out_fraction=0.2), "prompt").held_out
    plain = load_rows(DataConfig(train=(texts,), held_out_fraction=0.2), "sft")
    kept = load_rows(DataConfig(train=(texts,), held_out_fraction=0.2, held_out_prompts=(prompts,)), "sft")
    assert overlap(held, plain.train).count > 20 and overlap(held, kept.train).count == 0
    lost = len(plain.train) - len(kept.train)
    assert lost == overlap(held, plain.train).count and f"{lost} held out elsewhere" in kept.summary[0]
    assert [item["path"] for item in kept.manifest] == [texts, prompts]


def test_bare_texts_are_split_by_their_text() -> None:
    rows = [Row(f"x:{i}", Prompt(), completion=f"Story {i}.") for i in range(200)]
    parts = split(rows, 0.2)
    assert 20 < len(parts.held_out) < 60
    first = hashlib.blake2b(b"Story 0.", digest_size=8).digest()
    assert prompt_hash(rows[0].key) == int.from_bytes(first, "big")
