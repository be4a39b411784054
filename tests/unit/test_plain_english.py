"""What users read is plain English: documents, field descriptions, messages, the commands' help. Not comments and docstrings."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ODD = {
    r"\b(go|gone|going) on with\b|\bgoes on (with|from)\b": "resumes, continues from",
    r"(?<!what )\b(is|are|was|were|be|been) told\b(?! apart| from)|\band told\b": "is reported, is listed, comes with a warning",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\b(a|the) Ray of our own\b": "a local Ray",
}
"""Phrase -> what to write."""
DOCUMENTS = [
    path.relative_to(ROOT)
    for place in (ROOT, *(ROOT / name for name in ("benchmarks", "cluster", "jobs", "rlhf_ray", "tests")))
    for path in (place.glob("*.md") if place == ROOT else place.rglob("*.md"))
    if path.name != "CHANGELOG.md"
]


def found(text: str) -> list[str]:
    return [f"{match[0]!r}: write {plain}" for odd, plain in ODD.items() for match in re.finditer(odd, text, re.I)]


def spoken(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, text) of every string that is a value, and of the docstrings of commands, which are their help."""
    silent = {n.value for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in silent:
            yield node.lineno, node.value
        if isinstance(node, ast.FunctionDef) and any("app." in ast.unparse(d) for d in node.decorator_list):
            yield node.lineno, ast.get_docstring(node) or ""


def test_documents_are_plain() -> None:
    assert {"README.md", "jobs/README.md", "rlhf_ray/sweep/README.md"} <= {str(path) for path in DOCUMENTS}
    texts = {path: (ROOT / path).read_text(encoding="utf-8").split("\n") for path in DOCUMENTS}
    assert [
        f"{path}:{number}: {odd}"
        for path, lines in texts.items()
        for number, line in enumerate(lines, 1)
        for odd in found(line)
    ] == []


def test_messages_descriptions_and_help_are_plain() -> None:
    files = sorted((ROOT / "rlhf_ray").rglob("*.py"))
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in files}
    strings = [(path.relative_to(ROOT), *spoke) for path, tree in trees.items() for spoke in spoken(tree)]
    assert len(strings) > 10_000 and any(text.startswith("Resume an interrupted run.") for _, _, text in strings)
    assert [f"{path}:{line}: {odd}" for path, line, text in strings for odd in found(text)] == []


@pytest.mark.parametrize(
    "text",
    ["resume=auto goes on with that run", "such a winner is told as such", "fix: mend it", "on a Ray of our own"],
)
def test_what_was_written_before_is_found(text: str) -> None:
    assert len(found(text)) == 1
    assert found("Its settings cannot be told apart. Training goes on.") == []
