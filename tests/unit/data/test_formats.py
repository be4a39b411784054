"""Every row format, from invented rows: what it gives as SFT row, as pair and as prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rlhf_ray.data.prompts import Message, Prompt
from rlhf_ray.data.records import RowSet
from rlhf_ray.errors import ConfigError, DataError

Read = Callable[..., RowSet]

ASKED = Prompt(messages=(Message("user", "Name a bird."),))
TALK = Prompt(messages=(Message("user", "Hi."), Message("assistant", "Hello."), Message("user", "A bird?")))
USER = {"role": "user", "content": "Name a bird."}
WREN = {"role": "assistant", "content": "Wren."}
OAK = {"role": "assistant", "content": "Oak."}
HH = "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: A bird?\n\nAssistant:"

# format, row, prompt, completion, (chosen, rejected)
ROWS: list[tuple[str, dict[str, Any], Prompt, str | None, tuple[str, str] | None]] = [
    ("alpaca", {"instruction": "Which is odd?", "input": "oak, pine, salmon", "output": "Salmon."},
     Prompt("Which is odd?", "oak, pine, salmon"), "Salmon.", None),
    ("alpaca", {"instruction": "Name a bird.", "input": None, "output": "Wren.", "generator": "x", "datasplit": "eval"},
     Prompt("Name a bird."), "Wren.", None),
    ("comparison", {"user_input": "Name a bird.", "completion_a": "Wren.", "completion_b": "Oak."},
     Prompt("Name a bird."), "Wren.", ("Wren.", "Oak.")),
    ("alpaca_farm", {"instruction": "Name a bird.", "input": "", "output_1": "Oak.", "output_2": "Wren.", "preference": 2,
                     "raw_preference": 4}, Prompt("Name a bird."), "Wren.", ("Wren.", "Oak.")),
    ("alpaca_farm", {"instruction": "Which?", "input": "a b", "output_1": "Wren.", "output_2": "Oak.", "preference": "1"},
     Prompt("Which?", "a b"), "Wren.", ("Wren.", "Oak.")),
    ("ranked", {"instruction": "Name a bird.", "input": "", "output": ["Wren.", "Oak."]},
     Prompt("Name a bird."), "Wren.", ("Wren.", "Oak.")),
    ("preference", {"prompt": "Name a bird.", "chosen": "Wren.", "rejected": "Oak."},
     Prompt("Name a bird."), "Wren.", ("Wren.", "Oak.")),
    ("preference", {"prompt": [USER], "chosen": [WREN], "rejected": [OAK]}, ASKED, "Wren.", ("Wren.", "Oak.")),
    ("preference", {"chosen": [USER, WREN], "rejected": [USER, OAK]}, ASKED, "Wren.", ("Wren.", "Oak.")),
    ("preference", {"prompt": "Name a bird.", "chosen": [USER, WREN], "rejected": [USER, OAK]},
     ASKED, "Wren.", ("Wren.", "Oak.")),
    ("hh", {"chosen": HH + " Wren.", "rejected": HH + " Oak."}, TALK, "Wren.", ("Wren.", "Oak.")),
    ("sharegpt", {"conversations": [{"from": "human", "value": "Name a bird."}], "chosen": {"from": "gpt", "value": "Wren."},
                  "rejected": {"from": "gpt", "value": "Oak."}}, ASKED, "Wren.", ("Wren.", "Oak.")),
    ("sharegpt", {"conversations": [{"from": "human", "value": "Name a bird."}, {"from": "gpt", "value": "Wren."}]},
     ASKED, "Wren.", None),
    ("sharegpt", {"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."},
                                    {"from": "human", "value": "A bird?"}, {"from": "gpt", "value": "Wren."}]},
     TALK, "Wren.", None),
    ("prompt_completion", {"prompt": "Name a bird.", "completion": "Wren."}, Prompt("Name a bird."), "Wren.", None),
    ("prompt_completion", {"prompt": [USER], "completion": [WREN]}, ASKED, "Wren.", None),
    ("messages", {"messages": [USER, WREN]}, ASKED, "Wren.", None),
    ("prompt", {"prompt": "Name a bird."}, Prompt("Name a bird."), None, None),
    ("prompt", {"prompt": [USER]}, ASKED, None, None),
    ("prompt", {"instruction": "Which?", "input": "a b"}, Prompt("Which?", "a b"), None, None),
    ("prompt", {"user_input": "Name a bird."}, Prompt("Name a bird."), None, None),
]  # fmt: skip
IDS = [f"{i} {name}" for i, (name, *_) in enumerate(ROWS)]


@pytest.mark.parametrize(("name", "row", "prompt", "completion", "pair"), ROWS, ids=IDS)
def test_auto_recognises_the_format_and_reads_what_it_gives(
    read: Read, name: str, row: dict[str, Any], prompt: Prompt, completion: str | None, pair: tuple[str, str] | None
) -> None:
    asked = read([row], "prompt")
    assert asked.files[0].format == name
    assert (asked.rows[0].prompt, asked.rows[0].completion, asked.rows[0].chosen) == (prompt, None, None)
    assert asked.rows[0].columns == row  # a Python reward gets every column
    for data_format in ("auto", name):
        if completion is None:
            with pytest.raises((DataError, ConfigError)):
                read([row], "sft", format=data_format)
        else:
            found = read([row], "sft", format=data_format)
            assert found.files[0].format == name
            assert (found.rows[0].prompt, found.rows[0].completion) == (prompt, completion)
        if pair is None:
            with pytest.raises((DataError, ConfigError)):
                read([row], "preference", format=data_format)
        else:
            found = read([row], "preference", format=data_format)
            assert found.files[0].format == name
            assert (found.rows[0].prompt, found.rows[0].chosen, found.rows[0].rejected) == (prompt, *pair)


def test_text_is_learnt_whole_and_continued_as_a_prompt(read: Read) -> None:
    (row,) = read([{"text": "Once upon a time."}], "sft").rows
    assert row.prompt.is_blank
    assert row.completion == "Once upon a time."
    (prompt,) = read([{"text": "Once upon a time."}], "prompt").rows
    assert prompt.prompt == Prompt("Once upon a time.")
    assert row.key == prompt.key  # the held-out rule sees the same thing in both


@pytest.mark.parametrize("streaming", [False, True])
def test_texts_beside_a_plain_text_that_nothing_reads_are_warned_about(read: Read, streaming: bool) -> None:
    """Prompts were learnt and their replies were not, and one word in an account said it."""
    rows = [
        {"text": "Name a bird.", "target": t, "id": "7", "url": "a.org/b", "n": 1, "tools": []}
        for t in ("Wren.", "Tit.", "")
    ]
    shared = {"streaming": streaming}
    assert read(rows, "sft", **shared).warnings == (
        "rows.jsonl: rows are read as plain text, all of which is learnt; nothing reads target; fix:"
        " data.columns={text: instruction, target: output} for prompts with replies, data.format=text if this is meant",
    )
    bare = [{name: value for name, value in row.items() if name != "target"} for row in rows]
    assert read(bare, "sft", **shared).warnings == read(rows, "sft", format="text", **shared).warnings == ()
    assert read(rows, "prompt").warnings == ()
    other = [{"body": "Name a bird.", "target": "Wren."}]
    assert "{body: instruction, target: output}" in read(other, "sft", columns={"body": "text"}, **shared).warnings[0]


def test_draws_are_dropped_and_counted_but_serve_as_prompts(read: Read) -> None:
    rows = [
        {"instruction": f"{i}?", "input": "", "output_1": "a", "output_2": "b", "preference": p}
        for i, p in enumerate([1, 0, 2])
    ]
    found = read(rows, "preference")
    assert [(r.chosen, r.rejected) for r in found.rows] == [("a", "b"), ("b", "a")]
    assert str(found.dropped) == "1 dropped: draw (first rows.jsonl:2)"
    assert (found.total, found.files[0].rows, found.files[0].used) == (3, 3, 2)
    assert len(read(rows, "prompt").rows) == 3


def test_hh_splits_at_the_last_turn_and_counts_what_it_drops(read: Read) -> None:
    """A reply may itself hold "\\n\\nHuman:"; disagreeing prefixes and equal replies are dropped, never silently."""
    rows = [
        {"chosen": HH + " Wren.", "rejected": HH + " Oak."},
        {"chosen": HH + " Wren.", "rejected": HH.replace("Hi.", "Hey.") + " Oak."},
        {"chosen": HH + " Same.", "rejected": HH + " Same."},
        {"chosen": HH + " Wren.", "rejected": HH.replace("Hi.", "Yo.") + " Oak."},
    ]
    found = read(rows, "preference")
    assert [row.where for row in found.rows] == ["rows.jsonl:1"]
    assert found.dropped.counts() == {"transcripts that differ before the last reply": 2, "identical completions": 1}
    assert found.dropped.reasons["identical completions"].where == "rows.jsonl:3"


SAID = [{"from": "human", "value": "Name a bird."}, {"from": "gpt", "value": "Wren."}]
MESSAGE_FAULTS: list[tuple[Any, str]] = [
    ({"messages": "Hi."}, "'messages': expected a list of messages, got string"),
    ({"messages": [USER, "Hi."]}, "'messages'[1]: expected an object with 'role' and 'content', got string"),
    ({"messages": [{"role": "user"}, WREN]}, "'messages'[0]: missing field 'content'"),
    ({"messages": [{"role": "user", "content": None}, WREN]}, "'messages'[0]: 'content' is null"),
    (
        {"messages": [{"role": "boss", "content": "x"}, WREN]},
        "'messages'[0]: unknown role 'boss'; expected one of system, user",
    ),
    (
        {"messages": [USER, {**WREN, "tool_calls": [1]}]},
        "'messages'[1]: malformed tool call: expected {name, arguments}",
    ),
    ({"messages": [USER]}, "'messages': expected the assistant's message last"),
    ({"messages": [USER, WREN, USER]}, "'messages': expected the assistant's message last"),
    ({"conversations": SAID[:1]}, "'conversations': expected the assistant's message last"),
    ({"conversations": [*SAID, *SAID[:1]]}, "'conversations': expected the assistant's message last"),
    ({"conversations": [{"from": "human"}, *SAID[1:]]}, "'conversations'[0]: missing field 'value'"),
    (
        {"conversations": [SAID[0], {"from": "function_call", "value": "{}"}, SAID[1]]},
        "'conversations'[1]: malformed tool call: expected {name, arguments}",
    ),
    ({"messages": [WREN]}, "empty prompt"),
    ({"prompt": "p", "completion": [USER, WREN]}, "'completion': expected one message, got 2"),
    ({"prompt": "p", "completion": " "}, "empty completion"),
    ({"instruction": "p", "input": 3, "output": "x"}, "'input': expected string, got int"),
    ({"text": ""}, "empty completion"),
]


@pytest.mark.parametrize(("row", "message"), MESSAGE_FAULTS, ids=[m for _, m in MESSAGE_FAULTS])
def test_malformed_sft_rows(read: Read, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        read([row], "sft")
    assert caught.value.lines()[0].startswith(f"error: rows.jsonl:1: {message}")


PAIR_FAULTS: list[tuple[dict[str, Any], str]] = [
    (
        {"instruction": "p", "output_1": "a", "output_2": "b", "preference": 3},
        "'preference': expected 1, 2, or 0 for a draw, got 3",
    ),
    (
        {"instruction": "p", "output_1": "a", "output_2": "b", "preference": True},
        "'preference': expected 1, 2, or 0 for a draw, got",
    ),
    (
        {"instruction": "p", "output_1": "a", "output_2": "b", "preference": 1.0},
        "'preference': expected 1, 2, or 0 for a draw, got",
    ),
    ({"instruction": "p", "output": ["a", "b", "c"]}, "'output': expected [better, worse], got 3 items"),
    ({"instruction": "p", "output": ["a", None]}, "'output[1]' is null"),
    ({"chosen": HH + " Wren.", "rejected": "Oak."}, "'rejected': no '\\n\\nAssistant:' in the transcript"),
    (
        {"chosen": "x\n\nAssistant: a", "rejected": "x\n\nAssistant: b"},
        "'chosen': the transcript does not begin with 'Human:'",
    ),
    (
        {"chosen": [USER, WREN], "rejected": [{**USER, "content": "x"}, OAK]},
        "'chosen' and 'rejected' differ before the last message",
    ),
    ({"chosen": [WREN], "rejected": [OAK]}, "missing field 'prompt'"),
    (
        {"prompt": [{**USER, "content": "x"}], "chosen": [USER, WREN], "rejected": [USER, OAK]},
        "'chosen' does not continue the prompt: user after user",
    ),
    (
        {"conversations": SAID[:1], "chosen": [*SAID, *SAID], "rejected": SAID},
        "'chosen' and 'rejected' differ before the last message",
    ),
]


@pytest.mark.parametrize(("row", "message"), PAIR_FAULTS, ids=[m for _, m in PAIR_FAULTS])
def test_malformed_pairs(read: Read, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        read([row], "preference")
    assert caught.value.lines()[0].startswith(f"error: rows.jsonl:1: {message}")


SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}
TOOL = {"role": "tool", "content": "a wren"}
AGAIN = [WREN, {"role": "user", "content": "And a tree?"}]
# prompt, turns of chosen and rejected before their last ones, roles that are asked
CONTINUED: list[tuple[Any, list[Any], str]] = [
    ([SYSTEM, USER], [CALL, TOOL], "system user assistant tool"),
    ([SYSTEM, USER], AGAIN, "system user assistant user"),
    ("Name a bird.", AGAIN, "user assistant user"),
    ([SYSTEM, USER], [USER], "system user"),
    ([SYSTEM], [USER], "system user"),
    ([USER], [SYSTEM, USER], "system user"),
    ("Name a bird. ", [SYSTEM, USER, *AGAIN], "system user assistant user"),
    ([SYSTEM, USER], [SYSTEM, USER, *AGAIN], "system user assistant user"),
    (None, [SYSTEM, USER], "system user"),
]


@pytest.mark.parametrize(("prompt", "inner", "roles"), CONTINUED, ids=[f"{i}" for i in range(len(CONTINUED))])
def test_turns_of_chosen_go_on_from_the_prompt(read: Read, prompt: Any, inner: list[Any], roles: str) -> None:
    """TRL's explicit form with several messages in chosen: neither the prompt nor the turns between are lost."""
    row = {"prompt": prompt, "chosen": [*inner, WREN], "rejected": [*inner, OAK]}
    for kind in ("preference", "sft", "prompt"):
        (found,) = read([row], kind).rows
        assert " ".join(m.role for m in found.prompt.messages) == roles
    said = {"user": "human", "assistant": "gpt", "system": "system"}
    if isinstance(prompt, list) and CALL not in inner:
        names = {"conversations": prompt, "chosen": row["chosen"], "rejected": row["rejected"]}
        shared = {k: [{"from": said[m["role"]], "value": m["content"]} for m in v] for k, v in names.items()}
        (pair,) = read([shared], "preference").rows
        assert " ".join(m.role for m in pair.prompt.messages) == roles
        assert (pair.chosen, pair.rejected) == ("Wren.", "Oak.")


def test_pairs_that_name_their_prompt_otherwise(read: Read) -> None:
    """Intel/orca_dpo_pairs, and LLaMA-Factory's Alpaca form; a pair of texts without a prompt is told what it lacks."""
    pair = {"chosen": "Wren.", "rejected": "Oak."}
    orca = Prompt(messages=(Message("system", "Be brief."), Message("user", "Which?")))
    for asked, prompt in (
        ({"system": "Be brief.", "question": "Which?"}, orca),
        ({"system": "", "question": "Which?"}, Prompt("Which?")),
        ({"instruction": "Which?", "input": "a b"}, Prompt("Which?", "a b")),
    ):
        found = read([{**asked, **pair, "id": 1}], "preference")
        assert (found.files[0].format, found.rows[0].prompt, found.unread) == ("preference", prompt, ("id",))
    transcripts = {"question": "Hi?", "chosen": HH + " Wren.", "rejected": HH + " Oak."}
    assert read([transcripts], "preference").files[0].format == "hh"
    assert read([{"prompt": "p", "system": "s", **pair}], "preference").unread == ("system",)
    with pytest.raises(DataError, match=r"fields chosen, rejected fit no .*preference, missing prompt; data\.columns"):
        read([pair], "preference")


@pytest.mark.parametrize(("margin", "found"), [("1.5", 1.5), ("", None), (" ", None), (2, 2.0), (None, None)])
def test_margins_of_files_that_have_no_numbers(read: Read, margin: Any, found: float | None) -> None:
    (row,) = read([{"prompt": "p", "chosen": "a", "rejected": "b", "margin": margin}], "preference").rows
    assert row.margin == found


@pytest.mark.parametrize("margin", [int("9" * 400), "much", True, [1], "inf"])
def test_what_is_no_margin(read: Read, margin: Any) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:1: 'margin': expected a finite number, got "):
        read([{"prompt": "p", "chosen": "a", "rejected": "b", "margin": margin}], "preference")


def test_a_format_without_the_answers_asked_for_is_a_configuration_error(read: Read) -> None:
    with pytest.raises(ConfigError) as caught:
        read([{"prompt": "p", "completion": "c"}], "preference", format="prompt_completion")
    assert caught.value.lines()[0].startswith(
        "error: data.format: 'prompt_completion' has no pairs to compare; expected one of comp"
    )


def test_unknown_fields_name_the_closest_format(read: Read) -> None:
    with pytest.raises(DataError) as caught:
        read([{"prompt": "p", "chosen": "a", "rejectd": "b"}], "preference")
    (line,) = caught.value.lines()
    assert line.startswith(
        "error: rows.jsonl: fields prompt, chosen, rejectd fit no preference format; fix: the closest format is"
    )
    assert "preference, missing rejected" in line


@pytest.mark.parametrize(
    ("kind", "row", "expected", "fix"),
    [
        ("sft", {"question": "p", "answer": "a", "n": "3"}, "instruction, output),", "{question: instruction, answer: output}, if"),
        ("sft", {"in: put": "p", "yes": "a"}, "prompt, completion),", "{'in: put': instruction, 'yes': output}, if"),
        ("sft", {"question": "p", "answer": "a", "source": "s"}, "messages), (", " renames fields,"),
        ("preference", {"q": "p", "a": "x", "b": "y"}, "user_input, completion_a,", "{q: prompt, a: chosen, b: rejected}, if"),
        ("prompt", {"question": "p", "id": 1}, "user_input), (instruction),", "{question: prompt}, if"),
    ],
)  # fmt: skip
def test_fields_of_no_format_name_those_there_are(read: Read, kind: str, row: Any, expected: str, fix: str) -> None:
    """It said that sharegpt was closest, of which the rows had no field."""
    with pytest.raises(DataError) as caught:
        read([row, row], kind)
    (line,) = caught.value.lines()
    start, _, rest = line.partition("; expected one of (")
    assert start == f"error: rows.jsonl: fields {', '.join(row)} fit no {kind} format"
    assert expected in rest.partition("; fix: ")[0] and "closest" not in line
    assert rest.partition("; fix: data.columns")[2].removeprefix("=").startswith(fix)


def test_columns_rename_fields(read: Read) -> None:
    columns = {"question": "instruction", "answer": "output"}
    (row,) = read([{"question": "Name a bird.", "answer": "Wren.", "level": 3}], "sft", columns=columns).rows
    assert (row.prompt, row.completion) == (Prompt("Name a bird."), "Wren.")
    assert row.columns == {"instruction": "Name a bird.", "output": "Wren.", "level": 3}
    swapped = {"completion_a": "completion_b", "completion_b": "completion_a"}
    (row,) = read(
        "id, question,answer\n1,Name a bird.,Wren.\n",
        "sft",
        "rows.csv",
        columns={" question": "prompt", "answer": "completion"},
    ).rows
    assert (row.prompt, row.completion) == (
        Prompt("Name a bird."),
        "Wren.",
    )  # names of a CSV header have no blanks around them
    (pair,) = read([{"user_input": "p", "completion_a": "x", "completion_b": "y"}], "preference", columns=swapped).rows
    assert (pair.chosen, pair.rejected) == ("y", "x")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"qestion": "instruction"}, "no column 'qestion' (data.columns); got question, output"),
        ({"qestion": "output"}, "no column 'qestion' (data.columns); got question, output"),
        (
            {"instruction": "question", "input": "question"},
            "two columns cannot both be called 'question' (data.columns)",
        ),
        ({"question": "output"}, "column 'output' is there already; 'question' cannot take its name (data.columns)"),
        ({"question": "x", "output": "x"}, "two columns cannot both be called 'x' (data.columns)"),
    ],
)
def test_columns_that_cannot_be_renamed(read: Read, columns: dict[str, str], message: str) -> None:
    with pytest.raises(DataError) as caught:
        read([{"question": "p", "output": "a"}], "sft", columns=columns)
    assert caught.value.lines()[0] == f"error: rows.jsonl: {message}"


@pytest.mark.parametrize(
    ("columns", "turned"),
    [
        ({"instruction": "question", "output": "answer"}, "{question: instruction, answer: output}"),
        ({"instruction": "question", "answer": "output"}, "{question: instruction, answer: output}"),
        ({"gold": "answer"}, "{answer: gold}"),
    ],
)
def test_columns_that_are_written_the_other_way_round(read: Read, columns: dict[str, str], turned: str) -> None:
    """Two problems for each entry, none of which said it."""
    with pytest.raises(DataError) as caught:
        read([{"question": "p", "answer": "a"}], "sft", columns=columns)
    (line,) = caught.value.lines()
    assert line.startswith(
        "error: rows.jsonl: data.columns is written the other way round; expected {name in the file: name in the format}; got {"
    )
    assert line.endswith(f"; fix: data.columns={turned}")


def test_prompts_that_repeat_are_dropped_unless_a_further_column_differs(read: Read) -> None:
    rows = [
        {"prompt": "2+3?", "answer": 5},
        {"prompt": "2+3?", "answer": 5},
        {"prompt": " 2+3?", "answer": 6},
        {"prompt": "1+1?", "answer": 2},
    ]
    found = read(rows, "prompt")
    assert [row.where for row in found.rows] == ["rows.jsonl:1", "rows.jsonl:3", "rows.jsonl:4"]
    assert str(found.dropped) == "1 dropped: repeated prompts (first rows.jsonl:2)"
    call = [
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": n, "arguments": {}}}]} for n in "fg"
    ]
    tasks = [[USER, c, {"role": "tool", "content": "5"}] for c in call] + ["if a:\n  x()\ny()", "if a:\n  x()\n  y()"]
    assert (
        len(read([{"prompt": task} for task in tasks], "prompt").rows) == 4
    )  # white space and calls are part of the task
    assert len(read([{"prompt": "A?"}, {"prompt": [{"role": "user", "content": " A?\n"}]}], "prompt").rows) == 1
    pairs = [{"user_input": "p", "completion_a": a, "completion_b": "b"} for a in ("x", "y")]
    assert len(read(pairs, "prompt").rows) == 1  # answers are ignored, so these ask the same
    assert len(read(pairs, "preference").rows) == 2


def test_conversations_are_told_from_prompts_with_one_answer(read: Read) -> None:
    """Whose earlier turns are answers as well, for SFT to learn: conversations; not what pairs or completions stand behind."""
    talk = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}, USER]
    said = [{"from": "gpt" if m["role"] == "assistant" else "human", "value": m["content"]} for m in talk]
    rows: list[tuple[dict[str, Any], bool]] = [
        ({"messages": [*talk, WREN]}, True),
        ({"conversations": [*said, SAID[1]]}, True),
        ({"conversations": said, "chosen": SAID[1], "rejected": {"from": "gpt", "value": "Oak."}}, False),
        ({"prompt": talk, "completion": [WREN]}, False),
        ({"chosen": [*talk, WREN], "rejected": [*talk, OAK]}, False),
    ]
    for row, is_conversation in rows:
        (found,) = read([row], "sft").rows
        assert (found.is_conversation, len(found.prompt.messages), found.completion) == (is_conversation, 3, "Wren.")
        assert not read([row], "prompt").rows[0].is_conversation


def test_speakers_of_sharegpt_files(read: Read) -> None:
    """Scraped collections name the assistant; what a tool has answered has OpenAI's names as well as LLaMA-Factory's."""
    for speaker in ("gpt", "chatgpt", "bing", "bard", "assistant"):
        (row,) = read([{"conversations": [SAID[0], {"from": speaker, "value": "Wren."}]}], "sft").rows
        assert (row.prompt, row.completion) == (ASKED, "Wren.")
    call = {"from": "function_call", "value": '{"name": "look", "arguments": {}}'}
    for speaker in ("observation", "tool", "function"):
        talk = [SAID[0], call, {"from": speaker, "value": "a wren"}, SAID[1]]
        (row,) = read([{"conversations": talk}], "sft").rows
        assert [turn.role for turn in row.prompt.messages] == ["user", "assistant", "tool"]
        assert row.prompt.messages[2].content == "a wren"
    with pytest.raises(
        DataError, match=r"'conversations'\[0\]: unknown from 'narrator'; expected one of human, .* tool, function"
    ):
        read([{"conversations": [{"from": "narrator", "value": "x"}, SAID[1]]}], "sft")


@pytest.mark.parametrize("name", ["conversations", "messages"])
def test_a_system_text_beside_a_conversation_begins_it(read: Read, name: str) -> None:
    """Unless it begins with one of its own, as in LLaMA-Factory: then the column is not read, and told."""
    said = SAID if name == "conversations" else [USER, WREN]
    own = (
        {"from": "system", "value": "Briefly."}
        if name == "conversations"
        else {"role": "system", "content": "Briefly."}
    )
    asked = Prompt(messages=(Message("system", "Be kind."), *ASKED.messages))
    for kind in ("sft", "prompt"):
        found = read([{name: said, "system": "Be kind."}], kind)
        assert (found.rows[0].prompt, found.unread) == (asked, ())
        for nothing in ({}, {"system": None}, {"system": " "}):
            assert read([{name: said, **nothing}], kind).rows[0].prompt == ASKED
    found = read([{name: [own, *said], "system": "Be kind."}, {name: [own, *said], "system": "Briefly."}], "sft")
    assert [row.prompt.messages[0].content for row in found.rows] == ["Briefly.", "Briefly."]
    assert all(len(row.prompt.messages) == 2 for row in found.rows) and found.unread == ("system (1 rows)",)
    found = read([{name: said, "system": 3}], "sft")  # which were read before the column was
    assert found.rows[0].prompt == ASKED and found.unread == ("system",)


def test_the_system_text_of_a_sharegpt_pair(read: Read) -> None:
    pair = {
        "conversations": SAID[:1],
        "chosen": SAID[1],
        "rejected": {"from": "gpt", "value": "Oak."},
        "system": "Be kind.",
    }
    (row,) = read([pair], "preference").rows
    assert [turn.role for turn in row.prompt.messages] == ["system", "user"]


def test_system_texts_that_cannot_begin_a_conversation_are_listed_as_unread(read: Read) -> None:
    """Such rows were read before the column was, and must not stop a job now."""
    whole = [{"from": "system", "value": "Be brief."}, *SAID[:1]]
    pair = {
        "conversations": SAID[:1],
        "chosen": [*whole, SAID[1]],
        "rejected": [*whole, {"from": "gpt", "value": "Oak."}],
        "system": "Be kind.",
    }
    for row, kind in (
        (pair, "preference"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "system": {"a": 1}},
            "sft",
        ),
    ):
        found = read([row], kind)
        assert len(found.rows) == 1 and found.unread == ("system",)


def test_sharegpt_rows_without_pairs_are_no_preferences(read: Read) -> None:
    with pytest.raises(
        DataError, match=r"fields conversations fit no preference format.*sharegpt, missing chosen, rejected"
    ):
        read([{"conversations": SAID}], "preference")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: missing field 'rejected'"):
        read([{"conversations": SAID[:1], "chosen": SAID[1]}], "preference", format="sharegpt")
