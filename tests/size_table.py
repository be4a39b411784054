"""Prints the size of the product: lines per module and the longest functions. Orientation, not a gate: it never fails.

python tests/size_table.py [FOLDER ...]        default: rlhf_ray
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
MODULE_LINES, FUNCTION_LINES = 400, 80
SHOWN_MODULES, SHOWN_FUNCTIONS = 15, 12


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[int, str]]:
    """(lines, dotted name) of every function, methods and inner functions included."""
    for node in ast.iter_child_nodes(tree):
        name = prefix
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            name = f"{prefix}{node.name}."
            if not isinstance(node, ast.ClassDef):
                yield (node.end_lineno or node.lineno) - node.lineno + 1, name[:-1]
        yield from functions(node, name)


def main(folders: list[Path]) -> None:
    modules: list[tuple[int, str]] = []
    longest: list[tuple[int, str]] = []
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            source, name = path.read_text(encoding="utf-8"), path.relative_to(folder.parent).as_posix()
            modules.append((len(source.splitlines()), name))
            longest += [(lines, f"{name}: {function}") for lines, function in functions(ast.parse(source))]
    sizes = [lines for lines, _ in modules if lines]
    lengths = [lines for lines, _ in longest]
    print(f"{sum(sizes)} lines in {len(sizes)} modules, median {median(sizes or [0]):.0f}", end="; ")
    print(f"{len(lengths)} functions, median {median(lengths or [0]):.0f}")
    for title, rows, limit, shown in (
        ("largest modules", modules, MODULE_LINES, SHOWN_MODULES),
        ("longest functions", longest, FUNCTION_LINES, SHOWN_FUNCTIONS),
    ):
        over = sum(lines > limit for lines, _ in rows)
        print(f"\n{title} ({over} over {limit} lines)")
        for lines, name in sorted(rows, key=lambda row: (-row[0], row[1]))[:shown]:
            print(f"{lines:6d}  {name}{'  <-- over' if lines > limit else ''}")


if __name__ == "__main__":
    main([Path(a).resolve() for a in sys.argv[1:]] or [ROOT / "rlhf_ray"])
