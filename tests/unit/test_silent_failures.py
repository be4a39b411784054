"""The silent failures of earlier systems by number, and the rule that each is named by a test that guards against it.

"F12" in a docstring, a comment or a test's name refers to this list.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

FAILURES = {
    "F1": "gradient accumulation runs the same rows again and again",
    "F2": "a default setting raises, after everything is loaded",
    "F3": "no response mask in whitening, GAE, losses and metrics",
    "F4": "whitened rewards far larger than what the clipped critic can follow",
    "F5": "dropout in the update only; `or` turns a 0 into a default",
    "F6": "the first step has learning rate 0",
    "F7": "checkpoints before their update, without all state; a used folder is gone on with unasked",
    "F8": "long prompts are dropped in silence, and from training only",
    "F9": "whether a reply is finished is looked up in text without special tokens",
    "F10": "the reward model never sees the end token; text is tokenised again before it is scored",
    "F11": "the score is read at a place that trusts the padding",
    "F12": "the pad is an ordinary token, or the end token",
    "F13": "penalties of exponentials overflow, and nan_to_num hides it",
    "F14": "what is logged as KL is a clamped penalty",
    "F15": "policy and reference run in different kernels or precisions",
    "F16": "adapters in bf16 lose small steps",
    "F17": "a copy of the base for every role; logits of all positions kept alive",
    "F18": "an adapter whose names match nothing loads in silence",
    "F19": "what trains is decided by substrings; the seed is set after the models are built",
    "F20": "decoding settings without effect; draws counted as losses, rows dropped unreported",
    "F21": "entry points that crash at once; a malformed row stops a debugger",
    "F22": "a failed integrity check is only printed; versions compared as text",
    "F23": "gradient norms logged after clipping; global flags changed for good",
    "F24": "padding left among the labels",
    "F25": "empty adapters are saved, and merging them changes nothing",
    "F26": "a merged reward model loses its head and scores at random",
    "F27": "the stop token is another model's",
    "F28": "hidden row caps; a warm-up longer than the run",
    "F29": "evaluation rows are training rows",
    "F30": "rows without a token to learn make the loss NaN",
    "F31": "resume starts from scratch; no final save",
    "F32": "settings that nothing reads",
    "F33": "a batch of one has no spread",
    "F34": "stages with different prompt templates",
    "F35": "a reward model on another base or precision than it is used on",
    "F36": "the model's class is guessed from its path",
    "F37": "results depend on the working directory, the network, or patched packages",
    "F38": "the reference is not what the policy started from",
    "F39": "artefacts without tokenizer, template or configuration",
}

PHRASES = (
    "empty adapter",
    "lost reward head",
    "template mismatch",
    "pad = eos",
    "eos id wrong",
    "merge that changes nothing",
    "merged != unmerged",
    "dropout making ratio != 1",
    "accumulation repeating a microbatch",
    "whitening over padding",
    "first step with lr 0",
    "no final save",
)


def words_about_tests(source: str) -> Iterator[str]:
    """Names and docstrings of the tests in a file and of the classes around them, parameter ids and comments."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name.lower().startswith("test"):
            yield re.sub(r"_f(\d+)(?=_)", r" F\1 ", node.name) + "\n" + (ast.get_docstring(node) or "")
            yield from (ast.unparse(decorator) for decorator in node.decorator_list)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    yield from (token.string for token in tokens if token.type == tokenize.COMMENT)


NAMED = {
    path.relative_to(TESTS): "\n".join(words_about_tests(path.read_text(encoding="utf-8")))
    for path in sorted(TESTS.rglob("test_*.py"))
    if path != Path(__file__)
}


def test_the_list_is_whole() -> None:
    assert list(FAILURES) == [f"F{i}" for i in range(1, 40)]


def test_what_counts_as_naming() -> None:
    source = 'def test_f9_f27_x() -> None:\n    """F3."""\ndef helper() -> None:\n    """F4."""\nx = "F5"  # F6\n'
    assert set(re.findall(r"\bF\d+\b", "\n".join(words_about_tests(source)))) == {"F9", "F27", "F3", "F6"}


@pytest.mark.parametrize("number", FAILURES)
def test_every_failure_is_named_by_a_test(number: str) -> None:
    assert [path for path, text in NAMED.items() if re.search(rf"\b{number}\b", text)], FAILURES[number]


@pytest.mark.parametrize("phrase", PHRASES)
def test_every_costly_one_is_named_in_words(phrase: str) -> None:
    assert [path for path, text in NAMED.items() if phrase in text]
