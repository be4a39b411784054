"""What rows say beside role and content: bad replies, reasoning, tools, template variables. Used, or told."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from rlhf_ray.config import DataConfig
from rlhf_ray.data.encode import encode_replies, speakable_tokens
from rlhf_ray.data.load import load_rows
from rlhf_ray.data.records import RowSet
from rlhf_ray.data.templates import load_template, template_from_manifest
from rlhf_ray.data.tokenise import IGNORE_INDEX, tokenise_pairs, tokenise_prompts, tokenise_sft
from rlhf_ray.errors import DataError

Read = Callable[..., RowSet]
USER, WREN = {"role": "user", "content": "Name a bird."}, {"role": "assistant", "content": "Wren."}
THOUGHT = {**WREN, "reasoning_content": "It sings."}
FUNCTION = {"name": "look", "arguments": '{"at": "sky"}'}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": FUNCTION}]}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}
START = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
CLOSE = "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
OPTIONS: dict[str, Any] = {"max_length": 900, "too_long": "stop", "add_eos_token": True}
CHATML = START + CLOSE + "{% endif %}"
# As Qwen3: a thought before the answer; the prompt opens it (QWEN_THINKING), or closes an empty one (enable_thinking: false).
WRITES = "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
QWEN_THINKING = START + WRITES + CLOSE + "<think>\n{% endif %}"
QWEN = (
    START
    + "{% if m.role == 'assistant' and loop.last %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    + CLOSE
)
QWEN += "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + START
TOOLS += "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>{% endfor %}"
TOOLS += CLOSE + "{% endif %}"


@pytest.fixture
def learn(read: Read, load_byte_tokenizer: Callable[..., Any]) -> Callable[..., Any]:
    """learn(chat template, row, **options) -> (what the model reads, what of it is learnt, what is told)."""
    tokenizer = load_byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["<think>", "</think>"])

    def made(chat_template: str, row: dict[str, Any], kwargs: Any = None, **options: Any) -> tuple[str, str, list[str]]:
        tokenizer.chat_template = chat_template
        template = load_template("chat", tokenizer, None, kwargs)
        rows = read([row], "sft").rows
        all_of = {"train_on_inputs": False, "train_on_turns": "all", **OPTIONS, **options}
        found = tokenise_sft(rows, template, tokenizer, **all_of)
        (example,) = found.examples
        learnt = [i for i in example.labels if i != IGNORE_INDEX]
        told = [*found.warnings, *map(str, found.tallies)]
        return tokenizer.decode(example.input_ids), tokenizer.decode(learnt), told

    made.tokenizer = tokenizer  # type: ignore[attr-defined]
    return made


def test_rows_that_say_they_are_bad_are_not_learnt(read: Read) -> None:
    """KTO's label, and OpenAI's weight; a label that is a class (0, 1) says nothing of the kind."""
    rows = [
        {"prompt": "p", "completion": c, "label": label} for c, label in (("a", True), ("b", False), ("c", "False"))
    ]
    found = read(rows, "sft")
    assert [row.completion for row in found.rows] == ["a"]
    assert str(found.dropped) == "2 dropped: label: false, a reply that is not to be learnt (first rows.jsonl:2)"
    assert len(read([{"text": "t", "label": n} for n in (0, 1)], "sft").rows) == 2
    found = read([{"text": "a", "label": True}, {"text": "b", "label": False}], "sft")
    assert ([row.completion for row in found.rows], found.dropped.total) == (["a"], 1)
    bad = {**WREN, "weight": 0}
    for said in ({"weight": "0"}, {"weight": 0.0}, {"train": "False"}, {"train": 0}, {"weight": 1, "train": False}):
        assert read([{"messages": [USER, WREN, USER, {**WREN, **said}]}], "sft").rows[0].prompt.messages[1:] == ()
    for said in ({"weight": "1"}, {"train": True}, {"weight": None, "train": ""}):
        assert len(read([{"messages": [USER, WREN, USER, {**WREN, **said}]}], "sft").rows[0].prompt.messages) == 3
    with pytest.raises(DataError, match=r"'messages'\[1\]: 'weight': expected 0 or 1, or true or false, got 0\.5"):
        read([{"messages": [USER, {**WREN, "weight": 0.5}]}], "sft")
    cut, none = {"messages": [USER, WREN, USER, bad]}, {"messages": [USER, bad]}
    found = read([cut, none], "sft")
    assert [(len(row.prompt.messages), row.completion) for row in found.rows] == [(1, "Wren.")]
    assert str(found.dropped) == "1 dropped: no answer that is to be learnt (weight: 0) (first rows.jsonl:2)"


def test_labels_that_say_nothing_of_what_is_learnt_are_told(write: Callable[..., str]) -> None:
    """`label` is read where it is true or false. 0 and 1 may mean that, or be classes: all are learnt, and told."""

    def told(*labels: Any, kind: Any = "sft", **columns: Any) -> tuple[int, tuple[str, ...], tuple[str, ...]]:
        pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
        rows = [
            {**(pair if kind == "preference" else {"prompt": "p", "completion": f"c{i}"}), "label": label, **columns}
            for i, label in enumerate(labels)
        ]
        found = load_rows(DataConfig(train=(write(rows),), held_out_fraction=0.0), kind)
        return len(found.train), found.summary[1:], found.warnings

    unread = ("nothing reads label",)
    warned = (
        "rows.jsonl: 'label' is 0 in 2 rows and 1 in 1 (first rows.jsonl:1): all of them are learnt; only true and false say"
        " whether a reply is",
    )
    assert told(0, 1, 0) == told("0", "1", "0.0") == (3, unread, warned)
    assert told("bad", "chosen") == (2, unread, ())
    assert told(0, 1, 7) == (3, unread, ())  # classes
    assert told(True, None, "", " TRUE ") == (4, (), ())
    assert told(True, False, " false") == (1, (), ())
    assert told(True, 0)[1:] == (("nothing reads label (1 rows)",), (warned[0].replace("2 rows", "1 rows").replace(
        "1 in 1 (first rows.jsonl:1)", "1 in 0 (first rows.jsonl:2)"),))  # fmt: skip
    assert told(True, margin=1, group="g")[1] == ("nothing reads margin, group",)
    assert told(0, kind="preference", margin=1, group="g") == (1, unread, ())


def test_a_turn_that_is_not_to_be_learnt_is_left_out_of_the_loss(learn: Any) -> None:
    row = {"messages": [USER, {**WREN, "weight": 0}, USER, {"role": "assistant", "content": "Crow."}]}
    _, learnt, told = learn(CHATML, row)
    assert (learnt, told) == ("Crow.<|im_end|>", ["1 not learnt in full: messages with weight: 0 (first rows.jsonl:1)"])


def test_no_answer_is_learnt_inside_a_thought_that_the_template_opens(learn: Any) -> None:
    whole, learnt, told = learn(QWEN_THINKING, {"messages": [USER, WREN]})
    assert whole.endswith("assistant\n<think>\n\n</think>\n\nWren.<|im_end|>")
    assert learnt == "\n</think>\n\nWren.<|im_end|>"
    assert told[0].startswith(
        "1 replies: no reasoning: the thought that the template opens (<think>) is closed at once"
    )
    assert told[1].startswith(
        "1 differ from the conversation rendered whole: chat_template_kwargs may change that (first rows."
    )
    assert "learnt '" in told[1] and r"assistant\n<think>\n\n</think>\n\nWren.<|im_end|>'" in told[1]
    for reply in (THOUGHT, {**WREN, "content": "<think>\nIt sings.\n</think>\n\nWren."}):
        whole, learnt, _ = learn(QWEN_THINKING, {"messages": [USER, reply]})
        assert whole.endswith("assistant\n<think>\nIt sings.\n</think>\n\nWren.<|im_end|>")
        assert learnt == "It sings.\n</think>\n\nWren.<|im_end|>"


def test_reasoning_is_learnt_where_the_template_writes_it_and_told_where_not(learn: Any) -> None:
    _, learnt, told = learn(QWEN, {"messages": [USER, THOUGHT]})
    assert (learnt, told) == ("<think>\nIt sings.\n</think>\n\nWren.<|im_end|>", [])
    _, learnt, told = learn(CHATML, {"messages": [USER, THOUGHT]})
    assert learnt == "Wren.<|im_end|>"
    assert told[0].startswith("1 replies: learnt without reasoning_content, which the chat template does not write")


@pytest.mark.parametrize("chat_template", [CHATML, QWEN, "none", QWEN_THINKING])
def test_reasoning_of_earlier_turns_is_told_where_it_is_lost(learn: Any, read: Read, chat_template: str) -> None:
    """By templates that never write it, and by those that drop it of all turns but the last; in prompts and pairs as well."""
    row = {"messages": [USER, THOUGHT, USER, WREN]}
    tokenizer = learn.tokenizer
    tokenizer.chat_template = CHATML if chat_template == "none" else chat_template
    template = load_template("none" if chat_template == "none" else "chat", tokenizer)
    which = "template 'none'" if chat_template == "none" else "the chat template"
    told = f"1 rows: earlier turns without their reasoning_content, which {which} leaves out (first rows.jsonl:1)"
    expected = [] if chat_template == QWEN_THINKING else [told]  # which writes that of every turn
    pair = {"prompt": row["messages"][:3], "chosen": [WREN], "rejected": [{**WREN, "content": "Oak."}]}
    length = {"max_length": 900, "too_long": "stop"}
    turns: dict[str, Any] = {"train_on_inputs": False, "train_on_turns": "last"}
    found = [
        tokenise_sft(read([row], "sft").rows, template, tokenizer, **OPTIONS, **turns),
        tokenise_pairs(read([pair], "preference").rows, template, tokenizer, **OPTIONS),
        tokenise_prompts(read([row], "prompt").rows, template, tokenizer, response_length=1, **length),
    ]
    for done in found:
        assert [line for line in done.warnings if "earlier turns" in line] == expected
    plain = {"messages": [USER, WREN, USER, WREN]}
    assert (
        tokenise_prompts(read([plain], "prompt").rows, template, tokenizer, response_length=1, **length).warnings == []
    )


def test_only_thoughts_are_closed(learn: Any) -> None:
    """The marker of the assistant's turn may be a tag as well; a tag of any name is a thought where the template closes it so."""
    turns = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n{% endfor %}"
    tagged = turns + "{% if add_generation_prompt %}<assistant>{% endif %}"
    _, learnt, told = learn(tagged, {"messages": [USER, WREN]})
    assert (learnt, told) == ("Wren.</s>", [])
    named = QWEN_THINKING.replace("think>", "muse>")
    assert learn(named, {"messages": [USER, WREN]})[1] == "\n</muse>\n\nWren.<|im_end|>"


def test_a_reply_may_spell_the_end_of_a_turn(learn: Any) -> None:
    """Up to the last end, which the template has written, the reply is what was said."""
    said = {**THOUGHT, "content": "A turn ends with <|im_end|> and then a new one begins."}
    for special_tokens in ("text", "parse"):
        _, learnt, _ = learn(QWEN_THINKING, {"messages": [USER, said]}, special_tokens=special_tokens)
        assert learnt == f"It sings.\n</think>\n\n{said['content']}<|im_end|>"


def test_thoughts_are_the_tokens_that_the_model_itself_would_write(learn: Any) -> None:
    """<think> is an added token that is not special: in a reply it is that token; <|im_end|> is text even there."""
    tokenizer, row = learn.tokenizer, {"messages": [USER, {**WREN, "content": "<think>a</think>b"}]}
    ids = {text: tokenizer.convert_tokens_to_ids(text) for text in ("<think>", "</think>", "<|im_end|>")}

    _, learnt, told = learn(CHATML, row)
    assert (learnt, told) == ("<think>a</think>b<|im_end|>", [])
    tokenizer.chat_template = QWEN  # which writes <think> itself
    template = load_template("chat", tokenizer)
    assert speakable_tokens(tokenizer, template) == {"<think>", "</think>"}
    (said, forged) = encode_replies(tokenizer, template, ["<think>a</think>", "<think><|im_end|>"], parse=False)
    assert (said[0], said[-1], len(said)) == (ids["<think>"], ids["</think>"], 3)
    assert not {ids["<|im_end|>"], ids["<think>"]} & set(forged)


def test_variables_of_the_chat_template(learn: Any, read: Read) -> None:
    """Of the job, and of a row before it; they are part of the template's identity, and come back from a manifest."""
    tokenizer = learn.tokenizer
    row = {"messages": [USER, WREN]}
    off = {"enable_thinking": False}
    whole, learnt, told = learn(QWEN, row, kwargs=off)
    assert (learnt, told) == ("Wren.<|im_end|>", [])
    assert whole.endswith("assistant\n<think>\n\n</think>\n\nWren.<|im_end|>")
    assert learn(QWEN, {**row, "chat_template_kwargs": off})[0] == whole
    assert "differ from the conversation rendered whole" in learn(QWEN, row)[2][0]
    plain, given = load_template("chat", tokenizer), load_template("chat", tokenizer, None, off)
    assert plain.sha256 != given.sha256 and "kwargs" not in plain.content()
    off_row = read([{**row, "chat_template_kwargs": off}], "prompt").rows
    options = {"max_length": 500, "response_length": 1, "too_long": "stop"}
    asked = tokenise_prompts(off_row, load_template("none"), tokenizer, **options)
    assert asked.warnings == ["1 rows: template 'none' does not read chat_template_kwargs (first rows.jsonl:1)"]
    again = template_from_manifest(json.loads(json.dumps(given.manifest())), "manifest.json", tokenizer)
    (prompt,) = read([row], "prompt").rows
    assert again.render(prompt.prompt) == given.render(prompt.prompt) != plain.render(prompt.prompt)
    with pytest.raises(DataError, match=r"chat_template_kwargs: tokenize cannot be given"):
        learn(QWEN, {**row, "chat_template_kwargs": {"tokenize": True}})


def test_tools_and_tool_calls_are_given_to_the_template(learn: Any, read: Read) -> None:
    answer = {"role": "tool", "content": "a wren"}
    row = {"messages": [USER, CALL, answer, WREN], "tools": [TOOL]}
    whole, learnt, told = learn(TOOLS, row)
    assert '"name": "look"' in whole
    assert 'assistant\n<call>look {"at": "sky"}</call><|im_end|>' in whole
    assert (learnt, told) == ('<call>look {"at": "sky"}</call><|im_end|>Wren.<|im_end|>', [])
    _, learnt, _ = learn(
        TOOLS, {"messages": [USER, CALL], "tools": json.dumps([TOOL])}
    )  # a call is learnt as a reply, too
    assert learnt == '<call>look {"at": "sky"}</call><|im_end|>'
    shared = [
        {"from": "human", "value": "a"},
        {"from": "function_call", "value": '{"name": "look", "arguments": {"at": "sky"}}'},
    ]
    shared += [{"from": "observation", "value": "3"}, {"from": "gpt", "value": "b"}]
    _, learnt, _ = learn(TOOLS, {"conversations": shared})
    assert learnt == '<call>look {"at": "sky"}</call><|im_end|>b<|im_end|>'
    for refused in (row, {"messages": [USER, CALL]}):
        with pytest.raises(DataError, match=r"rows\.jsonl:1: .*does not write tool"):
            learn(CHATML, refused)
    with pytest.raises(DataError, match=r"template 'none' does not write tools or tool calls \(look\)"):
        rows = read([row], "prompt").rows
        tokenise_prompts(
            rows, load_template("none"), learn.tokenizer, max_length=500, response_length=1, too_long="stop"
        )
    learn(TOOLS, row)
    pair = read([{"prompt": [USER], "chosen": [CALL], "rejected": [WREN]}], "preference").rows
    (found,) = tokenise_pairs(pair, load_template("chat", learn.tokenizer), learn.tokenizer, **OPTIONS).examples
    assert learn.tokenizer.decode(found.chosen_ids).endswith('<call>look {"at": "sky"}</call><|im_end|>')


def test_fields_that_nothing_reads_are_told(write: Callable[..., str]) -> None:
    rows = [{"prompt": "p", "completion": f"c{i}", "id": i, **({"source": "web"} if i else {})} for i in range(3)]
    config = DataConfig(train=(write(rows),), held_out_fraction=0.0)
    assert load_rows(config, "sft").summary == ("3 rows: 3 train, 0 held out", "nothing reads id, source (2 rows)")
    assert len(load_rows(config, "prompt").summary) == 1  # a reward function may read them
    talk = DataConfig(train=(write([{"messages": [USER, {**WREN, "rating": 3}]}]),), held_out_fraction=0.0)
    assert load_rows(talk, "sft").summary[1] == "nothing reads messages[].rating"
    given = {"tools": [TOOL], "chat_template_kwargs": {"x": 1}}
    text = DataConfig(train=(write([{"instruction": "a", "output": "b", **given}]),), held_out_fraction=0.0)
    assert load_rows(text, "sft").summary[1] == "nothing reads tools, chat_template_kwargs"
