"""Every turn of the assistant is learnt: one mask, read off the template."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rlhf_ray.data.prompts import Message, Prompt
from rlhf_ray.data.records import Row
from rlhf_ray.data.templates import load_template
from rlhf_ray.data.tokenise import IGNORE_INDEX, Tokenised, TokenisedRow, tokenise_sft
from rlhf_ray.errors import DataError

START = "{{ '<|im_start|>' + m.role + '\\n' }}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
CHATML = f"{{% for m in messages %}}{START}{{{{ m.content + '<|im_end|>\\n' }}}}{{% endfor %}}{ASK}"
MARKED = (
    f"{{% for m in messages %}}{START}{{% if m.role == 'assistant' %}}{{% generation %}}{{{{ m.content + '<|im_end|>\\n' }}}}"
    f"{{% endgeneration %}}{{% else %}}{{{{ m.content + '<|im_end|>\\n' }}}}{{% endif %}}{{% endfor %}}{ASK}"
)
MARKED_WITHOUT_ENDS = MARKED.replace(
    "{{ m.content + '<|im_end|>\\n' }}{% endgeneration %}", "{{ m.content }}{% endgeneration %}<|im_end|>\n"
)
TRIMMED = CHATML.replace("m.content +", "m.content | trim +")
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<s>[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' </s>' }}{% endif %}{% endfor %}"
)
NO_ENDS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
FIRST, SECOND, THIRD = "F</s>IRST", "SECOND", "THIRD"  # a row may spell a control token: it stays text
TALK = (
    Message("system", "s"),
    Message("user", "a <|im_end|>"),
    Message("assistant", FIRST),
    Message("user", "b"),
    Message("assistant", SECOND),
    Message("user", "c"),
)
THOUGHT = (Message("user", "a"), Message("assistant", "<t>hm</t>FIRST"), Message("user", "b"))
OPTIONS: dict[str, Any] = {"max_length": 400, "too_long": "truncate", "train_on_inputs": False, "add_eos_token": True}


@pytest.fixture
def learn(load_byte_tokenizer: Callable[..., Any]) -> Callable[..., Any]:
    """learn(chat_template, messages=TALK, **options) -> (result, what is learnt of its first row as text)."""
    tokenizer = load_byte_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|system|>", "<|user|>", "<|assistant|>"]}
    )

    def made(
        chat_template: str | None, messages: tuple[Message, ...] = TALK, talk: bool = True, **options: Any
    ) -> tuple[Tokenised[TokenisedRow], list[str]]:
        tokenizer.chat_template = chat_template
        template = load_template("chat" if chat_template else "none", tokenizer)
        row = Row("x:1", Prompt(messages=messages), completion=THIRD, is_conversation=talk)
        found = tokenise_sft([row], template, tokenizer, **{**OPTIONS, "train_on_turns": "all", **options})
        if not found.examples:
            return found, []
        (example,) = found.examples
        assert all(b in (a, IGNORE_INDEX) for a, b in zip(example.input_ids, example.labels, strict=True))
        parts, part = [], list[int]()
        for label in [*example.labels, IGNORE_INDEX]:
            if label != IGNORE_INDEX:
                part.append(label)
            elif part:
                parts.append(str(tokenizer.decode(part)))
                part = []
        return found, parts

    return made


ENDED = [f"{said}<|im_end|>" for said in (FIRST, SECOND, THIRD)]


@pytest.mark.parametrize(
    ("chat_template", "learnt"),
    [
        (CHATML, ENDED),
        (MARKED, ENDED),
        (MARKED_WITHOUT_ENDS, ENDED),
        (TRIMMED, ENDED),
        (NO_ENDS, [FIRST, SECOND, f"{THIRD}</s>"]),
        (None, [f" {FIRST}", f" {SECOND}", f"{THIRD}</s>"]),
    ],
    ids=["ChatML", "marked", "marked without ends", "trimmed", "no ends of turns", "no template: a transcript"],
)
def test_all_turns_of_the_assistant_are_learnt(
    learn: Callable[..., Any], chat_template: str | None, learnt: list[str]
) -> None:
    assert learn(chat_template)[1] == learnt
    without = [part.removesuffix("<|im_end|>").removesuffix("</s>") for part in learnt]
    assert learn(chat_template, add_eos_token=False)[1] == without
    found, last = learn(chat_template, train_on_turns="last")
    assert last == learnt[-1:]
    assert (
        str(found.unlearnt) == "1 not learnt in full: earlier turns of the assistant, train_on_turns: last (first x:1)"
    )


def test_tokens_are_those_of_a_conversation_whose_last_turn_alone_is_learnt(learn: Callable[..., Any]) -> None:
    """Only labels differ: the sequence is the prompt of the last turn, its reply, and the end."""
    (every,), (last,) = (learn(CHATML, train_on_turns=turns)[0].examples for turns in ("all", "last"))
    assert every.input_ids == last.input_ids and every.labels != last.labels
    assert every.labels[-len(THIRD) - 1 :] == last.labels[-len(THIRD) - 1 :] == every.input_ids[-len(THIRD) - 1 :]


def test_context_empty_turns_and_greetings_are_not_learnt(learn: Callable[..., Any]) -> None:
    greeting = (Message("assistant", "Hello!"), Message("user", "a"), Message("assistant", " "), Message("user", "b"))
    assert learn(CHATML, greeting)[1] == ENDED[-1:]
    assert learn(CHATML, talk=False)[1] == ENDED[-1:], "the prompt of a pair, or of a completion, is context"


def test_the_template_s_own_marks_decide(learn: Callable[..., Any]) -> None:
    """{% generation %}: what is marked is learnt, though the template drops earlier thoughts, or leaves a turn unmarked."""
    dropping = MARKED.replace(
        "{{ m.content + '<|im_end|>\\n' }}{% endg", "{{ m.content.split('</t>')[-1] + '<|im_end|>\\n' }}{% endg"
    )
    assert dropping != MARKED
    assert learn(dropping, THOUGHT)[1] == ["FIRST<|im_end|>", ENDED[-1]]
    unmarked = MARKED.replace("m.role == 'assistant'", "m.role == 'assistant' and m.content != 'SECOND'")
    talk = (Message("user", "a"), Message("assistant", "FIRST"), Message("user", "b"), *TALK[4:])
    assert learn(MARKED, talk)[1] == learn(MARKED_WITHOUT_ENDS, talk)[1] == ["FIRST<|im_end|>", *ENDED[1:]]
    found, parts = learn(unmarked, talk)
    assert parts == ["FIRST<|im_end|>", ENDED[-1]]
    unlearnt = "turns that the chat template does not mark ({% generation %})"
    assert [tally.counts() for tally in found.tallies] == [{unlearnt: 1}]
    assert not learn(MARKED, talk)[0].tallies


def test_what_is_left_of_a_cut_conversation_is_learnt(learn: Callable[..., Any]) -> None:
    whole = len(learn(CHATML)[0].examples[0].input_ids)
    found, parts = learn(CHATML, max_length=whole - len(THIRD) - 1)
    assert (parts, found.truncated.total) == (ENDED[:2], 1)
    nothing, _ = learn(CHATML, max_length=20)
    assert nothing.dropped.counts() == {"reply empty after truncation": 1}


NO_THOUGHTS = CHATML.replace(
    "{{ m.content +", "{% set said = m.content.split('</t>')[-1] if not loop.last else m.content %}{{ said +"
)
SYSTEM_LAST = (
    "{% for m in messages %}{% if loop.last %}(be brief) {% endif %}"
    f"{START}{{{{ m.content + '<|im_end|>\\n' }}}}{{% endfor %}}{ASK}"
)


@pytest.mark.parametrize("chat_template", [NO_THOUGHTS, SYSTEM_LAST], ids=["drops thoughts", "moves the system text"])
def test_a_template_that_rewrites_earlier_turns_is_refused(learn: Callable[..., Any], chat_template: str) -> None:
    with pytest.raises(DataError) as caught:
        learn(chat_template, THOUGHT)
    assert str(caught.value.problems[0]) == (
        "x:1: the template writes the assistant's message 2 otherwise once more follow, so it cannot be learnt with them;"
        " fix: train_on_turns: last"
    )
    assert learn(chat_template, THOUGHT, train_on_turns="last")[1] == ENDED[-1:]


def test_a_prompt_that_is_no_token_prefix_is_refused() -> None:
    """Between "\\n" of the prompt and "\\n" of the reply the tokenizer sees one token, which the reply never began with."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    letters = ["</s>", "<unk>", "\n", "\n\n", *"ab|"]
    backend = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[("\n", "\n")], unk_token="<unk>")
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}|{{ '\n' + m.content + ('</s>' if m.role == 'assistant' else '') }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '|\n' }}{% endif %}"
    )
    template = load_template("chat", tokenizer)
    for said, learnt in (("a", [4, 0, 4, 0]), ("\na", None)):
        talk = (Message("user", "b"), Message("assistant", said), Message("user", "b"))
        row = Row("x:1", Prompt(messages=talk), completion="a", is_conversation=True)
        if learnt is None:
            with pytest.raises(
                DataError, match="x:1: the assistant's message 2 shares a token with the text around it"
            ):
                tokenise_sft([row], template, tokenizer, train_on_turns="all", **OPTIONS)
        else:
            (example,) = tokenise_sft([row], template, tokenizer, train_on_turns="all", **OPTIONS).examples
            assert [label for label in example.labels if label != IGNORE_INDEX] == learnt
